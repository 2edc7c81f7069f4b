"""What the doctor finds, one line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # versions.py needs a library, and a missing library is reported by findings
    from .versions import Library


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: for programs; the same in every language.
        status: "ok"; "wrong", which makes the exit status 1; "note", which a reader should know; or "skipped".
        text: for people, in one line.
        cure: a command to run, or what else to do.
        seconds: how long it took to find out; None if that is of no interest.
        data: details for programs: counts, sizes in bytes.
    """

    name: str
    status: str
    text: str
    cure: str | None = None
    seconds: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        values = {
            "name": self.name, "status": self.status, "text": self.text, "cure": self.cure, "seconds": self.seconds,
        }  # fmt: skip
        return {key: value for key, value in values.items() if value is not None} | dict(self.data)


def cure_for(packages: Iterable[str], libraries: Iterable[Library]) -> str | None:
    """Returns the commands that may cure a fault in which `packages` are involved, the likeliest first.

    They install the packages whose versions were not tested; if all were, the first package again.
    """
    known = {library.name: library for library in libraries}
    suspects = [known[name] for name in packages if name in known]
    odd = [library for library in suspects if library.state not in ("ok", "absent")]
    return "; ".join(library.command for library in odd or suspects[:1]) or None


def one_line(error: BaseException) -> str:
    """Returns an exception as `Type: first line of its message`."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
