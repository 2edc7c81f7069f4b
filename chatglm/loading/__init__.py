"""Loads a model from a folder or a hub id, onto one device (`load`) or several (`utils.load_model_on_gpus`).

Both go through `plan.py`: it finds and checks the files, then builds the model.
"""

from __future__ import annotations

from ..chat import model_class
from ..checkpoints.files import ModelLoadError
from ..demo import DEFAULT as DEMO
from .dtypes import DTYPES, choose_dtype
from .memory_check import NotEnoughMemoryError, memory_needed
from .one_device import load
from .plan import AdapterPaths, find_folder
from .reading import read_config

__all__ = [
    "DEMO",
    "DTYPES",
    "AdapterPaths",
    "ModelLoadError",
    "NotEnoughMemoryError",
    "choose_dtype",
    "find_folder",
    "load",
    "memory_needed",
    "model_class",
    "read_config",
]
