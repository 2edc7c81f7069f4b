"""docs/architecture.md is the plan of the code: who may import whom, and how long a module may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAN = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = ("chatglm", "ptuning", "game", "evaluation", "benchmarks")
#: Lines that a module may have; longer ones are in the plan's table of exceptions, with the reason.
LONGEST = 400


def floors() -> list[list[str]]:
    """The rooms, from the top floor down: names of modules or packages."""
    block = re.search(r"^```floors\n(.*?)^```$", PLAN, re.DOTALL | re.MULTILINE)
    assert block, "docs/architecture.md has no block of floors"
    return [line.split("#")[0].split() for line in block[1].splitlines() if line.split("#")[0].strip()]


@cache
def modules() -> dict[str, Path]:
    """Every Python module of the project but tests, tools and the training of the demo, by its dotted name."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    files += [path for path in ROOT.glob("*.py") if path.name != "setup.py"]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, rooms: list[str]) -> str | None:
    """The narrowest room that holds a module."""
    holding = [room for room in rooms if module == room or module.startswith(f"{room}.")]
    return max(holding, key=len, default=None)


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """The project's modules that a module imports anywhere in it, with the line."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
        else:
            continue
        for name in names:
            if name in modules():
                yield name, node.lineno


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    rooms = [room for floor in floors() for room in floor]
    assert len(rooms) == len(set(rooms))
    homeless = [module for module in modules() if room_of(module, rooms) is None]
    assert not homeless
    empty = [room for room in rooms if room not in modules()]
    assert not empty


def test_imports_point_downward() -> None:
    level = {room: index for index, floor in enumerate(floors()) for room in floor}
    wrong = []
    for module, path in modules().items():
        own = room_of(module, list(level))
        for imported, line in imports(module, path):
            other = room_of(imported, list(level))
            if own is None or other is None or own == other:
                continue
            if level[other] <= level[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({own}) imports {imported} ({other})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", CODE)
def test_no_module_is_long_without_a_reason(package: str) -> None:
    table = re.search(r"^## Long modules\n(.*?)(?=^## |\Z)", PLAN, re.DOTALL | re.MULTILINE)
    assert table
    excepted = set(re.findall(r"`([\w/.]+\.(?:py|c|h|cu))`", table[1]))
    assert all((ROOT / name).exists() for name in excepted), excepted
    for name in excepted:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines > LONGEST, f"{name} has {lines} lines: it needs no exception any more"
    sources = [path for kind in ("py", "c", "h", "cu") for path in (ROOT / package).rglob(f"*.{kind}")]
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert set(long) <= excepted, {name: long[name] for name in set(long) - excepted}
