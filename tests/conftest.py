"""What all tests share: where the golden data is, and the marker for tests that need it."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "goldens").is_dir(), reason=f"the golden data of the originals is not at {SHARED}"
)
