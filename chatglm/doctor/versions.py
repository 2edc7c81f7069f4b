"""Compares installed libraries with the tested versions. Cheap: imports none of them.

The tested ranges are those of pyproject.toml: read from it in a clone, else from the installed package's metadata. In a
clone, requirements.lock also has the exact versions with which the tests were run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

DISTRIBUTION = "chatglm-rebuilt"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Library:
    """A library that this package needs, or can use."""

    name: str
    tested: str  # ">=5.17,<5.25"; "" for any version
    found: str | None  # None: not installed
    extra: str | None  # the extra of pyproject.toml that needs it; None: always needed
    locked: str | None = None  # the version of the last test run

    @property
    def state(self) -> str:
        """ok, newer (than tested), older (than what works), missing, or absent (missing, but optional)."""
        if self.found is None:
            return "absent" if self.extra else "missing"
        specifiers = Requirement(f"{self.name}{self.tested}").specifier
        if specifiers.contains(self.found, prereleases=True):
            return "ok"
        try:
            lowest = [one for one in specifiers if one.operator in (">=", ">", "~=", "==")]
            too_low = any(Version(self.found) < Version(one.version.removesuffix(".*")) for one in lowest)
        except InvalidVersion:  # cannot be compared: in any case not a tested version
            too_low = False
        return "older" if too_low else "newer"

    @property
    def command(self) -> str:
        """The command that installs a working version, even if the installed one should work and does not."""
        if self.state != "ok":
            return f'pip install "{self.name}{self.tested}"'
        if self.locked and not Requirement(f"{self.name}=={self.locked}").specifier.contains(str(self.found)):
            return f'pip install "{self.name}=={self.locked}"'
        wanted = f"=={self.locked}" if self.locked else self.tested
        return f'pip install --force-reinstall --no-deps "{self.name}{wanted}"'


def libraries() -> list[Library]:
    """Returns what pyproject.toml requires on this machine, with what is installed; empty if its ranges are unknown."""
    locked = _locked(ROOT / "requirements.lock")
    found = []
    for requirement, extra in _requirements():
        name = canonicalize_name(requirement.name)
        tested = ",".join(sorted((str(one) for one in requirement.specifier), reverse=True))  # >=5.17,<5.25
        found.append(Library(name, tested, installed(name), extra, locked.get(name)))
    return found


def newer_than_tested(*extras: str) -> list[Library]:
    """Returns the libraries that are always needed, and those for `extras`, that are newer than the tested versions."""
    return [one for one in libraries() if one.state == "newer" and (one.extra is None or one.extra in extras)]


def installed(name: str) -> str | None:
    """Returns the version of a distribution, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[Requirement, str | None]]:
    """Yields each (requirement, extra) of this package that applies to this machine."""
    for text, extra in ranges_of_clone(ROOT / "pyproject.toml") or _from_metadata():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""}):
            yield requirement, extra


def ranges_of_clone(path: Path) -> list[tuple[str, str | None]]:
    """Reads our pyproject.toml line by line, because Python 3.10 cannot read TOML; empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    if f'\nname = "{DISTRIBUTION}"\n' not in text:
        return []
    found: list[tuple[str, str | None]] = []
    table = key = ""
    for line in text.splitlines():
        code = line.partition("#")[0]
        if header := re.match(r"\[([\w.-]+)\]", code):
            table, key = header[1], ""
        elif start := re.match(r"([\w-]+) *=", code):
            key = start[1]
        if (table, key) == ("project", "dependencies"):
            found += [(one, None) for one in re.findall(r'"([^"]+)"', code)]
        elif table == "project.optional-dependencies":
            found += [(one, key) for one in re.findall(r'"([^"]+)"', code)]
    return found


def _from_metadata() -> list[tuple[str, str | None]]:
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    extras = [re.search(r"""\bextra *== *["']([^"']+)""", line) for line in lines]
    return [(line, extra[1] if extra else None) for line, extra in zip(lines, extras, strict=True)]


def _locked(path: Path) -> dict[str, str]:
    """Returns the versions in requirements.lock that are for this machine; empty if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        try:
            requirement = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:  # a blank, a comment, an option
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            for one in requirement.specifier:
                found[canonicalize_name(requirement.name)] = one.version
    return found
