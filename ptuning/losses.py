"""Cross-entropy over the learned tokens of a step, and of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .encoding import IGNORED


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """The label that each position predicts (rows, tokens); the last one none."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def learned(labels: torch.Tensor) -> torch.Tensor:
    """Whether a position predicts a token that is learned (rows, tokens)."""
    return shifted(labels) != IGNORED


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The mean over the learned tokens of all micro-batches of a step. Logits: (learned positions, vocabulary)."""
    labels = shifted(labels)
    wanted = labels[labels != IGNORED].to(outputs.logits.device)
    total = functional.cross_entropy(outputs.logits.float(), wanted, reduction="sum")
    return total / (max(len(wanted), 1) if num_items_in_batch is None else num_items_in_batch)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss and the number of learned tokens of each row, both (rows,) float32. Logits: (rows, tokens, n)."""
    pairs = zip(logits[:, :-1], labels[:, 1:], strict=True)
    sums = torch.stack([functional.cross_entropy(row.float(), wanted, reduction="sum") for row, wanted in pairs])
    return sums, (labels[:, 1:] != -100).sum(-1).float()
