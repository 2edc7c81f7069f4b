"""Runs many requests at once on one model and streams the answer of each; knows token ids, not chats.

`Engine` takes requests from any thread or task and runs a `Scheduler` in a thread of its own; `Scheduler.step` computes
the next token of every request. Each request has a `Stream` of steps.

We do not use transformers' continuous batching: it has one seed for all requests, takes no logits processors per
request, changes the model's attention implementation while others use the model, and does not support generation 1's
mask. It is also slower on a CPU: with a model of 36M parameters on two busy cores, 16 answers of 32 tokens at once ran
at 218 tokens/s here, and at 53 (first run) and 82 (second run) there; see `benchmarks/serving.py`.
"""

from .errors import EngineStoppedError, PromptTooLongError, QueueFullError
from .logprobs import TokenLogprob
from .request import AS_LOADED, CLIENT, AdapterName, Request
from .scheduler import Scheduler
from .statistics import Statistics
from .stream import EngineStep, Stream, Waiting
from .worker import Engine

__all__ = [
    "AS_LOADED",
    "CLIENT",
    "AdapterName",
    "Engine",
    "EngineStep",
    "EngineStoppedError",
    "PromptTooLongError",
    "QueueFullError",
    "Request",
    "Scheduler",
    "Statistics",
    "Stream",
    "TokenLogprob",
    "Waiting",
]
