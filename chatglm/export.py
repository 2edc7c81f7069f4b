"""`python -m chatglm.export SOURCE OUT --to FORMAT`: writes a checkpoint in another form.

  merged    a base model and its adapter as one checkpoint of this project
  glm       a folder of transformers' GlmForCausalLM, for vLLM, `transformers serve`, OpenVINO and others
  gguf      a file for llama.cpp, ollama and others; keeps INT4 and INT8 weights exactly
  openvino  a folder for OpenVINO GenAI; installs optimum-intel in an environment of its own at first
  chatglm   the way back from a folder of GlmForCausalLM

`python -m chatglm.export BASE ADAPTER OUT` is short for `BASE OUT --adapter ADAPTER --to merged`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .exports import GGUF_TYPES, OPENVINO_TYPES
from .front.arguments import LibraryError, importing_libraries
from .front.messages import TERMINAL
from .language import choose_language
from .program import complain, put, run, start

__all__ = ["export", "main"]

FORMATS = ("merged", "glm", "gguf", "openvino", "chatglm")
TYPES = {"gguf": GGUF_TYPES, "openvino": OPENVINO_TYPES}  # what --type may be
_LOST = {
    "zh": "重新量化：舍入误差为 LoRA 改动量的 {error:.0%}（0 %：没有损失）",
    "en": "requantised: rounding errs by {error:.0%} of what the LoRA adapter changes (0%: nothing is lost)",
}
_INSTALLING = {
    "zh": "正在安装 optimum-intel 到 {place}（只需一次，下载可达数 GB）",
    "en": "installing optimum-intel in {place} (once; the download can be gigabytes)",
}
#: The last line of the output, by language and format.
_USE = {
    "zh": {
        "merged": "使用：{chat} --model {out}",
        "glm": "使用：vllm serve {out}，或 transformers.AutoModelForCausalLM.from_pretrained",
        "gguf": "使用：llama-cli -m {out}，或在 ollama 的 Modelfile 中写 FROM {out}",
        "openvino": "使用：openvino_genai.LLMPipeline({out}, \"CPU\")",
        "chatglm": "使用：{chat} --model {out}",
    },
    "en": {
        "merged": "use it: {chat} --model {out}",
        "glm": "use it: vllm serve {out}, or transformers.AutoModelForCausalLM.from_pretrained",
        "gguf": "use it: llama-cli -m {out}, or FROM {out} in ollama's Modelfile",
        "openvino": "use it: openvino_genai.LLMPipeline({out}, \"CPU\")",
        "chatglm": "use it: {chat} --model {out}",
    },
}


def export(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    chatglm_version: int | None = None,
    *,
    requantize: bool = False,
    told: Callable[[float], None] | None = None,
) -> Path:
    """`chatglm.loading.export.export`: writes the checkpoint and returns its folder."""
    from . import load as _  # noqa: F401  # registers the generations
    from .loading.export import export

    return export(base, adapter, out, chatglm_version, requantize=requantize, told=told)


def main(arguments: list[str] | None = None, prog: str = "python -m chatglm.export") -> int:
    """Returns the exit status: 0, or 1 if something failed. Wrong arguments raise SystemExit(2)."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or hub id of the model")
    parser.add_argument("adapter_or_out", metavar="[ADAPTER] OUT", nargs="+", help="new folder, with gguf a file")
    parser.add_argument("--to", choices=FORMATS, default="merged", help="default: %(default)s")
    parser.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter (or, with merged, P-tuning prefix) to merge")
    types = "; ".join(f"with {name} {', '.join(kinds)}" for name, kinds in TYPES.items())
    parser.add_argument("--type", metavar="TYPE", help=f"of the matrices: {types}; default: as in SOURCE")
    parser.add_argument(
        "--environment", metavar="FOLDER", type=Path,
        help="with openvino: where optimum-intel is, or is installed; default: the user's cache folder",
    )  # fmt: skip
    parser.add_argument("--chatglm-version", type=int, metavar="N", help="1 to 4: the generation of SOURCE")
    parser.add_argument("--requantize", action="store_true", help="merge LoRA into a quantised SOURCE all the same")
    args = parser.parse_args(arguments)
    *between, out = args.adapter_or_out
    if len(between) > 1 or (between and args.adapter):
        parser.error("give SOURCE and OUT, and at most one adapter")
    adapter = between[0] if between else args.adapter
    if args.to == "merged" and adapter is None:
        parser.error("--to merged needs an adapter to merge")
    if args.requantize and args.to != "merged":
        parser.error("--requantize is for --to merged")
    if args.type and args.type not in TYPES.get(args.to, ()):
        parser.error(f"--type is, {types}")
    if args.environment and args.to != "openvino":
        parser.error("--environment is for --to openvino")
    if args.to == "chatglm" and adapter is not None:
        parser.error("--to chatglm takes no adapter")
    language = choose_language()
    try:
        with importing_libraries(language):
            from . import load as _  # noqa: F401
        target = Path(out).expanduser()
        if args.requantize:
            made = export(args.source, str(adapter), target, args.chatglm_version, requantize=True,
                          told=lambda error: put(_LOST[language].format(error=error)))  # fmt: skip
        else:
            made = _export(args, target, adapter, language)
        put(str(made))
        chat = "python cli_demo.py" if (Path(__file__).parents[1] / "cli_demo.py").is_file() else "chatglm chat"
        quoted = repr(str(made)) if args.to == "openvino" else subprocess.list2cmdline([made])
        print(_USE[language][args.to].format(out=quoted, chat=chat), file=sys.stderr)
    except (OSError, ValueError, RuntimeError, ImportError, LibraryError) as error:
        complain(TERMINAL["error"][language].format(reason=error))
        return 1
    return 0


def _export(args: argparse.Namespace, out: Path, adapter: str | None, language: str) -> Path:
    """Writes `out` and returns it."""
    from safetensors import SafetensorError

    from .checkpoints.adapters import read_adapter
    from .exports.folders import export_chatglm, export_glm
    from .exports.gguf_file import export_gguf
    from .exports.openvino import export_openvino
    from .loading.plan import find_folder

    version: int | None = args.chatglm_version
    if args.to == "merged":
        return export(args.source, str(adapter), out, version)
    if out.exists():
        raise FileExistsError(f"{out} exists already: name a new one, or remove it first")
    folder = find_folder(args.source)
    lora = None if adapter is None else read_adapter(adapter)
    try:
        if args.to == "glm":
            export_glm(folder, out, lora, version, _show)
        elif args.to == "gguf":
            export_gguf(folder, out, args.type, lora, version, _show)
        elif args.to == "openvino":
            export_openvino(
                folder, out, args.type, lora, version, _show, place=args.environment,
                told=lambda place: print(_INSTALLING[language].format(place=place), file=sys.stderr, flush=True),
            )  # fmt: skip
        else:
            export_chatglm(folder, out, _show)
    except SafetensorError as error:
        raise OSError(f"cannot write {out}: {error}") from error
    return out


def _show(name: str, number: int, count: int) -> None:
    """One line of progress on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if number == count else ""
        print(f"\r{number} / {count}  {name[-60:]:60}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    start(main)
