"""`loss.png`: the losses of a run, drawn as it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from chatglm.checkpoints.atomic import whole_file

FILE = "loss.png"
#: Seconds between two drawings, which take about a fifth of one.
PAUSE = 20.0


def is_available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def draw(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the training and evaluation losses of a `log_history`; returns whether there were any."""
    from matplotlib.figure import Figure

    lines = {}
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]
        if points:
            lines[label] = points
    if not lines:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")  # not pyplot, whose figures are global
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
    return True


class Curve(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps `loss.png` in the output folder up to date."""

    def __init__(self, folder: str | Path) -> None:
        self.path, self.drawn = Path(folder) / FILE, 0.0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self.drawn > PAUSE:
            self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._draw(state)

    def _draw(self, state: Any) -> None:
        draw(state.log_history, self.path)
        self.drawn = time.monotonic()
