"""What makes a decoder a GLM (https://arxiv.org/abs/2103.10360): masks and positions that follow from the token ids.

The tokens before `<sop>` are the context and attend to each other in both directions; those after it attend only to
earlier tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ..configuration_chatglm import ChatGLM1Config
from . import compat
from .heads import CausalLMHead
from .packed import Packed


def is_token(input_ids: torch.Tensor, token_id: int | None) -> torch.Tensor:
    """Where a token is: bool, of the shape of `input_ids`; all False without an id."""
    return torch.eq(input_ids, -1 if token_id is None else token_id)


def marks_in(inputs_embeds: torch.Tensor, embeddings: nn.Module, config: ChatGLM1Config) -> torch.Tensor:
    """The ids of `[MASK]`, `[gMASK]` and `<sop>` where `inputs_embeds` hold their embeddings, and -2 elsewhere.

    That is all that masks and positions depend on, so soft prompts need no ids beside their embeddings. Of each, only
    the last counts: soft prompts that start from the words of a text hold some as well.

    Args:
        inputs_embeds: (batch, tokens, hidden)
        embeddings: the module that made them.

    Returns:
        (batch, tokens)
    """
    ids = torch.full(inputs_embeds.shape[:2], -2, device=inputs_embeds.device)
    for token_id in (config.mask_token_id, config.gmask_token_id, config.bos_token_id):
        if token_id is not None:
            with torch.no_grad():
                row = embeddings(ids.new_tensor([token_id])).to(inputs_embeds)
            found = (inputs_embeds == row).all(-1)
            last = found & (found.flip(-1).cumsum(-1) == 1).flip(-1)
            ids = ids.masked_fill(last, token_id)
    return ids


def starts_here(input_ids: torch.Tensor, config: ChatGLM1Config, positions: torch.Tensor | None = None) -> bool:
    """Whether every row holds a text from its start, though a cache may come before it (with what PEFT's prefix tuning
    puts there): `[gMASK]` or `[MASK]` and, after it, `<sop>`, and its first token is no token of an answer.

    Args:
        positions: the position ids of the tokens, if they are known.
    """
    if positions is not None and positions.dim() == 3 and bool((positions[:, 1, 0] > 0).any()):
        return False
    marks = is_token(input_ids, config.gmask_token_id) | is_token(input_ids, config.mask_token_id)
    is_sop = is_token(input_ids, config.bos_token_id)
    in_order = marks.int().argmax(-1) < is_sop.int().argmax(-1)
    return bool((marks.any(-1) & is_sop.any(-1) & in_order).all())


def continues(
    input_ids: torch.Tensor, cache: Cache | None, positions: torch.Tensor, config: ChatGLM1Config
) -> bool:
    """Whether a few tokens continue the texts in the cache, so that each sees all earlier tokens and no later one."""
    if cache is None or torch.compiler.is_compiling() or int(cache.get_seq_length()) == 0:
        return False
    return not starts_here(input_ids, config, positions)


def moved(positions: torch.Tensor, places: int | torch.Tensor) -> torch.Tensor:
    """Positions (batch, 2, tokens) or (batch, tokens), `places` further in the context; the answer counts as before."""
    if positions.dim() == 2:
        return positions + places
    return torch.stack((positions[:, 0] + places, positions[:, 1]), dim=1)


def behind_cache(positions: torch.Tensor, past: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """The positions of `tokens` tokens behind `past` cached ones.

    Args:
        positions: see `ChatGLM1Model.forward`; of fewer tokens if others were put in front of them.
    """
    front = tokens - positions.shape[-1]
    if front:
        places = torch.arange(front, device=positions.device).expand(*positions.shape[:-1], front)
        if positions.dim() == 3:
            places = places * places.new_tensor([[1], [0]])
        positions = torch.cat((places, moved(positions, front)), dim=-1)
    return moved(positions, past)


def context_lengths(input_ids: torch.Tensor, config: ChatGLM1Config) -> torch.Tensor:
    """(batch, 1): the index of the first `<sop>`; everything before it is context.

    Raises:
        ValueError: a row has no `<sop>` (checked outside of compiled graphs).
    """
    is_sop = is_token(input_ids, config.bos_token_id)
    if not torch.compiler.is_compiling() and not bool(is_sop.any(-1).all()):
        raise ValueError(
            f"input_ids hold a row without <sop> (id {config.bos_token_id}): a prompt of ChatGLM-6B ends with "
            "[gMASK] <sop>. tokenizer(text) and tokenizer.build_inputs_with_special_tokens(ids) add both."
        )
    return is_sop.int().argmax(-1, keepdim=True)


def mask_places(input_ids: torch.Tensor, config: ChatGLM1Config) -> torch.Tensor:
    """(batch, 1): the index of the first `[gMASK]`, else of the first `[MASK]`.

    Raises:
        ValueError: a row has neither (checked outside of compiled graphs).
    """
    is_gmask = is_token(input_ids, config.gmask_token_id)
    is_mask = is_token(input_ids, config.mask_token_id)
    if not torch.compiler.is_compiling() and not bool((is_gmask | is_mask).any(-1).all()):
        raise ValueError(
            f"input_ids hold a row without [gMASK] (id {config.gmask_token_id}) or [MASK]: a prompt of "
            "ChatGLM-6B ends with [gMASK] <sop>. tokenizer(text) adds both."
        )
    return torch.where(
        is_gmask.any(-1, keepdim=True), is_gmask.int().argmax(-1, keepdim=True), is_mask.int().argmax(-1, keepdim=True)
    )


def position_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLM1Config) -> torch.Tensor:
    """See `GLMMethods.get_position_ids`."""
    sop, mask_place = context_lengths(input_ids, config), mask_places(input_ids, config)
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    answer = index >= sop
    if attention_mask is not None:
        real = attention_mask.to(input_ids.device).bool()
        # Padding may also be behind the embeddings that PEFT's prompt tuning puts in front of a padded row.
        index = torch.where(real, real.cumsum(-1) - 1, (index - real.int().argmax(-1, keepdim=True)).clamp(min=0))
        mask_place, sop = index.gather(1, mask_place), index.gather(1, sop)
    if not config.position_encoding_2d:
        has_gmask = is_token(input_ids, config.gmask_token_id).any(-1, keepdim=True)
        return torch.where(answer & ~has_gmask, mask_place, index)
    context_part = torch.where(answer, mask_place, index)
    return torch.stack((context_part, torch.where(answer, index - sop + 1, 0)), dim=1)


def positions_of_call(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions_behind_cache: torch.Tensor | None,
    cache: Cache | None,
    config: ChatGLM1Config,
) -> torch.Tensor:
    """The position ids of a call that was given none; the arguments are those of `ChatGLM1Model.forward`."""
    tokens = input_ids.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    if positions_behind_cache is not None:
        return behind_cache(positions_behind_cache, past, tokens)
    if past != 0 and not starts_here(input_ids, config):
        raise ValueError(
            "Give position_ids with past_key_values: model.transformer.get_position_ids(ids) of the whole sequence, "
            "cut to the new tokens. generate() and chat() do it by themselves."
        )
    padding = attention_mask[:, -tokens:] if attention_mask is not None and attention_mask.dim() == 2 else None
    return moved(position_ids(input_ids, padding, config), past)


def additive_mask(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    config: ChatGLM1Config,
) -> torch.Tensor | None:
    """The mask to add to the scores, (batch, 1, tokens, keys); None if every new token sees everything.

    Args:
        input_ids: the tokens, or those of `marks_in`.
        attention_mask: as `ChatGLM1Model.forward` takes it.
        positions: the position ids of the tokens.

    Raises:
        ValueError: `<sop>` is missing and the mask has to be computed from it, or a 4-D mask is of integers.
    """
    dtype, device, tokens = inputs_embeds.dtype, inputs_embeds.device, inputs_embeds.shape[1]
    hidden = torch.finfo(dtype).min
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.is_floating_point():
            return attention_mask
        if attention_mask.dtype != torch.bool:
            raise ValueError(
                "A 4-D attention_mask must be bool (True = hidden) or of floating point (added to the scores), not "
                f"{attention_mask.dtype}: convert it, or give a (batch, tokens) mask with 1 for real tokens."
            )
        return torch.zeros(attention_mask.shape, dtype=dtype, device=device).masked_fill(attention_mask, hidden)
    past: int | torch.Tensor = 0
    keys = tokens
    if past_key_values is not None:
        past = past_key_values.get_seq_length()
        keys = past_key_values.get_mask_sizes(tokens, 0)[0]
    if tokens == 1 and attention_mask is None and keys == 1 + past:
        return None
    queries = torch.arange(tokens, device=device).unsqueeze(-1) + past
    columns = torch.arange(keys, device=device)
    visible = (columns <= queries).unsqueeze(0)  # (batch, tokens, keys)
    if tokens > 1 and (torch.compiler.is_compiling() or int(past) == 0 or starts_here(input_ids, config, positions)):
        # In both directions inside the context, and only for tokens that belong to it.
        lengths = context_lengths(input_ids, config).unsqueeze(-1) + past
        visible = visible | ((queries < lengths) & (columns < lengths))
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]), value=True)
        visible = visible & real.unsqueeze(1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, hidden)
    return mask.unsqueeze(1)


def of_packed(
    packed: Packed,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    config: ChatGLM1Config,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Position ids of a packed row, `positions` if they are given, and the masks of its groups.

    Args:
        input_ids: (1, tokens), or those of `marks_in`.
    """
    found, masks = [], []
    for group in packed.groups:
        ids = group.take(input_ids)
        places = position_ids(ids, None, config)
        found.append(places.movedim(1, -1))  # (examples, tokens, 2), or (examples, tokens)
        masks.append(additive_mask(ids, None, None, inputs_embeds.new_empty(*ids.shape, 0), places, config))
    joined = packed.join(found)
    return (joined.movedim(-1, 1) if positions is None else positions), masks


class GLMMethods:
    """Mixin for all models of generation 1."""

    config: ChatGLM1Config

    @property
    def position_encoding_2d(self) -> bool:
        """Whether positions have two parts, the place in the context and in the answer."""
        return bool(self.config.position_encoding_2d)

    def get_position_ids(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        use_gmasks: Sequence[bool] | None = None,
        *,
        mask_positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Positions of whole sequences, from their start.

        Row 0 counts the context and stays at the place of `[gMASK]` (else `[MASK]`) from `<sop>` on; row 1 is 0 in the
        context and counts 1, 2, ... from `<sop>` on. Left padding in `attention_mask` is not counted.

        Args:
            input_ids: (batch, tokens)
            attention_mask: (batch, tokens), 0 for padding; None counts every token.
            mask_positions, use_gmasks: the place of `[gMASK]` (else `[MASK]`) in each row, and which of them it is. The
                originals' callers give both, the places as the second argument. They follow from `input_ids`.

        Returns:
            (batch, 2, tokens), or (batch, tokens) with `position_encoding_2d=False`.

        Raises:
            ValueError: a row has no `<sop>`, or neither `[gMASK]` nor `[MASK]`, or it is not at its `mask_positions`.
        """
        if attention_mask is not None and torch.as_tensor(attention_mask).dim() == 1:
            mask_positions, attention_mask = attention_mask, None  # type: ignore[assignment]
        if mask_positions is not None:
            places = mask_places(input_ids, self.config)[:, 0].tolist()
            if places != torch.as_tensor(mask_positions).tolist():
                raise ValueError(f"mask_positions must be the places of [gMASK] or [MASK] in input_ids, {places}")
        return position_ids(input_ids, attention_mask, self.config).to(device=device)

    def get_masks(self, input_ids: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
        """What the tokens do not see, (batch, 1, tokens, tokens), bool: True = hidden. `forward` takes such a mask, but
        makes its own as well.

        Args:
            input_ids: (batch, tokens)
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        context = (index < context_lengths(input_ids, self.config)).unsqueeze(1)
        return (~(context | (index <= index.unsqueeze(-1)))).unsqueeze(1).to(device=device)


class GLMGenerationMixin(compat.ChatGLMGenerationMixin):
    """`generate` for a model whose positions follow from all token ids, not just from their count."""

    config: Any
    transformer: Any
    get_input_embeddings: Any

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; also takes the 4-D mask and 2-D positions that the tokenizer makes for a batch."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = (~mask[:, 0, -1].bool()).long()  # the last token sees all but the padding
        if positions is not None:
            # Renamed, because transformers would take the second axis for the batch.
            kwargs["positions_behind_cache"] = kwargs.pop("position_ids")
        return super().generate(inputs, **kwargs)

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Called by transformers before a compiled step; forward computes the mask from the ids."""
        return attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        positions_behind_cache: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens with their positions, which follow from the whole sequence (`position_ids` is not used).

        Args:
            positions_behind_cache: of the prompt.
        """
        past_key_values = compat.given_cache(past_key_values, cache)
        sequence = input_ids
        alone = attention_mask is None or attention_mask.shape[1] != input_ids.shape[1]
        if inputs_embeds is not None and alone:  # the prompt; input_ids then are the answer alone
            marks = marks_in(inputs_embeds, self.get_input_embeddings(), self.config)
            sequence = torch.cat((marks.to(input_ids.device), input_ids), dim=-1)
        if positions_behind_cache is None:
            positions = self.transformer.get_position_ids(sequence, attention_mask)
        else:
            new = sequence.shape[1] - positions_behind_cache.shape[-1]
            steps = torch.arange(1, new + 1, device=input_ids.device)
            last = positions_behind_cache[..., -1:].expand(*positions_behind_cache.shape[:-1], new)
            moves = torch.ones_like(last) if last.dim() == 2 else torch.tensor([[0], [1]], device=input_ids.device)
            positions = torch.cat((positions_behind_cache, last + moves * steps), dim=-1)
        if attention_mask is not None and isinstance(past_key_values, Cache) and past_key_values.is_compileable:
            # One shape for every step, so that a compiled step is compiled once; unused slots lie in the future.
            room = past_key_values.layers[0].max_cache_len - attention_mask.shape[1]
            attention_mask = F.pad(attention_mask, (0, room), value=1)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            past_key_values=past_key_values,
            **kwargs,
        )
        new_inputs = (
            model_inputs["input_ids"] if model_inputs["input_ids"] is not None else model_inputs["inputs_embeds"]
        )
        # Not as position_ids, which PEFT's prompt methods drop, or move in the answer too.
        count = new_inputs.shape[1]
        positions = moved(positions[..., -count:], count - sequence.shape[1])
        model_inputs["positions_behind_cache"] = positions.to(new_inputs.device)
        return model_inputs


class GLMHead(GLMGenerationMixin, CausalLMHead):
    """The language model of generation 1."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        positions_behind_cache: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `CausalLMHead.forward`; `generate` gives `positions_behind_cache` (see the network's `forward`)."""
        return self.logits_and_loss(
            labels, logits_to_keep, kwargs, input_ids=input_ids, attention_mask=attention_mask,
            position_ids=position_ids, positions_behind_cache=positions_behind_cache,
            past_key_values=compat.given_cache(past_key_values, cache), inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )  # fmt: skip
