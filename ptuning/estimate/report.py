"""An estimate, and what to change, in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from chatglm.memory import readable

from .settings import Settings

#: The parts of an estimate: name -> (English, Chinese).
PARTS = {
    "weights": ("frozen weights", "冻结的权重"),
    "trainable": ("trained weights", "训练的权重"),
    "gradients": ("gradients", "梯度"),
    "optimizer": ("optimizer states", "优化器状态"),
    "activations": ("activations", "激活值"),
    "logits": ("logits and loss", "logits 与损失"),
    "buffers": ("temporary buffers", "临时缓冲区"),
    "evaluation": ("evaluation", "评估"),
    "libraries": ("Python and libraries", "Python 与库"),
}


@dataclass(frozen=True)
class Estimate:
    """The peak of a training step, in bytes per part, on each device of the run."""

    settings: Settings
    parameters: int
    trainable_parameters: int
    parts: dict[str, int]  # by the names of PARTS
    # Pages of the checkpoint file that lie in memory besides, on a CPU that changes their type: while loading, and
    # afterwards. The system takes them back when memory is short, so they are not in the total.
    file_while_loading: int
    file_while_training: int
    config: Any = dataclasses.field(repr=False, compare=False)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """The peak that the system reports where there is memory enough for the pages of the file, too."""
        loaded = sum(self.parts[name] for name in ("weights", "trainable", "libraries"))
        return max(loaded + self.file_while_loading, self.total + self.file_while_training)

    @property
    def trainable(self) -> int:
        """Bytes of the trained weights."""
        return self.parts["trainable"]

    def text(self, lang: str = "en") -> str:
        """A table for people, in English ("en") or Chinese ("zh")."""
        chinese = _chinese(lang)
        share = f"{self.trainable_parameters / self.parameters:.4%}"
        if chinese:
            lines = [
                f"参数：{self.parameters:,}，其中训练 {self.trainable_parameters:,}（{share}）",
                "峰值内存（每个设备）：" if self.settings.world_size > 1 else "峰值内存：",
            ]
        else:
            lines = [
                f"Parameters: {self.parameters:,}, of which {self.trainable_parameters:,} are trained ({share})",
                "Peak memory of each device:" if self.settings.world_size > 1 else "Peak memory:",
            ]
        rows = [(PARTS[name][chinese], readable(size)) for name, size in self.parts.items() if size >= 2**19]
        rows.append(("合计" if chinese else "in all", readable(self.total)))
        width = max(_width(name) for name, _ in rows)
        lines += [f"  {name}{' ' * (width - _width(name))}  {size:>10}" for name, size in rows]
        if self.settings.device == "cpu":
            lines.append(self._in_top(chinese))
        return "\n".join(lines)

    def _in_top(self, chinese: bool) -> str:
        """What tools that show processes will say."""
        seen, pages = readable(self.resident), readable(self.resident - self.total)
        line = f"top 的 RES 最高约 {seen}" if chinese else f"top will show up to {seen} (RES)"
        if self.resident > 1.02 * self.total:
            line += (
                f"，其中至多 {pages} 是检查点文件的缓存页，内存不足时系统会收回"
                if chinese
                else f": up to {pages} of it are pages of the checkpoint file, given back when memory is short"
            )
        return line


@dataclass(frozen=True)
class Advice:
    """One change of the settings, and what becomes of the peak."""

    english: str
    chinese: str
    total: int  # bytes after the change
    gain: int  # bytes that it saves
    fits: bool

    def text(self, lang: str = "en") -> str:
        if _chinese(lang):
            return f"{self.chinese}：省 {readable(self.gain)}，剩 {readable(self.total)}{'，可以放下' * self.fits}"
        return f"{self.english}: saves {readable(self.gain)}, leaves {readable(self.total)}{', which fits' * self.fits}"


def _chinese(lang: str) -> bool:
    if lang not in ("en", "zh"):
        raise ValueError(f"lang is {lang!r}: use 'en' or 'zh'")
    return lang == "zh"


def _width(text: str) -> int:
    """Columns in a terminal: a Chinese character takes two."""
    return sum(2 if ord(character) > 0x2E7F else 1 for character in text)
