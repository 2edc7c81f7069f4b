"""The engine for conversations: questions and histories in, the steps of `stream_steps` out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat import ChatStep, ShownAnswer, ids_to_text
from ..engine import AS_LOADED, AdapterName, Engine, PromptTooLongError, Stream, Waiting


class ChatEngine(Engine):
    """An `Engine` that knows the tokenizer of its model.

    Args:
        **sizes: `max_batch`, `max_queue` and `cache_tokens` of `Engine`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **sizes: Any) -> None:
        self.tokenizer = tokenizer
        self._longest_piece = max(map(len, tokenizer.token_pieces()))
        super().__init__(model, ids_to_text(tokenizer), **sizes)

    def __enter__(self) -> ChatEngine:
        return self

    def check_size(self, text: str) -> None:
        """Raises PromptTooLongError for a text that cannot fit into the context, before it is made into tokens."""
        least = -(-len(text.encode()) // self._longest_piece)
        if least > self.context:
            reason = f"the prompt has at least {least} tokens and the limit for prompt and answer together is"
            raise PromptTooLongError(f"{reason} {self.context}: shorten it")

    def chat(
        self,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        adapter: AdapterName = AS_LOADED,
        **settings: Any,
    ) -> Iterator[ChatStep]:
        """Like `model.stream_steps`, with the same arguments and steps, but together with other requests.

        Submits the request at once; closing the iterator cancels it. Raises as `stream_steps` and `submit_all`.
        """
        stream, shown = self._start(query, history, role, adapter, settings)
        return _shown_steps(stream, shown)

    def chat_in_queue(
        self,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        adapter: AdapterName = AS_LOADED,
        **settings: Any,
    ) -> Iterator[Waiting | ChatStep]:
        """Like `chat`; while the request waits in the queue, also says how many come before it."""
        stream, shown = self._start(query, history, role, adapter, settings)
        return _places_and_steps(stream, shown)

    def _start(
        self, query: str, history: Sequence[Any] | None, role: str, adapter: AdapterName, settings: dict[str, Any]
    ) -> tuple[Stream, ShownAnswer]:
        ids, options = self.model.prepare_turn(self.tokenizer, query, history, role, **settings)
        shown = ShownAnswer(self.tokenizer, query, history, role)
        return self.submit(ids, options, adapter=adapter), shown


def _shown_steps(stream: Stream, shown: ShownAnswer) -> Iterator[ChatStep]:
    with stream:
        for step in stream:
            yield shown.step(step)


def _places_and_steps(stream: Stream, shown: ShownAnswer) -> Iterator[Waiting | ChatStep]:
    with stream:
        yield from stream.queue()
        yield from _shown_steps(stream, shown)
