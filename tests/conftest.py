"""What all tests share: where the golden data is, the marker for tests that need it, and a name that changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# Tiny models: on a busy machine a second thread only waits. Before torch is imported, and for the programs tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where DeepSpeed is installed, transformers imports it, and it says on standard output that it finds no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "goldens").is_dir(), reason=f"the golden data of the originals is not at {SHARED}"
)


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Gradient checkpointing, with the options of `torch.utils.checkpoint`."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
