"""A tokenizer's methods for conversations, on top of its chat format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import BatchEncoding
from transformers.utils import get_json_schema

from ..conversation.formats import ChatFormat, chat_format
from ..network.compat import refuse_unknown
from .texts import clean_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer as _Base
else:
    _Base = object


class ChatMethods(_Base):
    """Mixin for `ChatGLMTokenizer`, which has the vocabulary."""

    chatglm_version: int

    @property
    def chat_format(self) -> ChatFormat:
        """The chat format of this generation."""
        return chat_format(self.chatglm_version)

    def build_prompt(self, query: str, history: Sequence[Any] | None = None) -> str:
        """The text of the prompt of generations 1 and 2."""
        return self.chat_format.prompt_text(query, self.chat_format.validate(history, query))

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """The prompt of a chat turn as tensors with a batch of one, ready for the model (see `conversation`)."""
        ids = self.chat_format.encode(self, query, history, role)
        return self.prepare_for_model(ids, add_special_tokens=False, return_tensors="pt", prepend_batch_axis=True)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Role messages (or a batch of such lists) as a prompt, with the ids of `build_chat_input`.

        The format is the model's own. A template passed here, or set as `tokenizer.chat_template`, is rendered by
        transformers instead; control tokens in the template are recognised, those typed by users stay text.

        Generations 1 and 2 have no roles: user and assistant messages alternate, and a system message goes in front of
        the first question. Without `add_generation_prompt`, the end token follows a final answer (unless
        `continue_final_message` is set).

        Args:
            truncation: with `max_length` and `add_generation_prompt`, drops the oldest whole turns.
            return_dict: return masks and positions too, not just the ids.

        Raises:
            TypeError, ValueError: the messages have the wrong shape, the last message alone is longer than
                `max_length`, or the model's own format does not take a keyword.
        """
        if isinstance(conversation, (str, Mapping)) or not len(conversation):
            raise ValueError("an empty conversation, or no message list: pass [{'role': 'user', 'content': '…'}]")
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask is not supported: ChatGLM tokenizers keep no offsets")
        is_batch = not isinstance(conversation[0], Mapping)
        chats = list(conversation) if is_batch else [conversation]
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []] or None
        template = self.chat_template if chat_template is None else chat_template
        is_own = template == self.chat_format.template
        if is_own:  # any other template may read variables of any name
            refuse_unknown("apply_chat_template", kwargs, "return_assistant_tokens_mask")
        if not is_own or documents:
            texts = super().apply_chat_template(
                marked(chats, self._marks) if tokenize else chats,
                tools=tools,
                documents=marked(documents, self._marks) if tokenize else documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
            rows = [self._encode_marked(text) for text in texts] if tokenize else []
        elif tokenize:
            budget = max_length if truncation else None
            end = not continue_final_message
            encode = self.chat_format.encode_chat
            rows = [encode(self, chat, tools, add_generation_prompt, end, budget) for chat in chats]
        else:
            end = not continue_final_message
            texts = [self.chat_format.render_chat(chat, tools, add_generation_prompt, end) for chat in chats]
        if not tokenize:
            return texts if is_batch else texts[0]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        batch: Any = {"input_ids": rows if is_batch or return_tensors else rows[0]}
        encoding = self.pad(batch, padding=padding or False, max_length=max_length, return_tensors=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    @property
    def _marks(self) -> re.Pattern[str]:
        names = filter(None, ["".join(self._typed_start), *self._typed_control_tokens])
        return re.compile("|".join(map(re.escape, names)))

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment, is_token in self._segments(clean_text(text), control=True):
            ids += [self.convert_tokens_to_ids(segment)] if is_token else self.encode_text(segment.replace(MARK, ""))
        return ids


#: A noncharacter code point: put between the letters of control tokens that users have typed, so that they stay text.
MARK = "\ufdd0"


def marked(value: Any, names: re.Pattern[str]) -> Any:
    """The value with marks in every control token of its texts, except roles; one may hold another: [gMASK]<sop>."""
    if isinstance(value, str):
        return names.sub(lambda name: MARK.join(name[0]), value)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else marked(item, names) for key, item in value.items()}
    return [marked(item, names) for item in value] if isinstance(value, (list, tuple)) else value
