"""Methods and attributes of tokenizers that transformers 5 has removed or renamed, for programs of 2023."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import BatchEncoding

from ..network.compat import refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer as _Base
else:
    _Base = object


class OldNames(_Base):
    """Mixin for `ChatGLMTokenizer`."""

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """`tokenizer(batch, ...)` under its name of transformers 4, which ChatGLM3's code uses.

        Args:
            batch_text_or_text_pairs: texts, lists of ids, or pairs of either whose second item may be None.
        """
        split = kwargs.get("is_split_into_words", False)
        rows = [row if _is_pair(row, split) else (row, None) for row in batch_text_or_text_pairs]
        return self([first for first, _ in rows], [second for _, second in rows], **kwargs)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True, **old: Any
    ) -> int:
        """As in transformers; also takes `replace_additional_special_tokens`, the keyword's name of transformers 4."""
        replace_extra_special_tokens = old.pop("replace_additional_special_tokens", replace_extra_special_tokens)
        refuse_unknown("add_special_tokens", old)
        added: int = super().add_special_tokens(dict(special_tokens_dict), replace_extra_special_tokens)
        return added

    @property
    def additional_special_tokens(self) -> list[str]:
        """`extra_special_tokens` under its name of transformers 4."""
        return list(self.extra_special_tokens)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[Any]) -> None:
        self.add_special_tokens({"extra_special_tokens": list(tokens)})

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return list(self.convert_tokens_to_ids(self.additional_special_tokens))

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """`tokenizer(text, text_pair, ...)` under its name of transformers 4."""
        return self(text, text_pair, **kwargs)


def _is_pair(row: Any, split: bool) -> bool:
    """Whether a row of a batch is a pair; with `split`, a row of words is one text."""
    if isinstance(row, str) or len(row) != 2 or isinstance(row[0], int):
        return False
    return not split or not isinstance(row[0], str)
