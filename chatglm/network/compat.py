"""Differences between the supported releases of transformers, and the keywords that a forward takes.

transformers 5.24 renamed the KV cache of models from `past_key_values` to `cache`: in forwards, in outputs and in the
mask functions. We take both names everywhere and pass on the one that the release knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from ..cache import ChatCache

logger = logging.get_logger(__name__)

#: Both names of the KV cache, for the lists of names that transformers and accelerate read.
CACHE_NAMES = ("past_key_values", "cache")

#: The name that this release of transformers uses in forwards, outputs and mask functions.
CACHE_NAME = next(
    field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES
)

#: Keywords that a forward takes besides its own parameters. Any other is a TypeError: an ignored keyword may be the KV
#: cache under a new name, and the text would be wrong without an error.
FORWARD_KEYWORDS = {
    "output_attentions": "read by transformers' capture_outputs",
    "output_hidden_states": "read by transformers' capture_outputs",
    "debug_io": "read by transformers' merge_with_config_defaults",
    "debug_io_dir": "read by transformers' merge_with_config_defaults",
    "prune_layers": "read by transformers' merge_with_config_defaults",
    "tokenizer": "belongs to stop_strings: generate reads it, and passes it on to the model",
    "num_items_in_batch": "read by the loss: the divisor of the sum over a batch that is accumulated in several steps",
}

#: Boundaries of packed sequences: flash attention reads them by itself, for sdpa and eager see `network/packed.py`.
PACKING_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def check_keywords(function: str, given: Iterable[str], attention: str | None) -> None:
    """Raises TypeError, as Python does, for a keyword that the forward named `function` would ignore.

    Args:
        attention: the model's attention implementation.
    """
    packing = PACKING_KEYWORDS if attention in ("sdpa", "eager") or "flash" in (attention or "") else ()
    refuse_unknown(function, given, *FORWARD_KEYWORDS, *packing)


#: Keywords of transformers 4 that are gone, and what to write today.
TODAY = {
    "use_flash_attention_2": 'attn_implementation="flash_attention_2"',
    "torchscript": "return_dict=False",
    "pad_to_max_length": 'padding="max_length"',
    "mirror": "the address of the mirror into the environment variable HF_ENDPOINT",
}


def refuse_unknown(function: str, given: Iterable[str], *known: str) -> None:
    """Raises TypeError, as Python does, for a keyword of `given` that is not in `known`; transformers ignores those.

    The message says what to write for a keyword of transformers 4.
    """
    for name in given:
        if name not in known:
            today = f": it is gone from transformers 5, write {TODAY[name]}" if name in TODAY else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{today}")


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The KV cache of a call, under either name. Raises ValueError if the two names hold different caches."""
    if cache is None or past_key_values is cache:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give only one of them")
    return cache


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The KV cache under this release's keyword, for its outputs, mask functions and `GenerationMixin`."""
    return {CACHE_NAME: cache}


def cache_of(outputs: Any) -> Cache | None:
    """The KV cache in the output of a forward."""
    return outputs.get(CACHE_NAME)


def causal_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    *,
    allow_is_causal_skip: bool,
) -> Any:
    """transformers' `create_causal_mask`, with the cache under this release's keyword."""
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **named_cache(cache),
    )


def take_old_hub_keywords(kwargs: dict[str, Any]) -> None:
    """Translates keywords of `from_pretrained` that transformers 5 removed, in place."""
    kwargs.pop("resume_download", None)  # downloads always resume today
    token = kwargs.pop("use_auth_token", None)
    if token is not None:
        kwargs.setdefault("token", token)
    for name in TODAY:
        if name in kwargs and not kwargs[name]:
            del kwargs[name]  # asks for nothing
    refuse_unknown("from_pretrained", TODAY.keys() & kwargs.keys())


class NoCodeToSave:
    """Mixin: `register_for_auto_class` does nothing and says so.

    In transformers, it makes `save_pretrained` copy the class's file, which would not work without its package.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "") -> None:
        logger.warning(
            f"{cls.__name__}: no code is saved with the model, so register_for_auto_class() does nothing; "
            "programs load what you save after `import chatglm`"
        )


class ChatGLMGenerationMixin(GenerationMixin):
    """transformers' `generate`, which takes the KV cache under either name on every release.

    The inputs of its steps hold it as `past_key_values`: PEFT's prompt methods look for it, and replace it, under
    that name whatever the release.
    """

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        cache = given_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        kind = getattr(self, "kv_cache_dtype", "auto")
        if cache is None and kind != "auto" and kwargs.get("use_cache") is not False:
            cache = ChatCache(kv_cache_dtype=kind)
        if cache is not None:
            kwargs |= named_cache(cache)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **named_cache(given_cache(past_key_values, cache)),
            **kwargs,
        )
        if CACHE_NAME in model_inputs:
            model_inputs["past_key_values"] = model_inputs.pop(CACHE_NAME)
        return model_inputs
