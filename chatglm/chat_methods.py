"""The methods of every chat model: prepare a turn, answer it step by step, keep the cache of the last turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from .chat_steps import ChatStep, ShownAnswer, ids_to_text
from .conversation.formats import ChatFormat, chat_format
from .decoding.options import without_neutral
from .generation import (
    DEFAULT_TOP_K,
    ChatCache,
    GenerationOptions,
    GenerationStep,
    decode,
    generate_text,
    weights_stamp,
)
from .network import compat

#: Tokens reserved for the answer when old turns are dropped, at most a quarter of the context.
ANSWER_ROOM = 512

#: Sampling options that a checkpoint's generation_config.json may set; the published checkpoints set none.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ChatMixin:
    """Conversation methods for a model with `generate`, `positions_from` and `reusable_prefix`."""

    #: The defaults of `stream_steps`: those of the generation's `chat`.
    sampling_defaults: ClassVar[dict[str, Any]] = {"do_sample": True, "top_p": 0.8, "temperature": 0.8}
    #: Keywords of a turn that are no `GenerationOptions`, and that `_fit` takes.
    turn_keywords: ClassVar[frozenset[str]] = frozenset()

    #: Options of every answer, unless a call gives others: how programs let all of their answers be guessed ahead.
    default_options: Mapping[str, Any] = MappingProxyType({})

    @property
    def chat_format(self) -> ChatFormat:
        """The format of this generation's conversations."""
        return chat_format(self.config.chatglm_version)  # type: ignore[attr-defined]

    def clear_chat_cache(self) -> None:
        """Frees the KV cache of the last turn."""
        self.__dict__.pop("_last_turn", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_last_turn"}

    def train(self, mode: bool = True) -> Any:
        self.clear_chat_cache()
        return super().train(mode)  # type: ignore[misc]

    def stream_steps(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        *,
        past_key_values: ChatCache | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        answer_room: int | None = None,
        cancel: threading.Event | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatStep]:
        """Generates one answer step by step, with its finish reason, token counts and times. The front doors use it.

        Args:
            history: the `history` of the last step of the turn before; not changed.
            past_key_values: the cache to reuse and extend; by default the model keeps the last turn's.
            max_length: most tokens of prompt and answer together; the default and the maximum are the model's context
                length. The oldest turns are dropped to leave room for an answer; the question and a system message
                stay.
            max_new_tokens: most tokens of the answer.
            answer_room: tokens to reserve for the answer when turns are dropped; by default `max_new_tokens` or 512,
                at most a quarter of `max_length`. 1 keeps all that fits, as the originals did.
            cancel: set it to end the answer early with the reason "cancelled"; the text so far stays.
            **kwargs: see `GenerationOptions`.

        Raises:
            TypeError, ValueError: the history is malformed, an option is unknown or out of range, or the question
                does not fit into `max_length`.
            NonFiniteLogitsError: the network gave NaN or infinite logits.
        """
        ids, options = self.prepare_turn(
            tokenizer, query, history, role,
            max_length=max_length, max_new_tokens=max_new_tokens, answer_room=answer_room, cancel=cancel, **kwargs,
        )  # fmt: skip
        shown = ShownAnswer(tokenizer, query, history, role)
        cache: ChatCache | None = past_key_values if past_key_values is not None else self._take_last_turn()
        if not options.use_cache:
            cache = None
        elif not isinstance(cache, ChatCache):
            raise TypeError(
                f"past_key_values must be what chat or stream_chat returned (a ChatCache), not {type(cache).__name__}"
            )
        steps = generate_text(self, ids, options, ids_to_text(tokenizer), self._context(), cache)
        try:
            for step in steps:
                yield shown.step(step)
        finally:
            if cache is not None and past_key_values is None:
                self.__dict__["_last_turn"] = cache

    def prepare_turn(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        *,
        answer_room: int | None = None,
        **kwargs: Any,
    ) -> tuple[list[int], GenerationOptions]:
        """Returns the prompt's ids and the options for the arguments of `stream_steps`."""
        turn = {name: kwargs.pop(name) for name in self.turn_keywords & kwargs.keys()}
        options = self.turn_options(tokenizer, **kwargs)
        return self._fit(tokenizer, query, history, role, options, answer_room, turn), options

    def complete_steps(
        self, tokenizer: PreTrainedTokenizerBase, text: str, **kwargs: Any
    ) -> Iterator[GenerationStep]:
        """Continues a text step by step, without the form of a chat: for base models and models of code.

        Args:
            text: what the continuation follows; for CodeGeeX2, its first line names the language: `# language: Python`.
            **kwargs: see `GenerationOptions`; the defaults are those of `stream_steps`.

        Raises:
            TypeError, ValueError: an option is unknown or out of range, or the text does not fit into the context.
            NonFiniteLogitsError: the network gave NaN or infinite logits.
        """
        self._check_tokenizer(tokenizer)
        options = self._options(tokenizer, kwargs)
        ids = tokenizer(text)["input_ids"]
        yield from generate_text(self, ids, options, ids_to_text(tokenizer), self._context())

    def turn_options(self, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> GenerationOptions:
        """Returns the options of `stream_steps`: as given, else from generation_config.json, else as `chat` has them.

        Raises as `stream_steps` if the model cannot chat.
        """
        self._check_chat(tokenizer)
        return self._options(tokenizer, kwargs)

    def _options(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> GenerationOptions:
        own = {name: getattr(self.generation_config, name, None) for name in SAMPLING}  # type: ignore[attr-defined]
        defaults = self.sampling_defaults | {
            "eos_token_id": self.chat_format.stop_token_ids(tokenizer),
            "top_k": DEFAULT_TOP_K,
        }
        defaults |= {name: value for name, value in own.items() if value is not None}
        given = {name: value for name, value in kwargs.items() if value is not None}
        if not given.keys() & {"prompt_lookup_num_tokens", "assistant_model", "use_cache"}:
            defaults |= self.default_options
        return GenerationOptions.from_config(GenerationConfig(), **(defaults | given))

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        version = getattr(tokenizer, "chatglm_version", None)
        ours = self.config.chatglm_version  # type: ignore[attr-defined]
        if version is None:
            raise TypeError(f"{type(tokenizer).__name__} is not a ChatGLM tokenizer: load it from the model's folder")
        if version != ours:
            raise ValueError(f"the tokenizer is of ChatGLM generation {version}, the model of generation {ours}")

    def _check_chat(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._check_tokenizer(tokenizer)
        if getattr(self.config, "is_base_model", False):  # type: ignore[attr-defined]
            raise ValueError(
                "this is a base model without chat training: complete texts with cli_demo.py --complete, "
                "model.complete_steps() or model.generate(), or set model.config.is_base_model = False to chat anyway"
            )

    def _context(self) -> int:
        return self.config.max_position_embeddings  # type: ignore[attr-defined]

    def _fit(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        options: GenerationOptions,
        answer_room: int | None,
        turn: Mapping[str, Any],
    ) -> list[int]:
        """Returns the ids of the prompt.

        Args:
            turn: those of `turn_keywords` that were given.
        """
        return self._fit_to(self.chat_format, tokenizer, query, history, role, options, answer_room)

    def _fit_to(
        self,
        chat_format: ChatFormat,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        options: GenerationOptions,
        answer_room: int | None,
    ) -> list[int]:
        limit = min(options.max_length or self._context(), self._context())
        room = answer_room or min(options.max_new_tokens or ANSWER_ROOM, limit // 4)
        try:
            return chat_format.fit(tokenizer, query, history, limit - room, role)[0]
        except ValueError:
            # The question may use the room reserved for the answer, as long as one token is left.
            return chat_format.fit(tokenizer, query, history, limit - 1, role)[0]

    def _take_last_turn(self) -> ChatCache:
        # Taken out while in use: a second thread then starts with an empty cache instead of sharing this one.
        cache = self.__dict__.pop("_last_turn", None)
        # Not one of a class that a notebook has reloaded since.
        kept = isinstance(cache, ChatCache) and cache.kv_cache_dtype == self.kv_cache_dtype  # type: ignore[attr-defined]
        return cache if kept else self._new_cache()

    def _new_cache(self) -> ChatCache:
        return ChatCache(weights_stamp(self), self.kv_cache_dtype)  # type: ignore[attr-defined]

    def _chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        num_beams: int,
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Any]]:
        """Generates a whole answer: by the decode loop, or by transformers' `generate` for options that only it has."""
        kwargs = without_neutral(kwargs)
        beyond = set(kwargs) - GenerationOptions.names() - self.turn_keywords - {"past_key_values", "answer_room"}
        if (num_beams != 1 or beyond) and kwargs.get("past_key_values") is not None:
            names = ", ".join(sorted(beyond)) or "num_beams"
            raise ValueError(f"past_key_values works with the options of stream_chat, not with {names}")
        if num_beams == 1 and not beyond:
            *_, last = self.stream_steps(tokenizer, query, history, role, **kwargs)
            return last.response, last.history
        self._check_chat(tokenizer)
        seed, answer_room = kwargs.pop("seed", None), kwargs.pop("answer_room", None)
        turn = {name: kwargs.pop(name) for name in self.turn_keywords & kwargs.keys()}
        checked = GenerationOptions(
            **{name: value for name, value in kwargs.items() if name in GenerationOptions.names()}
        )
        ids = self._fit(tokenizer, query, history, role, checked, answer_room, turn)
        given = {name: value for name, value in kwargs.items() if value is not None and name != "cancel"}
        given["logits_processor"] = list(given.get("logits_processor") or [])
        if not checked.do_sample:
            given = {name: value for name, value in given.items() if name not in ("temperature", "top_p", "top_k")}
        given |= {"do_sample": checked.do_sample, "num_beams": num_beams}
        given.setdefault("eos_token_id", self.chat_format.stop_token_ids(tokenizer))
        given["max_length"] = checked.length_limit(len(ids), self._context())
        given.pop("max_new_tokens", None)
        if checked.min_new_tokens is not None:
            given["min_new_tokens"] = checked.min_new_tokens
        given |= checked.prompt_inputs(0)
        inputs = torch.tensor([ids], device=self.device)  # type: ignore[attr-defined]
        began = time.perf_counter()
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            output = self.generate(inputs, attention_mask=torch.ones_like(inputs), **given)  # type: ignore[attr-defined]
        spoken = output[0].tolist()[len(ids) :]
        stops = given["eos_token_id"]
        text = ids_to_text(tokenizer)([token for token in spoken if token not in stops])
        whole = GenerationStep(None, text, "stop", len(ids), 0, len(spoken), time.perf_counter() - began)
        last = ShownAnswer(tokenizer, query, history, role).step(whole)
        return last.response, last.history

    def _stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: Sequence[Any] | None,
        role: str,
        past_key_values: ChatCache | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        if return_past_key_values and past_key_values is None:
            past_key_values = self._new_cache()
        before = None
        for step in self.stream_steps(tokenizer, query, history, role, past_key_values=past_key_values, **kwargs):
            if step.response in ("", before) and step.finish_reason is None:
                continue  # nothing new to show: part of a character, or whitespace
            before = step.response
            if return_past_key_values:
                yield step.response, step.history, past_key_values
            else:
                yield step.response, step.history

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Any = None,
        return_past_key_values: bool = False,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Yields the sequences after every new token.

        Args:
            input_ids: (batch, tokens), left-padded with an `attention_mask` if the rows differ in length.
            **kwargs: see `GenerationOptions`; they override `generation_config` and the model's own.

        Yields:
            (batch, tokens so far), the last one with the token that ended it; with `return_past_key_values` also the
            cache.
        """
        positions = kwargs.pop("position_ids", None)
        for name in compat.CACHE_NAMES:
            if kwargs.pop(name, None) is not None:
                raise ValueError("stream_generate starts from input_ids; to continue from a cache, use stream_chat")
        if attention_mask is not None and attention_mask.dim() == 4:  # as the tokenizer of generation 1 makes it
            attention_mask = (~attention_mask[:, 0, -1].bool()).long()
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        own = generation_config if generation_config is not None else self.generation_config  # type: ignore[attr-defined]
        limits = {name: kwargs.pop(name, getattr(own, name, None)) for name in ("max_length", "max_new_tokens")}
        if limits["max_new_tokens"] is not None:
            limits["max_length"] = None  # as in transformers, max_new_tokens takes precedence
        options = GenerationOptions.from_config(
            own,
            **({"do_sample": bool(own.do_sample)} | kwargs),
            **limits,
            logits_processor=logits_processor or [],
            stopping_criteria=stopping_criteria or [],
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        )
        input_ids = input_ids.to(self.device)  # type: ignore[attr-defined]
        if attention_mask is not None:
            attention_mask = attention_mask.to(input_ids.device)
        if positions is not None:
            counted = self.positions_from(input_ids, 0, attention_mask)  # type: ignore[attr-defined]
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            wrong = (positions.to(input_ids.device) != counted) & (real if counted.dim() == 2 else real[:, None]).bool()
            if bool(wrong.any()):
                raise ValueError("position_ids are computed from input_ids and attention_mask: leave them out")
        cache = self._new_cache() if options.use_cache else None
        limit = options.length_limit(input_ids.shape[1], self._context())
        for sequence, _ in decode(self, input_ids, options, limit, cache, attention_mask):
            yield (sequence, cache) if return_past_key_values else sequence
