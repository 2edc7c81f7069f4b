"""The decode loop: a prompt's ids in, an answer out token by token, with the KV cache that is kept between turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from .adapters import switching
from .cache import ChatCache
from .decoding.choosing import (
    InvalidScoreLogitsProcessor,
    NonFiniteLogitsError,
    TokenChooser,
    check_finite,
    choose,
    find_non_finite,
)
from .decoding.options import DEFAULT_TOP_K, GREEDY_BELOW, GenerationOptions
from .decoding.steps import FinishReason, GenerationStep
from .decoding.text import AnswerText, IncrementalDecoder

__all__ = [
    "CPU_PROMPT_TOKENS",
    "DEFAULT_TOP_K",
    "GREEDY_BELOW",
    "AnswerText",
    "ChatCache",
    "FinishReason",
    "GenerationOptions",
    "GenerationStep",
    "IncrementalDecoder",
    "InvalidScoreLogitsProcessor",
    "NonFiniteLogitsError",
    "TokenChooser",
    "check_finite",
    "choose",
    "decode",
    "find_non_finite",
    "generate_text",
    "piece_end",
    "weights_stamp",
]

#: A CPU reads a prompt in pieces of this many tokens: more at once take memory and save no time.
CPU_PROMPT_TOKENS = 256


def weights_stamp(model: PreTrainedModel) -> object:
    """A value that changes when weights are replaced, moved, cast or trained, or another adapter is used.

    A KV cache from before the change is of no use after it.
    """
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return object()
    # Offloaded weights are loaded again for each use; between uses a placeholder on the meta device stands for them.
    state = tuple((one.data_ptr(), 0 if one.is_meta else one._version) for one in parameters)
    return hash(state), switching.stamp(model)


def piece_end(model: PreTrainedModel, ids: torch.Tensor, start: int) -> int:
    """The end of the piece of the prompt `ids` (1, tokens) that a single forward should read from `start` on."""
    tokens = ids.shape[1]
    if ids.device.type != "cpu" or tokens - start <= CPU_PROMPT_TOKENS:
        return tokens
    end = start + CPU_PROMPT_TOKENS
    whole = model.reusable_prefix(ids[0].tolist(), end) < end  # generation 1: context tokens see each other both ways
    return tokens if whole else end


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    options: GenerationOptions,
    limit: int,
    cache: ChatCache | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, FinishReason | None]]:
    """The decode loop: the sequences after every new token, and why they ended.

    Args:
        input_ids: (batch, tokens), left-padded if the rows differ in length.
        limit: number of tokens in a row, prompt included, at which to end with "length".
        cache: already holds the first tokens of a single sequence (see `ChatCache.keep_prefix_of`).
        attention_mask: (batch, tokens), 0 for padding.

    Yields:
        (batch, tokens so far) with the new token last. A cancelled run yields the sequence as it is, once.

    Raises:
        NonFiniteLogitsError: see there.
    """
    ids = input_ids
    batch_size = len(ids)
    chooser = TokenChooser(model, options, ids.shape[1], limit, ids.device, batch_size)
    if cache is None and options.use_cache:
        cache = ChatCache()
    start = len(cache.token_ids) if cache is not None else 0
    while True:
        if options.cancel is not None and options.cancel.is_set():
            yield ids, "cancelled"
            return
        end = ids.shape[1]
        if cache is not None and batch_size == 1 and attention_mask is None:
            end = piece_end(model, ids, start)
        outputs = model(
            input_ids=ids[:, start:end],
            position_ids=model.positions_from(ids, start, attention_mask)[..., : end - start],
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        if cache is not None:
            if batch_size == 1:
                cache.token_ids += ids[0, start:end].tolist()
            start = end
            if end < ids.shape[1]:
                continue
        choice = chooser.choose(ids, outputs.logits[:, -1].float().to(ids.device))
        ids = torch.cat((ids, choice.tokens), dim=-1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch_size, 1)), dim=-1)
        yield ids, choice.finish_reason
        if choice.finish_reason is not None:
            return


def generate_text(
    model: PreTrainedModel,
    ids: Sequence[int],
    options: GenerationOptions,
    decode_ids: Callable[[list[int]], str],
    context: int | None = None,
    cache: ChatCache | None = None,
) -> Iterator[GenerationStep]:
    """One answer to the prompt `ids`, step by step.

    Args:
        decode_ids: ids of the answer -> text, without clean-up. The text of the first ids is the beginning of the text.
        context: the most tokens the model can take, or None.
        cache: from an earlier turn; its common beginning with `ids` is not computed again.

    Raises:
        ValueError: the prompt leaves no room for a token.
        NonFiniteLogitsError: see there.
    """
    began = time.perf_counter()
    limit = options.room_for(len(ids), context)
    cached = cache.keep_prefix_of(ids, model, weights_stamp(model)) if cache is not None else 0
    answer = AnswerText(options, decode_ids)
    prompt = torch.tensor([list(ids)], device=model.device)
    for sequence, reason in decode(model, prompt, options, limit, cache):
        token_id = None if reason == "cancelled" else int(sequence[0, -1])
        text, reason = answer.push(token_id, reason)
        yield GenerationStep(token_id, text, reason, len(ids), cached, answer.tokens, time.perf_counter() - began)
        if reason is not None:
            return
