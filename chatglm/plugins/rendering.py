"""Tokenizers for engines that render a chat as text and encode the text afterwards."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from ..tokenization_chatglm import ChatGLMTokenizer
from ..tokenizers.chat_methods import MARK, marked
from .configs import ServedConfig


class RendersAsText:
    """Mixin: encoding the text of `apply_chat_template(tokenize=False)` gives the ids of `tokenize=True`.

    The text has its control tokens by name, so they are recognised in every text that is encoded. Those that a user
    typed carry a mark, a noncharacter, by which they are known for text; it is not encoded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "split_special_tokens": False})

    def apply_chat_template(self, conversation: Any, tools: Any = None, *, tokenize: bool = True, **kwargs: Any) -> Any:
        base: Any = super()
        if not tokenize:
            marks = base._marks
            conversation, tools = marked(conversation, marks), marked(tools, marks)
        return base.apply_chat_template(conversation, tools, tokenize=tokenize, **kwargs)

    def _tokenize(self, text: str) -> list[str]:
        base: Any = super()
        pieces: list[str] = base._tokenize(text.replace(MARK, ""))
        return pieces


def render_as_text(generations: tuple[int, ...] = (2, 3, 4)) -> None:
    """Gives the tokenizers of these generations, as `ChatGLMTokenizer` loads them from now on, the mixin."""
    for generation in generations:
        kind = ChatGLMTokenizer.classes[generation]
        if not issubclass(kind, RendersAsText):
            ChatGLMTokenizer.classes[generation] = type(kind.__name__, (RendersAsText, kind), {"__module__": __name__})
    # GLM-4's files name this class. For the config class of a model, transformers would prefer a folder's own code.
    AutoTokenizer.register(ServedConfig, ChatGLMTokenizer.classes[4], exist_ok=True)
