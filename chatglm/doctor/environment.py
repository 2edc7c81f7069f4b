"""The machine: its environment variables, devices with their memory, and what computes INT4 and INT8 on them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

import torch

from ..checkpoints import memory
from ..kernels import KernelUnavailable, KernelWarning, backend_for
from ..kernels.__main__ import TOLERANCE, devices, error_of, name_of, use_once, why_plain_torch
from ..kernels.cache_files import cache_folder, damaged_files
from .findings import Finding, cure_for
from .messages import say
from .versions import Library

VARIABLES = (
    "CHATGLM_MODEL", "CHATGLM_KERNELS", "CHATGLM_CPU_KERNELS", "CHATGLM_CPU_PREFETCH", "CHATGLM_CACHE",
    "CHATGLM_HISTORY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE",
)  # fmt: skip
BITS = (4, 8)


def machine(language: str) -> Iterator[Finding]:
    """Reports where this package is, its environment variables, and the devices with their free memory."""
    yield Finding("package", "ok", say("package", language, path=Path(__file__).resolve().parents[1]))
    values = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    if values:
        yield Finding("environment", "ok", say("environment", language, values=values))
    for device in devices():
        room = memory.available(device)
        shown = say("unknown", language) if room is None else memory.readable(room)
        text = say("device", language, device=device, name=name_of(device), memory=shown)
        yield Finding(f"device {device}", "ok", text, data={"memory": room})
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        reason = say("no_cuda_device" if torch.version.cuda else "no_cuda_build", language)
        yield Finding("cuda", "note", say("no_cuda", language, version=torch.__version__, reason=reason))


def kernel_cache(language: str) -> Iterator[Finding]:
    """Reports damaged files of compiled kernels. Must run before the kernels are used."""
    start = perf_counter()
    damaged = damaged_files()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        for device in devices():
            if backend_for(device) is not None:
                use_once(device)
    still = damaged_files()
    for path in damaged:
        if path in still:
            cure = say("cache_cure", language, path=path)
            yield Finding("kernel_cache", "wrong", say("cache_damaged", language, path=path), cure)
        else:
            yield Finding("kernel_cache", "wrong", say("cache_healed", language, path=path))
    if not damaged:
        try:
            seconds = round(perf_counter() - start, 2)  # the first time, this includes building them
            yield Finding("kernel_cache", "ok", say("cache_whole", language, folder=cache_folder()), seconds=seconds)
        except KernelUnavailable as reason:
            yield Finding("kernel_cache", "note", str(reason))


def kernels(language: str, libraries: Iterable[Library]) -> Iterator[Finding]:
    """Reports what computes INT4 and INT8 on each device, and its largest error against float64."""
    for device in devices():
        start = perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KernelWarning)  # its reason is in the finding
            errors = [error_of(device, bits, "default", torch.float32) for bits in BITS]
            backend = backend_for(device)
        right = max(errors) < TOLERANCE["default"]
        if backend is None:
            status = "note" if device.type in ("cpu", "cuda") else "ok"  # we have no kernels for others
            values = {"reason": why_plain_torch(device), "error": max(errors), "device": device}
            text = say("kernels_torch", language, **values)
            cure = cure_for(["torch"], libraries)
        else:
            status = "ok"
            about = ", ".join(value for key, value in backend.describe().items() if key in ("kernels", "compiler"))
            text = say("kernels", language, device=device, about=about, error=max(errors))
            cure = say("kernels_cure", language)
        seconds = round(perf_counter() - start, 2)
        yield Finding(f"kernels {device}", status if right else "wrong", text, None if right else cure, seconds)
