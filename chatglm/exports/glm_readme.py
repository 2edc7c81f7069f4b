"""The README of an exported folder: the commands that run it."""

from __future__ import annotations

_TEXT = """# {name} as `GlmForCausalLM`

Weights and vocabulary of {name}, under the names that transformers' own `glm` model has. The logits are those of the
original; the license of the original weights applies.

## Run it

With transformers 4.46 or later:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
messages = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

As a server with OpenAI's routes:

```bash
vllm serve FOLDER                            # one GPU
vllm serve FOLDER --tensor-parallel-size 2   # two GPUs
transformers serve --continuous-batching     # name FOLDER as the model of the requests
```

The context has {context} tokens.

## Text that looks like a control token

These engines tokenise the rendered prompt as a whole, so `<|user|>` or `[gMASK]` typed by a user becomes a control
token. Remove such names from what users send, in front of the server. The server of the original project encodes
messages one by one and does not have this weakness.
"""


def readme(name: str, context: int) -> str:
    """The text for a model of this name and length of context (tokens)."""
    return _TEXT.format(name=name, context=context)
