"""Estimates the memory of a training run before anything is loaded.

The run is rehearsed: the model is built from its config with tensors that have a shape but no memory, one training step
goes through it, and a ledger records every allocation. So the estimate follows what the code does - which activations
stay for the backward pass, when the logits are freed, what gradient checkpointing drops - instead of a formula that has
to be kept up to date by hand. A model of 6 billion parameters takes a few seconds. If the run evaluates, an evaluation
batch is rehearsed, too: it may have more rows than a training step, and the higher peak.

Two amounts are not tensors of the step and are added: the memory of Python and its libraries (`overheads.LIBRARIES`),
and what torch's operators allocate internally (see `ledger`).
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
