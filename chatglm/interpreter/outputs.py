"""What a cell gives: text, results, pictures and errors, in their order and within limits."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_TEXT = 100_000  # characters of a cell's texts together; more ends the cell
MOST_PICTURE = 5 * 2**20  # bytes
MOST_PICTURES = 8
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Part:
    """A piece of output; `kind` is stdout, stderr, result, display or error."""

    kind: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture as PNG."""

    png: bytes


@dataclass
class Outputs:
    """Collects the parts of one cell; `full`: it has given more than is kept."""

    parts: list[Part | Picture] = field(default_factory=list)
    full: bool = False
    _characters: int = 0
    _pictures: int = 0

    def take(self, kind: str, content: Mapping[str, Any]) -> None:
        """Adds a message of the kernel; the kind is its type in Jupyter's protocol."""
        if kind == "stream":
            self._add(str(content.get("name")), str(content.get("text", "")))
        elif kind == "error":
            self._add("error", error_text(content))
        elif kind in ("execute_result", "display_data"):
            data = content.get("data", {})
            if isinstance(data.get("image/png"), str):
                self._add_picture(data["image/png"])
            elif "text/plain" in data:
                self._add("result" if kind == "execute_result" else "display", f"{data['text/plain']}\n")

    def _add(self, kind: str, text: str) -> None:
        text = _ANSI.sub("", text)
        room = MOST_TEXT - self._characters
        self.full |= len(text) > room
        text = text[:room]
        self._characters += len(text)
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Part) and last.kind == kind:
            self.parts[-1] = Part(kind, last.text + text)
        elif text:
            self.parts.append(Part(kind, text))

    def _add_picture(self, encoded: str) -> None:
        try:
            png = base64.b64decode(encoded, validate=False)
        except (binascii.Error, ValueError):
            png = b""
        self._pictures += 1
        if not png.startswith(b"\x89PNG\r\n\x1a\n"):
            self._add("stderr", "[a picture that is no PNG was left out]\n")
        elif len(png) > MOST_PICTURE or self._pictures > MOST_PICTURES:
            self._add("stderr", f"[a picture of {len(png)} bytes was left out]\n")
        else:
            self.parts.append(Picture(png))


def error_text(content: Mapping[str, Any]) -> str:
    """The last line of a traceback, and before it the frames of the cell: those of libraries help no model."""
    last = f"{content.get('ename', 'Error')}: {content.get('evalue', '')}".rstrip(": ")
    frames = [_ANSI.sub("", str(frame)).strip() for frame in content.get("traceback", [])]
    own = [frame for frame in frames if frame.startswith(("Cell In", "File <ipython", "Input In"))]
    return "\n".join([*own, last]) + "\n"


def as_observation(parts: list[Part | Picture], most: int) -> str:
    """The output as the model reads it, as it was trained: `[Image]` for a picture, cut in the middle."""
    text = "".join("[Image]\n" if isinstance(part, Picture) else part.text for part in parts).rstrip("\n")
    if len(text) > most:
        head = most * 2 // 3
        text = f"{text[:head]} [TRUNCATED] {text[len(text) - (most - head) :]}"
    return text
