"""JSON files and templates in the encodings of Windows editors: UTF-8 with a byte order mark, and UTF-16."""

from __future__ import annotations

import builtins
import io
import json
import os
from typing import IO, Any

from transformers import configuration_utils, tokenization_utils_base
from transformers.generation import configuration_utils as generation_configuration_utils
from transformers.models.auto import tokenization_auto
from transformers.utils import hub

#: The modules of transformers that open these files of a checkpoint.
_READERS = (configuration_utils, generation_configuration_utils, hub, tokenization_auto, tokenization_utils_base)


def let_transformers_read_them() -> None:
    """Makes transformers read these files, which it opens before any code of ours runs: other files are unaffected."""
    for module in _READERS:
        setattr(module, "open", open_json)  # noqa: B010  # the modules have no such name of their own


def open_json(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
    """Python's `open`, which finds out the encoding of a JSON file or a template by its first bytes."""
    if mode == "r" and os.fspath(file).endswith((".json", ".jinja")):
        with builtins.open(file, "rb") as stream:
            content = stream.read()
        encoding = json.detect_encoding(content)
        if encoding != "utf-8":
            return io.StringIO(content.decode(encoding))
    return builtins.open(file, mode, *args, **kwargs)
