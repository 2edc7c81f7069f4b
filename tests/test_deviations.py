"""The list of deliberate differences is used, entry by entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from deviations import DEVIATIONS

TESTS = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py")))


@pytest.mark.parametrize("name", sorted(DEVIATIONS))
def test_every_entry_is_used_and_has_a_reason(name: str) -> None:
    assert f'"{name}"' in TESTS
    assert len(DEVIATIONS[name]) > 40
