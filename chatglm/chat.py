"""The chat models: chat() and stream_chat() of each generation, with the originals' signatures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import BatchEncoding, LogitsProcessor, PreTrainedTokenizerBase

from . import registries
from .chat_methods import ChatMixin
from .chat_steps import ChatStep, ShownAnswer, ids_to_text
from .configuration_chatglm import ChatGLM3Config, ChatGLM4Config, ChatGLMConfig
from .conversation.history import has_tools
from .generation import ChatCache
from .modeling_chatglm import ChatGLM1ForCausalLM
from .modeling_chatglm2 import ChatGLM2ForCausalLM

__all__ = [
    "ChatGLM1ForConditionalGeneration",
    "ChatGLM2ForConditionalGeneration",
    "ChatGLM3ForConditionalGeneration",
    "ChatGLM4ForConditionalGeneration",
    "ChatMixin",
    "ChatStep",
    "ShownAnswer",
    "ids_to_text",
]


def _settings(
    max_length: int, do_sample: bool, top_p: float, temperature: float, processors: Sequence[LogitsProcessor] | None
) -> dict[str, Any]:
    """The settings that `chat` and `stream_chat` of every generation name in their signatures."""
    return {
        "max_length": max_length, "do_sample": do_sample, "top_p": top_p, "temperature": temperature,
        "logits_processor": processors or [],
    }  # fmt: skip


class ChatGLM1ForConditionalGeneration(ChatMixin, ChatGLM1ForCausalLM):
    """ChatGLM-6B. History is a list of (question, answer) pairs."""

    sampling_defaults = {"do_sample": True, "top_p": 0.7, "temperature": 0.95}

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Returns the answer and the new history. See `ChatMixin.stream_steps` for the arguments and errors."""
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._chat(tokenizer, query, history, "user", num_beams, kwargs | settings)

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yields the answer so far and the new history; the last item is what `chat` returns."""
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._stream_chat(tokenizer, query, history, "user", **kwargs | settings)

    def process_response(self, response: str) -> str:
        """Returns a decoded answer as the user sees it: the originals' name for `chat_format.clean`."""
        return self.chat_format.clean(response)


class ChatGLM2ForConditionalGeneration(ChatMixin, ChatGLM2ForCausalLM):
    """ChatGLM2-6B. History is a list of (question, answer) pairs."""

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Returns the answer and the new history. See `ChatMixin.stream_steps` for the arguments and errors."""
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._chat(tokenizer, query, history, "user", num_beams, kwargs | settings)

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        past_key_values: ChatCache | None = None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Yields (answer so far, history); with `return_past_key_values`, also the cache for the next turn."""
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._stream_chat(
            tokenizer, query, history, "user", past_key_values, return_past_key_values, **kwargs | settings
        )

    def process_response(self, response: str) -> str:
        """Returns a decoded answer as the user sees it: the originals' name for `chat_format.clean`."""
        return self.chat_format.clean(response)

    def build_inputs(
        self, tokenizer: Any, query: str, history: Sequence[tuple[str, str]] | None = None
    ) -> BatchEncoding:
        """Returns `tokenizer.build_chat_input(query, history)` on the model's device: the whole prompt of a turn."""
        return tokenizer.build_chat_input(query, history).to(self.device)

    def build_stream_inputs(
        self, tokenizer: Any, query: str, history: Sequence[tuple[str, str]] | None = None
    ) -> BatchEncoding:
        """Returns the part of `build_inputs` that follows the last answer: what goes in after a KV cache.

        `position_ids` count from 0, as in the original, so a caller with a cache adds its length. `stream_chat` needs
        none of this: it finds what the cache holds by itself.
        """
        ids = self.chat_format.encode_next_round(tokenizer, query, history)
        inputs = tokenizer.prepare_for_model(
            ids, add_special_tokens=False, return_tensors="pt", prepend_batch_axis=True
        )
        return inputs.to(self.device)


class ChatGLM3ForConditionalGeneration(ChatMixin, ChatGLM2ForCausalLM):
    """ChatGLM3-6B. History is a list of role dicts; with tools in its system message, answers may be tool calls."""

    config: ChatGLM3Config
    config_class = ChatGLM3Config

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[dict[str, Any]] | None = None,
        role: str = "user",
        max_length: int = 8192,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
        """Returns the answer (a dict for a tool call) and the new history.

        See `ChatMixin.stream_steps` for the arguments and errors; `role="observation"` passes on a tool's result.
        """
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._chat(tokenizer, query, history, role, num_beams, kwargs | settings)

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[dict[str, Any]] | None = None,
        role: str = "user",
        past_key_values: ChatCache | None = None,
        max_length: int = 8192,
        do_sample: bool = True,
        top_p: float = 0.8,
        temperature: float = 0.8,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Yields (answer so far, history); with `return_past_key_values`, also the cache for the next turn.

        A tool call is raw text until it is complete; in the last item it is a dict.
        """
        settings = _settings(max_length, do_sample, top_p, temperature, logits_processor)
        return self._stream_chat(
            tokenizer, query, history, role, past_key_values, return_past_key_values, **kwargs | settings
        )

    def process_response(
        self, output: str, history: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
        """Returns the content of a decoded answer and the history with it (see `chat_format.parse`).

        Args:
            output: everything the model wrote after `<|assistant|>`.
            history: with the question; not changed.
        """
        response = self.chat_format.parse(output, has_tools(history))
        return response.content, [*self.chat_format.validate(history), *response.messages]


class ChatGLM4ForConditionalGeneration(ChatGLM3ForConditionalGeneration):
    """GLM-4-9B. As ChatGLM3-6B, with GLM-4's prompts and tools."""

    config: ChatGLM4Config
    config_class = ChatGLM4Config


#: The class of each generation, by the `chatglm_version` of its config; see `chatglm.generations`.
CHAT_MODELS: dict[int, Any] = registries.CHAT_MODELS


def model_class(config: ChatGLMConfig) -> Any:
    """Returns the chat class for a model of this config."""
    return CHAT_MODELS[config.chatglm_version or 0]
