"""Packing: the examples of a batch follow each other in one row, without padding.

The examples of a step stay the same, so its loss and its gradient are those of the padded batch. The model keeps the
examples apart, see `chatglm.network.packed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .encoding import IGNORED


class PackingError(ValueError):
    """The model cannot take packed rows; the message says why."""


class Packer:
    """Packs the examples of a batch for a model. Raises PackingError if its attention cannot keep examples apart."""

    def __init__(self, model: Any) -> None:
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise PackingError(f"--packing needs sdpa or eager attention, not {implementation!r}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Examples -> one row.

        Returns:
            `input_ids`, `labels` (1, tokens); `cu_seq_lens_q` (1, examples + 1), where they begin and the last one
            ends; `tokens` (1,), how many there are. The first size of all is that of the batch: accelerate wants it.
        """
        ids, labels = ([torch.as_tensor(example[name], dtype=torch.long) for example in examples]
                       for name in ("input_ids", "labels"))  # fmt: skip
        counts = torch.tensor([len(one) for one in ids])
        ends = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        row = torch.cat(labels)
        row[ends[:-1]] = IGNORED  # it would be learned from the example before
        whole = {"input_ids": torch.cat(ids)[None], "labels": row[None], "cu_seq_lens_q": ends[None]}
        return whole | {"tokens": counts.sum(0, keepdim=True)}


def first_example(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first example of a batch, packed or padded, as a batch of its own."""
    if "cu_seq_lens_q" not in inputs:
        return {name: value[:1] for name, value in inputs.items()}
    end = int(inputs["cu_seq_lens_q"][0, 1])
    return {name: value[:, : 2 if name == "cu_seq_lens_q" else end] for name, value in inputs.items()}
