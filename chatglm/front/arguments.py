"""Command-line arguments that the front doors share, and the checks of their values, which `/set` also uses."""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..language import choose_language
from ..program import complain, importing
from .messages import TERMINAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizer

CLONE = Path(__file__).resolve().parents[2]  # where there is one: installed from a wheel, the folder of all packages


#: Seconds of quantising from which on a line says how to do so only once.
SLOW_START = 5.0


class LibraryError(ImportError):
    """What a program needs is not installed or cannot be imported; the message is one line."""


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must be 0 or more")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError("must be 0 or more")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("must be from 0 to 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError("must be 0 (greedy) or more")
    return value


#: Name of a generation setting -> parser of its text, which raises ValueError. Unset means: the model's own default.
SETTINGS: dict[str, Callable[[str], int | float]] = {
    "max_length": _positive_int,
    "max_new_tokens": _positive_int,
    "top_p": _probability,
    "temperature": _temperature,
    "seed": _seed,
}
_HELP = {
    "max_length": "most tokens of prompt and answer together; the oldest turns are dropped to stay within it",
    "max_new_tokens": "most tokens of one answer",
    "top_p": "sample only from the likeliest tokens that together have this probability",
    "temperature": "0 = always the likeliest token; higher = more varied",
    "seed": "the same seed gives the same answers",
}


def parse_setting(name: str, text: str) -> tuple[str, int | float]:
    """`("max-length", "512")` -> `("max_length", 512)`; ValueError says what is wrong with the name or the value."""
    key = name.replace("-", "_")
    if key not in SETTINGS:
        raise ValueError(f"there is no setting {name!r}, only {', '.join(SETTINGS)}")
    return key, _parse(key, text, SETTINGS[key])


def _parse(name: str, text: str, parse: Callable[[str], int | float]) -> int | float:
    try:
        return parse(text)
    except (ValueError, OverflowError) as error:
        reason = error if str(error).startswith("must") else "must be a number"
        raise ValueError(f"{name} {text!r}: {reason}") from error


def add_model_arguments(parser: argparse.ArgumentParser, *extras: str) -> None:
    """Adds --model and how to load it, which `load_from_arguments` reads.

    Args:
        extras: of pyproject.toml, those that this program needs."""
    parser.set_defaults(extras=extras)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="FOLDER_OR_ID", help="a checkpoint folder or hub id (default: $CHATGLM_MODEL, else the demo)"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--chatglm-version", type=int, metavar="N", help="1 to 4: the generation, if the folder does not tell it"
    )
    group.add_argument(
        "--adapter",
        metavar="[NAME=]PATH",
        action="append",
        help="a P-tuning prefix or LoRA adapter to load on top; may be given several times, and the first one is used",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    group.add_argument("--dtype", default="auto", help="auto, float16, bfloat16, float32 (default: %(default)s)")
    group.add_argument("--quantize", type=int, choices=(4, 8), help="bits per weight, rounded while loading")
    group.add_argument(
        "--save-quantized", metavar="FOLDER", help="with --quantize: keep the result in a new folder"
    )
    group.add_argument(
        "--tensor-parallel", type=_setting("tensor_parallel", _positive_int), metavar="N", default=1,
        help="split the matrices over N processes, on the CPU",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel-at", metavar="HOST:PORT",
        help="where the other processes, started with `python -m chatglm.parallel`, join (default: start them here)",
    )  # fmt: skip
    group.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8"), default="auto",
        help="int8: the KV cache takes half the memory, and long conversations are faster, on the CPU "
        "(default: %(default)s, the dtype of the model)",
    )  # fmt: skip
    group.add_argument(
        "--precision", choices=("default", "exact", "int8"),
        help="how a CPU multiplies by quantised weights; int8 is faster, most of all for several clients, and less "
        "exact (default: what the checkpoint says, else default)",
    )  # fmt: skip
    group.add_argument("--no-memory-check", action="store_true", help="load even if the memory seems too small")
    group.add_argument(
        "--prompt-lookup-num-tokens",
        type=_setting("prompt_lookup_num_tokens", _natural),
        metavar="N",
        help="guess up to N tokens at once from the text so far: summaries and edits are faster, answers keep their "
        "distribution (default: 0, none)",
    )
    group.add_argument(
        "--assistant-model", metavar="FOLDER_OR_ID", help="a smaller model with the same vocabulary that guesses tokens"
    )


def load_from_arguments(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Loads model and tokenizer by the arguments of `add_model_arguments`.

    Prints one line on standard error if libraries are newer than the tested versions. Raises LibraryError, and what
    `chatglm.load` raises.
    """
    language = getattr(args, "lang", None) or choose_language()
    with importing_libraries(language):
        from .. import load
        from ..decoding.drafting import check_assistant
        from ..doctor.versions import newer_than_tested
        from ..loading.export import new_folder, quantisation_of, save

        newer = newer_than_tested(*args.extras, *(["lora"] if args.adapter else []))
    if newer:
        names = ", ".join(f"{one.name} {one.found} ({one.tested})" for one in newer)
        complain(TERMINAL["newer"][language].format(names=names))
    if args.prompt_lookup_num_tokens and args.assistant_model:
        raise ValueError("give --prompt-lookup-num-tokens or --assistant-model, not both")
    if args.save_quantized and (not args.quantize or args.adapter or args.tensor_parallel > 1):
        raise ValueError("--save-quantized goes with --quantize, and without --adapter and --tensor-parallel")
    if args.precision and args.tensor_parallel > 1:
        raise ValueError("--precision does not go with --tensor-parallel")
    out, began = new_folder(args.save_quantized) if args.save_quantized else None, time.perf_counter()
    options = {
        "quantize": args.quantize,
        "adapter": _adapters(args.adapter or []),
        "revision": args.revision,
        "chatglm_version": args.chatglm_version,
    }
    if args.tensor_parallel > 1:
        model, tokenizer = _load_in_parallel(args, options)
        model.kv_cache_dtype = args.kv_cache_dtype
    else:
        model, tokenizer = load(
            args.model, args.device, args.dtype, check_memory=not args.no_memory_check,
            kv_cache_dtype=args.kv_cache_dtype, **options,
        )
    if args.precision:
        _set_precision(model, args.precision)
    if out is not None:
        save(model, tokenizer, out)
        complain(TERMINAL["stored"][language].format(folder=out))
    elif args.quantize and not quantisation_of(Path(model.name_or_path), args.chatglm_version):
        seconds = time.perf_counter() - began
        if seconds >= SLOW_START and not args.adapter:
            complain(TERMINAL["quantised"][language].format(seconds=round(seconds), bits=args.quantize))
    if args.prompt_lookup_num_tokens:
        model.default_options = {"prompt_lookup_num_tokens": args.prompt_lookup_num_tokens}
    if args.assistant_model:
        draft, _ = load(args.assistant_model, args.device, args.dtype, check_memory=not args.no_memory_check)
        check_assistant(model, draft)
        model.default_options = {"assistant_model": draft}
    return model, tokenizer


def _set_precision(model: PreTrainedModel, precision: str) -> None:
    from ..quantization import settings_of

    settings = settings_of(model.config)
    if settings is None:
        raise ValueError(f"--precision {precision} is for quantised models: add --quantize 4 or --quantize 8")
    model.quantize(settings.bits, precision=precision)


def _load_in_parallel(
    args: argparse.Namespace, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    from ..parallel import Group, load_parallel

    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--tensor-parallel is for the CPU, not for --device {args.device}")
    shared = ("model", "revision", "chatglm_version", "dtype", "quantize")
    given = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in shared]
    words = [str(word) for pair in given if pair[1] is not None for word in pair]
    group = Group.start(args.tensor_parallel, args.tensor_parallel_at, words)
    try:
        return load_parallel(args.model, group, args.dtype, **options)
    except BaseException:
        group.close()
        raise


@contextlib.contextmanager
def importing_libraries(language: str) -> Iterator[None]:
    """Turns what the imports within raise into a LibraryError that points to the doctor; Ctrl-C ends the process."""
    try:
        with importing():
            yield
    except Exception as error:  # a library that is missing, broken, or that does not go with another one
        name = (getattr(error, "name", None) or "chatglm").partition(".")[0]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise LibraryError(TERMINAL["broken"][language].format(name=name, reason=reason)) from error


def require(extra: str, language: str, requirements: str = "requirements.txt") -> None:
    """Checks that the libraries of an extra of pyproject.toml are installed; imports none of them.

    Args:
        requirements: the file that has them, in a clone.

    Raises:
        LibraryError: it names those that are missing, and the command that installs them.
    """
    with importing_libraries(language):
        from ..doctor.versions import DISTRIBUTION, libraries

        missing = [one.name for one in libraries() if one.extra == extra and one.found is None]
    if missing:
        in_clone = (CLONE / requirements).is_file()
        command = f"pip install -r {requirements}" if in_clone else f'pip install "{DISTRIBUTION}[{extra}]"'
        raise LibraryError(TERMINAL["missing"][language].format(names=", ".join(missing), command=command))


def port_number(text: str) -> int:
    """The type of --port. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535")
    return int(text)


def check_address(host: str, port: int) -> None:
    """Raises ValueError if no server can listen there, which is good to know before a model is loaded."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no name server can be asked for
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--host {host}: there is no such address ({reason})") from error
    failures = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # elsewhere it means something else
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            failures.append(error)
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    if taken or len(failures) == len(found):
        reason = (taken or failures)[0].strerror
        raise ValueError(f"--host {host} --port {port}: the server cannot listen there ({reason})")


def adapter_names(args: argparse.Namespace) -> list[str]:
    """The names of the adapters that `load_from_arguments` will load. Raises ValueError for a name given twice."""
    return list(_adapters(args.adapter or []) or {})


def _adapters(given: Sequence[str]) -> dict[str, str] | None:
    """Maps names to paths. The name is given before the path, or else that of the folder."""
    if not given:
        return None
    from ..checkpoints.adapters import NAME, default_name  # imports torch

    paths: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not NAME.fullmatch(name) or Path(text).expanduser().exists():
            name, path = default_name(text), text
        if name in paths:
            raise ValueError(f"two adapters are called {name!r} ({paths[name]} and {path}): use --adapter NAME={path}")
        paths[name] = path
    return paths


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --max-length, --top-p and the others of SETTINGS."""
    group = parser.add_argument_group("generation (default: the model's own settings)")
    for name in SETTINGS:
        group.add_argument(f"--{name.replace('_', '-')}", type=_argument(name), metavar="N", help=_HELP[name])


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that were given, as keyword arguments for `chat` and `stream_chat`."""
    values: Mapping[str, Any] = vars(args)
    return {name: values[name] for name in SETTINGS if values[name] is not None}


def _argument(name: str) -> Callable[[str], int | float]:
    return _setting(name, SETTINGS[name])


def _setting(name: str, parse: Callable[[str], int | float]) -> Callable[[str], int | float]:
    """The type of an argument whose text `parse` reads."""

    def convert(text: str) -> int | float:
        try:
            return _parse(name, text, parse)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert
