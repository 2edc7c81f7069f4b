"""The vocabularies of ChatGLM2 and its successors as the keys of a GGUF file that llama.cpp's tokenizers read."""

from __future__ import annotations

import json
import warnings
from typing import Any

from ..tokenization_chatglm4 import ChatGLM4Tokenizer
from .glm_tokenizer import RENAMED, adds_blank, is_bpe


def add_vocabulary(writer: Any, tokenizer: Any, size: int, stop_token_ids: list[int], template: str | None) -> None:
    """Adds the tokens with their scores and kinds, the special ids and the chat template.

    Args:
        writer: a `gguf.GGUFWriter`
        tokenizer: a `ChatGLM2Tokenizer` or `ChatGLM4Tokenizer`
        size: rows of the embeddings; those beyond the vocabulary become unused tokens
        stop_token_ids: the ids that end an answer, `</s>` first
        template: the chat template, with `<sop>`; None for a model without chat training
    """
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        _add_byte_level(writer, tokenizer, size)
    else:
        _add_sentencepiece(writer, tokenizer, size)
    writer.add_eos_token_id(stop_token_ids[0])
    if len(stop_token_ids) > 1:  # llama.cpp has room for one more
        writer.add_eot_token_id(stop_token_ids[1])
    if template is not None:
        writer.add_chat_template(template)


def _add_byte_level(writer: Any, tokenizer: ChatGLM4Tokenizer, size: int) -> None:
    from gguf import TokenType

    known = len(tokenizer)
    first = known - len(tokenizer.commands)
    tokens = [tokenizer.convert_ids_to_tokens(index) if index < known else f"[PAD{index}]" for index in range(size)]
    kinds = [TokenType.NORMAL] * first + [TokenType.CONTROL] * (known - first) + [TokenType.UNUSED] * (size - known)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("chatglm-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.tokenizer.to_str())["model"]["merges"]])
    writer.add_pad_token_id(tokenizer.pad_token_id)


def _add_sentencepiece(writer: Any, tokenizer: Any, size: int) -> None:
    from gguf import TokenType

    sp = tokenizer.sp_model
    pieces = sp.get_piece_size()
    control = {index: token for token, index in tokenizer.commands.items() if index >= pieces}
    tokens, scores, kinds = [], [], []
    for index in range(size):
        score, kind = 0.0, TokenType.CONTROL
        if index < pieces:
            token, score = sp.id_to_piece(index), sp.get_score(index)
            if sp.is_unknown(index):
                kind = TokenType.UNKNOWN
            elif sp.is_byte(index):
                kind = TokenType.BYTE
            elif not sp.is_control(index):
                kind = TokenType.NORMAL
        elif index in control:
            token = RENAMED.get(control[index], control[index])
        else:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        tokens.append(token.encode())
        scores.append(score)
        kinds.append(kind)
    if not is_bpe(sp):
        warnings.warn(
            "this vocabulary is a unigram model (as the demo's; the published ones are BPE), which llama.cpp does not "
            "have with byte tokens: it will split some texts otherwise",
            stacklevel=3,
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(adds_blank(sp))
    writer.add_bos_token_id(sp.bos_id())
    writer.add_unk_token_id(sp.unk_id())
    writer.add_pad_token_id(sp.unk_id())
