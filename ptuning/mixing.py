"""Several data files as one: weights, and a share that is held out for evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ptuning.rows import Rows


def mix(files: Sequence[Rows], weights: Sequence[float] | None = None, seed: int = 42) -> Rows:
    """The rows of all files.

    Args:
        weights: how many times a file's rows are taken; for the fraction, as many rows at random. 0.5: half of them.
    """
    generator = random.Random(seed)
    rows: list[Rows] = list(files)
    if weights is not None:
        for number, (file, weight) in enumerate(zip(files, weights, strict=True)):
            extra = generator.sample(range(len(file)), round(len(file) * (weight % 1)))
            taken = [row for _ in range(int(weight)) for row in file] + [file[index] for index in sorted(extra)]
            rows[number] = _like(file, taken)
    return rows[0] if len(rows) == 1 else _joined(rows)


def hold_out(files: Sequence[Rows], size: float, seed: int = 42) -> tuple[list[Rows], Rows]:
    """(the remaining rows of each file, the held-out rows of all), chosen at random but always the same.

    Args:
        size: below 1 a share of the rows, else their number.

    Raises:
        ValueError: no row would be left, or held out.
    """
    places = [(number, index) for number, file in enumerate(files) for index in range(len(file))]
    count = round(len(places) * size) if size < 1 else int(size)
    if not 0 < count < len(places):
        raise ValueError(f"--val_size {size:g} would hold out {count} of {len(places)} rows: both sides need some")
    chosen = set(random.Random(seed).sample(places, count))
    rest = [
        _like(file, [row for index, row in enumerate(file) if (number, index) not in chosen])
        for number, file in enumerate(files)
    ]
    if empty := [file.path for file in rest if not file]:
        raise ValueError(f"--val_size {size:g} leaves no row of {empty[0]} to train on: lower it")
    held = [
        _like(file, [row for index, row in enumerate(file) if (number, index) in chosen])
        for number, file in enumerate(files)
    ]
    kept = [file for file in held if file]
    return rest, kept[0] if len(kept) == 1 else _joined(kept)


def _like(file: Rows, rows: Sequence[object]) -> Rows:
    made = Rows(rows, file.path, len(rows), file.skipped)  # type: ignore[arg-type]
    made.forms, made.unused = file.forms, file.unused
    return made


def _joined(files: Sequence[Rows]) -> Rows:
    skipped = [line for file in files for line in file.skipped]
    made = Rows((row for file in files for row in file), " + ".join(file.path for file in files),
                sum(file.found for file in files), skipped)  # fmt: skip
    for file in files:
        made.forms += file.forms
        made.unused = sorted({*made.unused, *file.unused})
    return made
