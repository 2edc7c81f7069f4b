"""What makes a decoder a GLM (https://arxiv.org/abs/2103.10360): masks and positions that follow from the token ids.

The tokens before `<sop>` are the context and attend to each other in both directions; those after it attend only to
earlier tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache

from ..configuration_chatglm import ChatGLM1Config
from . import compat
from .heads import CausalLMHead


def is_token(input_ids: torch.Tensor, token_id: int | None) -> torch.Tensor:
    """Where a token is: bool, of the shape of `input_ids`; all False without an id."""
    return torch.eq(input_ids, -1 if token_id is None else token_id)


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


def position_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLM1Config) -> torch.Tensor:
    """See `ChatGLM1Model.get_position_ids`."""
    sop = context_lengths(input_ids, config)
    is_gmask = is_token(input_ids, config.gmask_token_id)
    is_mask = is_token(input_ids, config.mask_token_id)
    has_gmask = is_gmask.any(-1, keepdim=True)
    if not torch.compiler.is_compiling() and not bool((is_gmask | is_mask).any(-1).all()):
        raise ValueError(
            f"input_ids hold a row without [gMASK] (id {config.gmask_token_id}) or [MASK]: a prompt of "
            "ChatGLM-6B ends with [gMASK] <sop>. tokenizer(text) adds both."
        )
    mask_place = torch.where(has_gmask, is_gmask.int().argmax(-1, keepdim=True), is_mask.int().argmax(-1, True))
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if attention_mask is not None:
        padding = attention_mask.to(input_ids.device).int().argmax(-1, keepdim=True)
        index, mask_place, sop = (index - padding).clamp(min=0), mask_place - padding, sop - padding
    answer = index >= sop
    if not config.position_encoding_2d:
        return torch.where(answer & ~has_gmask, mask_place, index)
    context_part = torch.where(answer, mask_place, index)
    return torch.stack((context_part, (index - sop + 1).clamp(min=0)), dim=1)


def additive_mask(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    inputs_embeds: torch.Tensor,
    config: ChatGLM1Config,
) -> torch.Tensor | None:
    """The mask to add to the scores, (batch, 1, tokens, keys); None if every new token sees everything.

    Args:
        attention_mask: as `ChatGLM1Model.forward` takes it.

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
    if tokens > 1 and (isinstance(past, torch.Tensor) or past == 0):
        if input_ids is None:
            raise ValueError("With inputs_embeds, give a 4-D attention_mask: ChatGLM-6B finds <sop> in input_ids.")
        if not isinstance(past, torch.Tensor) or torch.compiler.is_compiling() or int(past) == 0:
            # In both directions inside the context, and only for tokens that belong to it.
            lengths = context_lengths(input_ids, config).unsqueeze(-1)
            visible = visible | ((queries < lengths) & (columns < lengths))
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]), value=True)
        visible = visible & real.unsqueeze(1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, hidden)
    return mask.unsqueeze(1)


class GLMHead(CausalLMHead):
    """A language model for `generate` whose positions follow from all token ids, not just from their count."""

    @property
    def position_encoding_2d(self) -> bool:
        """Whether positions have two parts, the place in the context and in the answer."""
        return bool(self.config.position_encoding_2d)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; also takes the 4-D mask and 2-D positions that the tokenizer makes for a batch."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = (~mask[:, 0, -1].bool()).long()  # the last token sees all but the padding
        if positions is not None:
            # Renamed, because transformers would take the second axis for the batch.
            kwargs["prompt_position_ids"] = kwargs.pop("position_ids")
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
        position_ids: torch.Tensor | None = None,
        prompt_position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The new tokens with their positions, which follow from all `input_ids` (`position_ids` is not used)."""
        past_key_values = compat.given_cache(past_key_values, cache)
        if prompt_position_ids is None:
            positions = self.transformer.get_position_ids(input_ids, attention_mask)
        else:
            new = input_ids.shape[1] - prompt_position_ids.shape[-1]
            steps = torch.arange(1, new + 1, device=input_ids.device)
            last = prompt_position_ids[..., -1:].expand(*prompt_position_ids.shape[:-1], new)
            moves = torch.ones_like(last) if last.dim() == 2 else torch.tensor([[0], [1]], device=input_ids.device)
            positions = torch.cat((prompt_position_ids, last + moves * steps), dim=-1)
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
            **compat.named_cache(past_key_values),
            **kwargs,
        )
        new_inputs = (
            model_inputs["input_ids"] if model_inputs["input_ids"] is not None else model_inputs["inputs_embeds"]
        )
        model_inputs["position_ids"] = positions[..., -new_inputs.shape[1] :].to(new_inputs.device)
        return model_inputs
