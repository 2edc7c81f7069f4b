"""Check that this installation computes what it should: versions, machine, self-checks on the demo models.

With FOLDER, also report its contents, its generation, the memory it needs, and what is missing or odd. No weights are
loaded and nothing is downloaded. Exit status: 0 all right, 1 something is wrong, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..language import LANGUAGES, choose_language
from ..program import put, run, start
from .findings import Finding, one_line
from .messages import say

if TYPE_CHECKING:
    from .versions import Library

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"  # in a clone
INSTALL = f"pip install {'-r requirements.txt' if REQUIREMENTS.is_file() else 'chatglm-rebuilt'}"


class Report:
    """Findings, printed as they arrive or collected for one JSON document."""

    def __init__(self, language: str, as_json: bool, verbose: bool) -> None:
        self.language, self.as_json, self.verbose = language, as_json, verbose
        self.content: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
        self.wrong = 0
        self.start = perf_counter()

    def line(self, text: str) -> None:
        if not self.as_json:
            put(text)

    def part(self, name: str, *looks: Callable[[], Iterable[Finding]], **values: object) -> None:
        """Reports a heading and what each look finds. An exception in a look is a finding, too."""
        self.line(say(name, self.language, **values))
        self.content[name] = []
        for look in looks:
            try:
                for finding in look():
                    self.add(name, finding)
            except Exception as error:
                if self.verbose:
                    traceback.print_exc()
                cure = INSTALL if isinstance(error, ModuleNotFoundError) else None
                self.add(name, Finding(name, "wrong", one_line(error), cure))

    def add(self, part: str, finding: Finding) -> None:
        self.content[part].append(finding.as_json())
        self.wrong += finding.status == "wrong"
        self.line(self._shown(finding))

    def _shown(self, finding: Finding) -> str:
        status = say(finding.status, self.language)
        taken = "" if finding.seconds is None else say("seconds", self.language, seconds=finding.seconds)
        text = finding.text
        if finding.cure:
            text = say("do", self.language, text=text, cure=finding.cure)
        return f"  {status:<6}{f'{taken:>7}  ' if taken else ' '}{text}"

    def end(self) -> int:
        seconds = perf_counter() - self.start
        if self.as_json:
            self.content |= {"healthy": not self.wrong, "wrong": self.wrong, "seconds": round(seconds, 2)}
            plain = not (sys.stdout.encoding or "").lower().startswith("utf")
            put(json.dumps(self.content, ensure_ascii=plain, indent=2))
        else:
            if self.wrong and REQUIREMENTS.is_file():
                put(say("all_versions", self.language, path=REQUIREMENTS.name))
            put(say("sick" if self.wrong else "healthy", self.language, count=self.wrong, seconds=seconds))
        return 1 if self.wrong else 0


def main(arguments: list[str] | None = None, prog: str = "python -m chatglm.doctor") -> int:
    """Returns 0 if all is right, 1 if something is wrong, 130 after Ctrl-C; SystemExit(2) for wrong arguments."""
    return run(lambda: _main(arguments, prog))


def _main(arguments: list[str] | None, prog: str) -> int:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="a checkpoint, prefix or LoRA; or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--no-checks", action="store_true", help="skip the self-checks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks and library messages on stderr")
    parser.add_argument("--lang", choices=LANGUAGES, default=choose_language(), help="language of the report")
    args = parser.parse_args(arguments)
    return _report(args)


def _report(args: argparse.Namespace) -> int:
    language, report = args.lang, Report(args.lang, args.json, args.verbose)
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():  # libraries may print, too
        _examine(args, language, report)
    return report.end()


def _examine(args: argparse.Namespace, language: str, report: Report) -> None:
    known: list[Library] = []
    imported = False

    # Everything is imported where it is examined: each of these may be the fault.
    def installation() -> Iterator[Finding]:
        nonlocal imported
        from . import installation
        from .versions import libraries

        known.extend(libraries())
        yield from installation.versions(language, known)
        last = installation.import_package(language, known, args.verbose)
        imported = last.status == "ok"
        yield last

    def machine() -> Iterator[Finding]:
        from . import environment

        yield from environment.machine(language)

    def kernels() -> Iterator[Finding]:
        from . import environment

        yield from environment.kernel_cache(language)
        yield from environment.kernels(language, known)

    def folder() -> Iterator[Finding]:
        from .folder import look

        yield from look(args.folder, language, args.device)

    def checks() -> Iterator[Finding]:
        from .checks import run_checks

        yield from run_checks(language, args.device, known, args.verbose)

    report.line(say("title", language, **report.content))
    report.part("versions", installation)
    if not imported:
        return
    report.part("machine", machine, kernels)
    if args.folder is not None:
        report.part("folder", folder, path=args.folder)
    if not args.no_checks:
        report.part("checks", checks)


if __name__ == "__main__":
    start(main)
