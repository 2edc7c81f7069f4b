"""Fields that clients of OpenAI and of other servers send: accepted where they ask for nothing, else refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ApiError

#: Keys of a request that are only hints to a provider: they change no answer, whatever their value.
HINTS = frozenset({"prompt_cache_key", "prompt_cache_retention", "safety_identifier"})

#: Field of a request -> the values that ask for nothing. Null asks for nothing in every field.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "modalities": (["text"], []),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    # vLLM, SGLang, transformers
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "ignore_eos": (False,),
    "include_reasoning": (False, True),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "priority": (0,),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "use_cache": (True,),
    # llama.cpp, ollama, Mistral, Qwen
    "cache_prompt": (True, False),
    "enable_search": (False,),
    "enable_thinking": (False,),
    "grammar": ("",),
    "keep_alive": ("",),
    "mirostat": (0,),
    "options": ({},),
    "random_seed": (),
    "safe_prompt": (False,),
    "tfs_z": (1,),
    "thinking": ({"type": "disabled"},),
}

#: Keys with which chat programs keep their own records in messages. Reasoning of earlier turns is no part of a prompt.
RECORDS = frozenset(
    {
        "avatar", "cache_control", "conversationId", "created", "createdAt", "created_at", "date", "id", "index", "key",
        "model", "modelName", "object", "parentId", "parent_id", "reasoning", "reasoning_content", "reasoning_details",
        "sources", "status", "time", "timestamp", "updatedAt", "updated_at", "usage", "uuid",
    }
)  # fmt: skip


def without_neutral(values: Any, known: Collection[str]) -> Any:
    """Returns a request's fields without those that are not `known` and ask for nothing.

    Raises:
        ApiError: (400) a field asks for something that this server does not do.
    """
    if not isinstance(values, Mapping):
        return values
    kept = {}
    for name, value in values.items():
        if name in known:
            kept[name] = value
        elif name in NEUTRAL and not (value is None or value in NEUTRAL[name]):
            reason = f"this server does not support {name} = {_shown(value)}: leave the field out"
            raise ApiError(400, reason, param=name, code="unsupported_parameter")
        elif not (value is None or name in HINTS or name in NEUTRAL):
            kept[name] = value  # an unknown field, which is an error
    return kept


def without_records(values: Any, known: Collection[str]) -> Any:
    """Returns a message or a part of one without a chat program's own records and without empty unknown fields."""
    if not isinstance(values, Mapping):
        return values
    return {
        name: value
        for name, value in values.items()
        if name in known or not (name in RECORDS or value is None or value in ("", [], {}, False))
    }


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
