"""An estimate, and advice on what to change, as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from chatglm.checkpoints.memory import readable

from ..messages import text
from .settings import Settings

#: The parts of an estimate, in the order of the table.
PARTS = (
    "weights", "trainable", "gradients", "optimizer", "activations", "logits", "buffers", "evaluation", "libraries",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """The peak of a training step, in bytes per part, on each device of the run."""

    settings: Settings
    parameters: int
    trainable_parameters: int
    parts: dict[str, int]  # by the names of PARTS
    # Bytes of the checkpoint file's pages that are also in memory on a CPU that converts the weights: while loading,
    # and afterwards. The system reclaims them when memory is short, so they are not in the total.
    file_while_loading: int
    file_while_training: int
    config: Any = dataclasses.field(repr=False, compare=False)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """The peak that the system reports if there is enough memory for the pages of the file, too."""
        loaded = sum(self.parts[name] for name in ("weights", "trainable", "libraries"))
        return max(loaded + self.file_while_loading, self.total + self.file_while_training)

    @property
    def trainable(self) -> int:
        """Bytes of the trained weights."""
        return self.parts["trainable"]

    def text(self, lang: str = "en") -> str:
        """The estimate as a table, in English ("en") or Chinese ("zh")."""
        share = self.trainable_parameters / self.parameters
        lines = [
            text("parameters", lang, all=self.parameters, trained=self.trainable_parameters, share=share),
            text("peak_each" if self.settings.world_size > 1 else "peak", lang),
        ]
        rows = [(text(name, lang), readable(size)) for name, size in self.parts.items() if size >= 2**19]
        rows.append((text("total", lang), readable(self.total)))
        width = max(_width(name) for name, _ in rows)
        lines += [f"  {name}{' ' * (width - _width(name))}  {size:>10}" for name, size in rows]
        if self.settings.device == "cpu":
            lines.append(self._in_top(lang))
        return "\n".join(lines)

    def _in_top(self, lang: str) -> str:
        """What `top` and similar tools will show."""
        line = text("in_top", lang, seen=readable(self.resident))
        if self.resident > 1.02 * self.total:
            line += text("pages", lang, pages=readable(self.resident - self.total))
        return line


@dataclass(frozen=True)
class Advice:
    """One change of the settings, and its effect on the peak."""

    change: str  # a key of the messages
    values: dict[str, Any]  # that fill its text
    total: int  # bytes after the change
    gain: int  # bytes that it saves
    fits: bool

    def text(self, lang: str = "en") -> str:
        """The advice in one line, in English ("en") or Chinese ("zh")."""
        change = text(self.change, lang, **self.values)
        line = text("advice", lang, change=change, gain=readable(self.gain), total=readable(self.total))
        return line + (text("which_fits", lang) if self.fits else "")


def _width(name: str) -> int:
    """Columns in a terminal, where a Chinese character takes two."""
    return sum(2 if ord(character) > 0x2E7F else 1 for character in name)
