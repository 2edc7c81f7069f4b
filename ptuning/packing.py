"""Packing: the examples of a batch put into few rows without padding, behind masks that keep them apart.

The rows of a step stay the same, so its loss and its gradient are those of the padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatglm.network import glm

IGNORED = -100


class PackingError(ValueError):
    """The model cannot take packed rows; the message says why."""


@dataclass(frozen=True)
class Packer:
    """Packs the examples of a batch for one model.

    Attributes:
        length: tokens of a row at most; a longer example has a row of its own.
        pad_token_id: the tokenizer's.
        config: the model's.
        two_ways: the tokens of a prompt see each other in both directions (generation 1).
        additive: attention adds the mask to its scores, instead of taking a boolean one.
    """

    length: int
    pad_token_id: int
    config: Any
    two_ways: bool = False
    additive: bool = False

    @classmethod
    def of(cls, model: Any, pad_token_id: int, length: int) -> Packer:
        """The packer for a model. Raises PackingError if its attention takes no mask that keeps examples apart."""
        implementation = model.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise PackingError(f"--packing needs attention with masks (sdpa or eager), not {implementation!r}")
        two_ways = isinstance(model, glm.GLMMethods)
        return cls(length, pad_token_id, model.config, two_ways, implementation == "eager" and not two_ways)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Examples -> a batch of fewer rows.

        Returns:
            `input_ids`, `labels` (rows, tokens); `position_ids` (rows, tokens), in generation 1 (rows, 2, tokens);
            `attention_mask` (rows, 1, tokens, tokens); `tokens` (rows,), how many are no padding.
        """
        ids = [torch.as_tensor(example["input_ids"], dtype=torch.long) for example in examples]
        rows = fill([len(one) for one in ids], self.length)
        width = max(sum(len(ids[index]) for index in row) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        visible = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding, too, must see something
        kinds = 2 if self.two_ways and self.config.position_encoding_2d else 1
        positions = torch.zeros(len(rows), kinds, width, dtype=torch.long)
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                place = slice(start, start + len(ids[index]))
                input_ids[number, place] = ids[index]
                labels[number, place] = torch.as_tensor(examples[index]["labels"], dtype=torch.long)
                labels[number, start] = IGNORED  # it would be learned from the example before
                positions[number, :, place], visible[number, place, place] = self._alone(ids[index])
                start = place.stop
        mask = ~visible if self.two_ways else visible  # generation 1's boolean masks say what is hidden
        if self.additive:
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        counts = torch.tensor([sum(len(ids[index]) for index in row) for row in rows])
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": positions if kinds == 2 else positions[:, 0],
            "attention_mask": mask.unsqueeze(1),
            "tokens": counts,
        }

    def _alone(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (kinds, tokens) and what each token sees (tokens, tokens) of an example by itself."""
        index = torch.arange(len(ids))
        visible = index <= index[:, None]
        if not self.two_ways:
            return index[None], visible
        context = glm.context_lengths(ids[None], self.config)
        positions = glm.position_ids(ids[None], None, self.config)[0]
        return positions.view(-1, len(ids)), visible | ((index < context) & (index[:, None] < context))


def fill(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Divides examples among as few rows of `room` tokens as this finds, equally long: the longest first, each to the
    shortest row."""
    room = max(room, *lengths)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for count in range(-(-sum(lengths) // room), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        sums = [0] * count
        for index in order:
            row = min(range(count), key=sums.__getitem__)
            rows[row].append(index)
            sums[row] += lengths[index]
        if max(sums) <= room:
            break
    return rows
