"""Where the kernels prefetch weights to: measured once, as CPUs differ, and kept beside the compiled library.

On Zen 4, products that prefetch to the L2 cache are up to three times as fast as those that prefetch to the L1 cache.
The results are the same up to rounding. CHATGLM_CPU_PREFETCH names a place instead.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

#: The caches to prefetch to; the index is the enum value in C.
PLACES = ("L1", "L2")
ROUNDS = 5


def chosen_place(path: Path, product: Callable[[str], None]) -> tuple[str, str]:
    """The place to prefetch to, and how it was found.

    Args:
        path: of the compiled library; the result of a measurement is kept in a file beside it.
        product: computes a product whose weights no cache holds, prefetching to the given place.

    Raises:
        ValueError: CHATGLM_CPU_PREFETCH names no place.
    """
    if named := os.environ.get("CHATGLM_CPU_PREFETCH"):
        if named not in PLACES:
            raise ValueError(f"CHATGLM_CPU_PREFETCH is {named!r}; the places are {', '.join(PLACES)}")
        return named, "named by CHATGLM_CPU_PREFETCH"
    kept = path.with_name(f"prefetch-{path.stem}.txt")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        place, _, times = kept.read_text(encoding="utf-8").strip().partition(": ")
        if place in PLACES:
            return place, times
    best = dict.fromkeys(PLACES, float("inf"))
    for _ in range(ROUNDS):
        for place in PLACES:  # in turns, as other programs disturb
            start = perf_counter()
            product(place)
            best[place] = min(best[place], perf_counter() - start)
    fastest = min(PLACES, key=lambda place: best[place])
    times = "measured " + ", ".join(f"{place} {taken * 1e3:.1f} ms" for place, taken in best.items())
    with contextlib.suppress(OSError):  # a folder that cannot be written to: measured again next time
        _write(kept, f"{fastest}: {times}\n")
    return fastest, times


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
