"""lm-evaluation-harness on ChatGLM models: the `lm_eval` command, with our models known to transformers.

    python evaluation/run_lm_eval.py run --model hf --model_args pretrained=FOLDER --tasks TASK,...

Takes all arguments of `lm_eval` (https://github.com/EleutherAI/lm-evaluation-harness). With `import chatglm` alone, the
harness runs generations 2 and 3, but omits the `[gMASK] sop` that starts all of their texts (it uses an end token that
decodes to no text as the start of any text). Generation 1 reads `context [gMASK] <sop> answer`, while the harness takes
the end of `context answer` for the answer. It also stops where a text has the end token's text, which is empty for all
generations, so after one token. `teach` corrects all of this in the harness's model class.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # `chatglm` is there

import chatglm  # registers the models with transformers


def main() -> int:
    """Returns the exit status: 1 if lm_eval is not installed; lm_eval itself raises SystemExit."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        print(f"error: lm-eval is not installed ({error}): pip install 'lm-eval[hf]'", file=sys.stderr)
        return 1
    teach(HFLM)
    cli_evaluate()
    return 0


def teach(model_class: Any) -> None:
    """Makes the harness's class for transformers models encode correctly with our tokenizers."""
    encode, encode_pair, encode_batch = model_class.tok_encode, model_class._encode_pair, model_class.tok_batch_encode
    score, roll, decode = model_class._loglikelihood_tokens, model_class.loglikelihood_rolling, model_class.tok_decode

    def is_v1(model: Any) -> bool:
        return isinstance(model.tokenizer, chatglm.ChatGLM1Tokenizer)

    def tok_encode(self: Any, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and hasattr(self.tokenizer, "chatglm_version"):
            add_special_tokens = "[gMASK]" not in string  # the chat template has added it
        ids: list[int] = encode(self, string, add_special_tokens=add_special_tokens, **kwargs)
        return ids

    def tok_decode(self: Any, tokens: Any, skip_special_tokens: bool = True) -> str:
        text: str = decode(self, tokens, skip_special_tokens=skip_special_tokens)
        is_end = isinstance(tokens, int) and tokens == self.tokenizer.eos_token_id
        return text or (str(self.tokenizer.eos_token) if is_end else "")

    def _encode_pair(self: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not is_v1(self):
            context_ids, answer_ids = encode_pair(self, context, continuation)
            return context_ids, answer_ids
        return self.tok_encode(context), self.tokenizer.encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self: Any, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        if is_v1(self):  # the harness passes an empty context as one token
            empty = self.tokenizer.encode("")
            sop = empty[-1]
            requests = [
                (texts, context if sop in context[1:] else empty, answer) for texts, context, answer in requests
            ]
        return score(self, requests, *args, **kwargs)

    def loglikelihood_rolling(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_v1(self):
            raise ValueError("the perplexity of running text is not defined for ChatGLM-6B, which answers a context")
        return roll(self, *args, **kwargs)

    def tok_batch_encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = encode_batch(self, *args, **kwargs)
        if mask.dim() == 4:  # (batch, 1, tokens, tokens), True = hidden, which the harness cannot shorten
            mask = (~mask[:, 0, -1, -ids.shape[1] :]).long()
        return ids, mask

    model_class.tok_encode, model_class.tok_decode = tok_encode, tok_decode
    model_class._encode_pair = _encode_pair
    model_class._loglikelihood_tokens = _loglikelihood_tokens
    model_class.loglikelihood_rolling = loglikelihood_rolling
    model_class.tok_batch_encode = tok_batch_encode


if __name__ == "__main__":
    sys.exit(main())
