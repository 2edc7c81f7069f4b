"""Where the CPU kernels prefetch weights to: measured once, kept beside the library, or named by a variable."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from chatglm.kernels.cpu import fetching
from chatglm.kernels.cpu.fetching import PLACES, ROUNDS, chosen_place


class Machine:
    """Products that take a given time, by a clock of their own."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.time = 0.0
        self.products: list[str] = []

    def product(self, place: str) -> None:
        self.products.append(place)
        self.time += self.seconds[place] * (3 if len(self.products) == 4 else 1)  # one is disturbed


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CHATGLM_CPU_PREFETCH", raising=False)
    return tmp_path / "cpu-key-digest.so"


def choose(library: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setattr(fetching, "perf_counter", lambda: machine.time)
    return chosen_place(library, machine.product)


@pytest.mark.parametrize("fastest", PLACES)
def test_the_fastest_place_is_measured_once(library: Path, monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    machine = Machine(**{place: 0.010 if place == fastest else 0.012 for place in PLACES})
    found = choose(library, machine, monkeypatch)
    assert machine.products == list(PLACES) * ROUNDS
    assert found[0] == fastest
    assert f"{fastest} 10.0 ms" in found[1]
    other = Machine()
    assert choose(library, other, monkeypatch) == found
    assert not other.products
    library = library.with_name("cpu-key-another.so")  # another build is measured anew
    assert choose(library, machine, monkeypatch) == found
    assert len(machine.products) == 2 * len(PLACES) * ROUNDS


def test_the_variable_names_a_place(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in PLACES:
        monkeypatch.setenv("CHATGLM_CPU_PREFETCH", place)
        assert choose(library, Machine(), monkeypatch) == (place, "named by CHATGLM_CPU_PREFETCH")
    monkeypatch.setenv("CHATGLM_CPU_PREFETCH", "L9")
    with pytest.raises(ValueError, match="'L9'; the places are L1, L2"):
        choose(library, Machine(), monkeypatch)
    assert not list(library.parent.iterdir())


@pytest.mark.parametrize("kept", [b"", b"L", b"L9: measured", b"\xff\xfe"])
def test_a_damaged_note_is_measured_anew(library: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes) -> None:
    machine = Machine(**dict.fromkeys(PLACES, 0.01))
    choose(library, machine, monkeypatch)
    (note,) = library.parent.iterdir()
    whole = note.read_bytes()
    note.write_bytes(kept)
    choose(library, machine, monkeypatch)
    assert note.read_bytes() == whole
    assert len(machine.products) == 2 * len(PLACES) * ROUNDS


def test_a_folder_that_cannot_be_written_to_still_serves(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert choose(library, Machine(L1=0.02, L2=0.01), monkeypatch)[0] == "L2"
    assert not list(library.parent.iterdir())
