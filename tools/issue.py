"""`python -m tools.issue REPORT OUTCOME` reports the result of the weekly run as an issue, with GitHub's `gh`.

A failure opens an issue, or comments on the open one; the next success comments on it and closes it.
This runs separately from the tests, so that nothing they install sees the token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TITLE = "Tests fail with the newest releases of our dependencies"


def gh(*arguments: str, text: str | None = None) -> str:
    """Runs `gh` with `text` as its standard input, and returns its output."""
    return subprocess.run(["gh", *arguments], input=text, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def publish(text: str, failed: bool) -> str:
    """Opens, comments on or closes the issue; returns what was done, in one line."""
    found = gh("issue", "list", "--state", "open", "--search", f'in:title "{TITLE}"', "--json", "number,title")
    numbers = [str(issue["number"]) for issue in json.loads(found) if issue["title"] == TITLE]
    if not numbers:
        if not failed:
            return "nothing failed, and no issue is open"
        return "opened " + gh("issue", "create", "--title", TITLE, "--body-file", "-", text=text).strip()
    gh("issue", "comment", numbers[0], "--body-file", "-", text=text)
    if not failed:
        gh("issue", "close", numbers[0])
    return f"{'added to' if failed else 'closed'} issue {numbers[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.issue", description="Reports a run as an issue.")
    parser.add_argument("report", type=Path, help="what `python -m tools.releases newest --report FILE` wrote")
    parser.add_argument("outcome", help="the job's result: success, or anything else for a failure")
    options = parser.parse_args(arguments)
    text = "The run ended without a report; its log says more.\n"
    if options.report.exists():
        text = options.report.read_text(encoding="utf-8")
    print(publish(text, failed=options.outcome != "success"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
