"""Compares the libraries with the tested versions, and checks that this package can be imported with them."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from time import perf_counter

from ..program import importing
from .findings import Finding, cure_for, one_line
from .messages import DOCTOR, say
from .versions import DISTRIBUTION, Library, installed

#: Libraries that those depend on or use, without a tested range of ours: useful in a report.
ALSO = ("tokenizers", "huggingface_hub", "numpy", "cpm_kernels", "deepspeed", "bitsandbytes", "flash_attn")
_STATUS = {"ok": "ok", "newer": "note", "older": "wrong", "missing": "wrong", "absent": "skipped"}


def versions(language: str, libraries: list[Library]) -> Iterator[Finding]:
    """Reports every library with the tested range."""
    if not libraries:
        yield Finding("versions", "note", say("no_versions", language, name=DISTRIBUTION))
    for one in {(one.name, one.tested): one for one in libraries}.values():  # two extras may need the same
        status = _STATUS[one.state]
        extra = say(one.extra, language) if one.extra in DOCTOR else one.extra
        text = say(f"version_{one.state}", language, name=one.name, found=one.found, tested=one.tested, extra=extra)
        cure = one.command if status == "wrong" else None
        yield Finding(one.name, status, text, cure, data={"found": one.found, "tested": one.tested, "state": one.state})
    also = [f"{name} {version}" for name in ALSO if (version := installed(name))]
    if also:
        yield Finding("also", "ok", say("also", language, names=", ".join(also)))


def import_package(language: str, libraries: list[Library], verbose: bool = False) -> Finding:
    """Imports what `import chatglm` imports; `chatglm/program.py` says why that has not happened yet."""
    start = perf_counter()
    text, status, cure = say("import", language), "ok", None
    try:
        with importing():
            importlib.import_module("..public", __package__)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        status, text = "wrong", f"{text}: {one_line(error)}"
        culprit = (getattr(error, "name", None) or "").partition(".")[0]
        if any(one.name == culprit for one in libraries):
            cure = cure_for([culprit], libraries)
        elif isinstance(error, ModuleNotFoundError) and culprit:
            cure = f"pip install {culprit}"
        else:
            cure = cure_for(["transformers", "torch", "safetensors", "sentencepiece", "accelerate"], libraries)
    return Finding("import", status, text, cure, round(perf_counter() - start, 2))
