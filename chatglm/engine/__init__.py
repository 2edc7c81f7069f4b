"""Runs many requests at once on one model and streams the answer of each; knows token ids, not chats.

`Engine` takes requests from any thread or task and runs a `Scheduler` in a thread of its own; `Scheduler.step` computes
the next token of every request. Each request has a `Stream` of steps.
"""

from .errors import EngineStoppedError, PromptTooLongError, QueueFullError
from .logprobs import TokenLogprob
from .request import AS_LOADED, CLIENT, AdapterName, Request
from .scheduler import Scheduler, Statistics
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
