"""How much memory a training run takes, told before anything is loaded.

The run is rehearsed: the very model that would be trained is built from its config with tensors that have a shape but
no memory, one training step goes through it, and every allocation is written into a ledger. So the figure follows what
the code does - which activations stay for the backward pass, when the logits go, what gradient checkpointing drops -
instead of a formula that has to be kept true by hand. A model of 6 billion parameters takes a few seconds. Where the
run evaluates, a batch of that is rehearsed, too: with more rows than a training step has, it may be the higher peak.

Two things are no tensors of the step and are added: what Python and its libraries take (`overheads.LIBRARIES`), and
what torch's operators allocate inside themselves (see `ledger`).
"""

from __future__ import annotations

from .overheads import LIBRARIES
from .peak import estimate
from .report import PARTS, Advice, Estimate
from .savings import advice
from .settings import METHODS, OPTIMIZERS, Evaluation, Settings

__all__ = [
    "LIBRARIES",
    "METHODS",
    "OPTIMIZERS",
    "PARTS",
    "Advice",
    "Estimate",
    "Evaluation",
    "Settings",
    "advice",
    "estimate",
]
