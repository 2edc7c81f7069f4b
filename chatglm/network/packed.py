"""Examples that follow each other in one row without padding; attention keeps them apart.

All layers but attention treat tokens one by one. Attention runs in groups of examples of similar length, each padded to
its longest: a mask over the whole row would cost the products of all examples with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from .compat import PACKING_KEYWORDS

#: The shortest example of a group has at least this share of the tokens of its longest.
SIMILAR = 0.75


class Group:
    """Some examples of a row.

    Attributes:
        examples: (examples,) their numbers in the row.
        index: (examples, tokens) where their tokens are in the row; what fills up a shorter one is its last token,
            which comes after all that count.
    """

    def __init__(self, examples: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: Any) -> None:
        begin, length = (
            torch.tensor([values[one] for one in examples], device=device)[:, None] for values in (starts, lengths)
        )
        places = torch.arange(max(lengths[one] for one in examples), device=device)
        self.examples = torch.tensor(examples, device=device)
        self.index = begin + torch.minimum(places, length - 1)

    def take(self, row: torch.Tensor) -> torch.Tensor:
        """(1, tokens of the row, ...) -> (examples, tokens, ...)"""
        return row[0].index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


class Packed:
    """How the examples lie in a row.

    Attributes:
        count: how many examples there are.
        groups: a partition of them.
        positions: (1, tokens) the place of each token in its example.
    """

    def __init__(self, boundaries: torch.Tensor, tokens: int, device: torch.device) -> None:
        """
        Args:
            boundaries: (examples + 1,) or (1, examples + 1), where each example begins, and the end of the last one.
            tokens: of the row.

        Raises:
            ValueError: the boundaries are not those of such a row.
        """
        ends = boundaries.flatten().tolist()
        starts, lengths = ends[:-1], [end - start for start, end in pairwise(ends)]
        if not lengths or ends[0] != 0 or ends[-1] != tokens or min(lengths) < 1:
            raise ValueError(f"cu_seq_lens_q has to rise from 0 to the {tokens} tokens of the row, and is {ends}")
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
            if groups and lengths[number] >= SIMILAR * lengths[groups[-1][0]]:
                groups[-1].append(number)
            else:
                groups.append([number])
        self.count = len(lengths)
        self.groups = [Group(group, starts, lengths, device) for group in groups]
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
        # Where the tokens of the row are among those of all groups, one after the other.
        offsets = torch.zeros(len(lengths), dtype=torch.long)
        begin = 0
        for group in groups:
            width = lengths[group[0]]
            offsets[group] = begin + width * torch.arange(len(group))
            begin += width * len(group)
        repeats = torch.tensor(lengths, device=device)
        self.places = self.positions[0] + offsets.to(device).repeat_interleave(repeats)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(examples, tokens, ...) of every group -> (1, tokens of the row, ...)"""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.places).unsqueeze(0)

    def attend(
        self,
        attention: Callable[..., tuple[torch.Tensor, Any]],
        states: Sequence[torch.Tensor],
        prefix: Sequence[torch.Tensor | None],
        masks: Any,
    ) -> torch.Tensor:
        """Attention inside every example.

        Args:
            attention: (query, key, value, mask) -> (examples, tokens, heads, head_dim) and weights, which are dropped
            states: query, key and value of the row, each (1, heads, tokens, head_dim)
            prefix: keys and values in front of each example, (examples, heads, prefix, head_dim), or None
            masks: a list, for every group the mask or None

        Returns:
            (1, tokens, heads, head_dim)
        """
        rows = [state.transpose(1, 2) for state in states]
        parts = []
        for group, mask in zip(self.groups, masks, strict=True):
            query, *both = (group.take(row).transpose(1, 2) for row in rows)
            for place, front in enumerate(prefix):
                if front is not None:
                    both[place] = torch.cat((front.index_select(0, group.examples), both[place]), dim=2)
            parts.append(attention(query, *both, mask)[0])
        return self.join(parts)


def take_packed(
    keywords: dict[str, Any], inputs_embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any, attention: str
) -> Packed | None:
    """The examples in the row of a forward, if its keywords name their boundaries as transformers does
    (`cu_seq_lens_q` ...). They are taken out of `keywords`, unless flash attention reads them by itself.

    Args:
        inputs_embeds: (1, tokens, hidden)
        mask, cache: of the forward
        attention: the attention implementation

    Raises:
        ValueError: the keywords are not those of a packed row, or come with a mask or a cache.
    """
    if not any(name in keywords for name in PACKING_KEYWORDS) or "flash" in attention:
        return None
    given = {name: keywords.pop(name) for name in PACKING_KEYWORDS if name in keywords}
    boundaries = given.get("cu_seq_lens_q")
    if boundaries is None or not torch.equal(boundaries, given.get("cu_seq_lens_k", boundaries)):
        raise ValueError("packed rows need cu_seq_lens_q, and cu_seq_lens_k must be the same")
    if len(inputs_embeds) != 1 or mask is not None or cache is not None:
        raise ValueError("cu_seq_lens_q is for one row of examples, without attention_mask and KV cache")
    return Packed(boundaries, inputs_embeds.shape[1], inputs_embeds.device)
