"""The structs that Python and C share: any difference between the two is an error before a kernel is called."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from chatglm import kernels
from chatglm.kernels.cpu import Tokens, backend, library
from chatglm.kernels.cpu import compile as compiler
from chatglm.kernels.errors import KernelMismatch, KernelUnavailable


def build_layouts(folder: Path, old: str = "", new: str = "") -> ctypes.CDLL:
    """A library of what layouts.h says of itself, with `old` in it replaced; this takes no time to compile."""
    try:
        command, _ = compiler.find_compiler()
    except KernelUnavailable as reason:
        pytest.skip(str(reason))
    for path in compiler.SOURCE.parent.glob("*.h"):
        shutil.copy(path, folder)
    file = folder / "layouts.h"
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1 or not old
    file.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    source = folder / "layouts.c"
    source.write_text('#include "layouts.h"\n')
    return ctypes.CDLL(str(compiler.build([*command, "-std=gnu11", "-fPIC", "-shared"], folder, "layouts", source)))


def test_both_sides_agree(tmp_path: Path) -> None:
    described = build_layouts(tmp_path)
    library.check_layouts(described)
    assert library.layouts_of(described) == library.layouts_here()
    for name in ("Block", "Block.cache_row", "Matrix.bits", "Tokens.past", "Attention.scaling", "MAX_HEAD"):
        assert name in library.layouts_here()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "void *keys, *values;", "void *values, *keys;",
            r"Block.keys is pointer \(8 bytes at 56\) in C and pointer \(8 bytes at 48\) in Python; Block.values is",
        ),
        ("i64 cache_row,", "i64 more, cache_row,", r"Block is \d+ bytes in C and \d+ bytes in Python; Block.cache_row"),
        ("int bits,", "float bits,", r"Matrix.bits is float \(4 bytes at 40\) in C and int \(4 bytes at 40\) in Py"),
        ("MAX_HEAD = 256", "MAX_HEAD = 128", "MAX_HEAD is 128 in C and 256 in Python"),
        ("FIELD(Tokens, past), ", "", "Tokens.past is missing in C"),
        ("NUMBER(VNNI),", "NUMBER(VNNI), NUMBER(X86),", "X86 is [01] in C and missing in Python"),
    ],
    ids=["moved", "added", "of another kind", "another number", "left out", "not known"],
)  # fmt: skip
def test_a_change_in_c_is_seen(tmp_path: Path, old: str, new: str, words: str) -> None:
    drifted = build_layouts(tmp_path, old, new)
    with pytest.raises(KernelMismatch, match=words):
        library.check_layouts(drifted)


def test_a_change_in_python_stops_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error, not with a warning and plain torch; and the message says what to do."""
    try:
        backend.load()
    except KernelUnavailable as reason:
        pytest.skip(str(reason))
    fields = [*Tokens._fields_[:-2], Tokens._fields_[-1], Tokens._fields_[-2]]
    drifted = type("Tokens", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(library, "STRUCTS", (*library.STRUCTS[:2], drifted, library.STRUCTS[3]))
    library.load_library.cache_clear()
    backend.load_variant.cache_clear()
    for _ in range(2):
        with pytest.raises(KernelMismatch, match=r"Tokens.angle_type is int .* Reinstall the package"):
            kernels.load_backend("cpu")
    monkeypatch.undo()
    assert kernels.load_backend("cpu")


def test_a_name_that_is_no_field_is_an_error() -> None:
    for struct in library.STRUCTS:
        with pytest.raises(AttributeError):
            struct().residual = 1  # type: ignore[attr-defined]
