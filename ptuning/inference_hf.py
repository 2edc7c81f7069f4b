"""ChatGLM3's `finetune_demo/inference_hf.py`: `python -m ptuning.inference_hf CHECKPOINT --prompt TEXT`.

The checkpoint is a LoRA adapter or a prefix, which knows its base model, or a fully tuned model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import chatglm
from chatglm.checkpoints.file_names import LORA_CONFIG


def main(argv: list[str] | None = None) -> int:
    """Prints the answer; returns the exit status, 1 if the model cannot be loaded."""
    parser = argparse.ArgumentParser("python -m ptuning.inference_hf", description=__doc__)
    parser.add_argument("model_dir", help="a folder that training wrote")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--base", help="the base model, if it is not where training found it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        base = args.base or base_of(Path(args.model_dir))
        model, tokenizer = chatglm.load(
            args.model_dir if base is None else base, args.device, adapter=None if base is None else args.model_dir
        )
        answer, _ = model.chat(tokenizer, args.prompt)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False))
    return 0


def base_of(folder: Path) -> str | None:
    """The base model of an adapter's folder; None if it holds a whole model. Raises OSError or ValueError."""
    lora = folder / LORA_CONFIG
    config = json.loads((lora if lora.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if lora.is_file() and not base:
        raise ValueError(f"{lora} names no base model: give --base")
    return base


if __name__ == "__main__":
    sys.exit(main())
