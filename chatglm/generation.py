"""The decode loop: turns a prompt's ids into an answer token by token, with a KV cache that is kept between turns."""

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
from .decoding.guessing import guess_ahead
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

#: On a CPU, prompts are read in chunks of this many tokens: larger chunks take more memory and save no time.
CPU_PROMPT_TOKENS = 256


def weights_stamp(model: PreTrainedModel) -> object:
    """Returns a value that changes when weights are replaced, moved, cast or trained, or another adapter is used.

    The change makes older KV caches invalid.
    """
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        return object()
    # Offloaded weights are loaded again for each use; between uses a placeholder on the meta device stands for them.
    state = tuple((one.data_ptr(), 0 if one.is_meta else one._version) for one in parameters)
    return hash(state), switching.stamp(model)


def piece_end(model: PreTrainedModel, ids: torch.Tensor, start: int) -> int:
    """Returns the end of the chunk of the prompt `ids` (1, tokens) that the next forward should read from `start`."""
    tokens = ids.shape[1]
    if ids.device.type != "cpu" or tokens - start <= CPU_PROMPT_TOKENS:
        return tokens
    end = start + CPU_PROMPT_TOKENS
    return end if is_piece(model, ids[0].tolist(), end) else tokens


def is_piece(model: PreTrainedModel, ids: list[int], end: int) -> bool:
    """Whether the first `end` tokens of a prompt may be read before the others: in generation 1, whose context is read
    in both directions, only with the `<sop>` that ends it."""
    end = max(end, 1)  # of no tokens, all could be reused in every generation
    return bool(model.reusable_prefix(ids, end) == end)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    options: GenerationOptions,
    limit: int,
    cache: ChatCache | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, FinishReason | None]]:
    """Runs the decode loop: yields the sequences after every new token, and why they ended.

    Args:
        input_ids: (batch, tokens), left-padded if the rows differ in length.
        limit: number of tokens of a sequence, prompt included, at which to end with "length".
        cache: already holds the first tokens of a single sequence (see `ChatCache.keep_prefix_of`).
        attention_mask: (batch, tokens), 0 for padding.

    Yields:
        (batch, tokens so far) with the new token last. A cancelled run yields the unchanged sequences once.

    Raises:
        NonFiniteLogitsError: the network gave NaN or infinite logits.
        ValueError: several sequences are to be guessed ahead.
    """
    ids = input_ids
    batch_size = len(ids)
    chooser = TokenChooser(model, options, ids.shape[1], limit, ids.device, batch_size)
    if cache is None and options.use_cache:
        cache = ChatCache(kv_cache_dtype=getattr(model, "kv_cache_dtype", "auto"))
    start = len(cache.token_ids) if cache is not None else 0
    if options.guesses and (batch_size > 1 or attention_mask is not None):
        raise ValueError("prompt_lookup_num_tokens and assistant_model take one sequence without padding at a time")
    ahead = guess_ahead(model, options, piece_end)
    known = ids[0].tolist()  # the sequence, for guesses
    read_prompt = False
    while True:
        if options.cancel is not None and options.cancel.is_set():
            yield ids, "cancelled"
            return
        end = ids.shape[1]
        if cache is not None and batch_size == 1 and attention_mask is None:
            end = piece_end(model, ids, start)
        began, guess = time.perf_counter(), list[int]()
        if ahead is not None and read_prompt:
            guess = ahead.guess(known, limit - ids.shape[1] - 1)
        fed = torch.cat((ids, ids.new_tensor([guess])), dim=-1) if guess else ids
        end += len(guess)
        outputs = model(
            input_ids=fed[:, start:end],
            position_ids=model.positions_from(fed, start, attention_mask)[..., : end - start],
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 + len(guess),
            **options.prompt_inputs(start),
        )
        if cache is not None:
            if batch_size == 1:
                cache.token_ids += fed[0, start:end].tolist()
            start = end
            if end < ids.shape[1]:
                continue
        scores = outputs.logits[:, -1 - len(guess) :].float().to(ids.device)
        for place, guessed in enumerate([*guess, None]):
            choice = chooser.choose(ids, scores[:, place])
            ids = torch.cat((ids, choice.tokens), dim=-1)
            known.append(choice.token_ids[0])
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch_size, 1)), dim=-1)
            is_last = guessed is None or choice.token_ids[0] != guessed
            if is_last and cache is not None and place < len(guess):  # the other guesses were wrong
                start -= len(guess) - place
                cache.shorten(start)
            if is_last and ahead is not None and read_prompt:
                ahead.took(len(guess), place, time.perf_counter() - began)
            yield ids, choice.finish_reason
            if choice.finish_reason is not None:
                return
            if is_last:
                break
        read_prompt = True


def generate_text(
    model: PreTrainedModel,
    ids: Sequence[int],
    options: GenerationOptions,
    decode_ids: Callable[[list[int]], str],
    context: int | None = None,
    cache: ChatCache | None = None,
) -> Iterator[GenerationStep]:
    """Generates one answer to the prompt `ids`, step by step.

    Args:
        decode_ids: ids of the answer -> text, without clean-up. A prefix of the ids must give a prefix of the text.
        context: the model's context length in tokens, or None.
        cache: of an earlier turn; its common prefix with `ids` is not computed again.

    Raises:
        ValueError: the prompt leaves no room for a token.
        NonFiniteLogitsError: the network gave NaN or infinite logits.
    """
    began = time.perf_counter()
    limit = options.room_for(len(ids), context)
    stamp = weights_stamp(model) if options.picture is None else (weights_stamp(model), options.picture.key)
    cached = cache.keep_prefix_of(ids, model, stamp) if cache is not None else 0
    answer = AnswerText(options, decode_ids)
    prompt = torch.tensor([list(ids)], device=model.device)
    for sequence, reason in decode(model, prompt, options, limit, cache):
        token_id = None if reason == "cancelled" else int(sequence[0, -1])
        text, reason = answer.push(token_id, reason)
        yield GenerationStep(token_id, text, reason, len(ids), cached, answer.tokens, time.perf_counter() - began)
        if reason is not None:
            return
