"""`python -m chatglm.export BASE ADAPTER OUT`: a base model and what was trained on it, as one checkpoint.

LoRA is added to the weights, so that PEFT is not needed any more; a P-tuning prefix is stored beside them. OUT is a
whole checkpoint, tokenizer included, that loads like any other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from .adapter_files import Lora, read_adapter, settle
from .adapters.lora import merge_lora
from .checkpoint_files import find_weights
from .configuration_chatglm import ChatGLMConfig
from .loading import find_folder, load
from .messages import TERMINAL, choose_language
from .quantization import settings_of


def export(base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes the checkpoint, in the dtype of the base's files, and returns its folder.

    It is written aside, and renamed once it is whole.

    Raises:
        ValueError: the base is quantised and the adapter is LoRA; see `merge_lora` for others.
        OSError: OUT exists, or cannot be written; see `chatglm.load` for others.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new folder, or remove it first")
    folder = find_folder(base)
    is_lora = isinstance(read_adapter(adapter), Lora)
    quantised = (folder / "config.json").is_file() and settings_of(ChatGLMConfig.from_pretrained(folder))
    if is_lora and quantised:
        raise ValueError(
            f"{folder} is quantised, and rounding its weights again would lose most of what LoRA adds: export with the "
            f"full-precision checkpoint as BASE, then load the result with quantize={quantised.bits}"
        )
    model, tokenizer = load(folder, "cpu", find_weights(folder).dtype, adapter=adapter)
    if is_lora:
        merge_lora(model)
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        settle(aside)
        aside.rename(out)
    except SafetensorError as error:
        raise OSError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 where something failed; SystemExit(2) for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m chatglm.export", description=__doc__)
    parser.add_argument("base", metavar="BASE", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("adapter", metavar="ADAPTER", help="its LoRA adapter or P-tuning prefix")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    args = parser.parse_args(arguments)
    try:
        print(export(args.base, args.adapter, args.out))
    except (OSError, ValueError, RuntimeError) as error:
        print(TERMINAL["error"][choose_language()].format(reason=error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
