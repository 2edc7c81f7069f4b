"""Where the bundled demo checkpoints lie; `tools/demo` makes them. See README.md beside this file."""

from __future__ import annotations

import os
from pathlib import Path

_HERE = Path(__file__).parent
#: The checkpoints by generation.
FOLDERS = {1: _HERE / "chatglm-demo", 3: _HERE / "chatglm3-demo", 4: _HERE / "glm4-demo"}
#: Where the one that sees pictures is put, for cli_demo_vision.py and web_demo_vision.py: `tools.demo.train_vision`.
VISION = _HERE / "visualglm-demo"
#: What is loaded where nobody names a model.
DEFAULT = FOLDERS[3]


def is_demo(path: str | os.PathLike[str]) -> bool:
    """Whether a model that was loaded from `path` (its `name_or_path`) is a bundled one."""
    return _HERE.resolve() in Path(path).resolve().parents


def with_vocabulary_of(generation: int) -> Path:
    """The checkpoint with the vocabulary that this generation uses: generations 2 and 3 share theirs."""
    return FOLDERS[3 if generation == 2 else generation]
