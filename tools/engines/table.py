"""The table of docs/serving.md and its Chinese twin: a line for each engine, in both the same."""

from __future__ import annotations

from pathlib import Path

from chatglm.checkpoints.atomic import write_file
from tools.lock import ROOT

PAGES = (ROOT / "docs" / "serving.md", ROOT / "docs" / "serving_zh.md")
BEGIN, END = "<!-- written by python -m tools.engines -->", "<!-- end of the table -->"


def merged(page: str, rows: dict[str, str]) -> str:
    """The page with these rows (by their first cell) in its table: known ones replaced, new ones at the end.

    Raises:
        ValueError: the page has no such table.
    """
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN} and {END}")
    lines = table.strip().splitlines()
    head, old = lines[:2], {_first_cell(line): line for line in lines[2:]}
    return "\n".join([before + begin, "", *head, *(old | rows).values(), "", end + after])


def write(rows: dict[str, str], pages: tuple[Path, ...] = PAGES) -> None:
    """Writes the rows into the pages."""
    texts = [(page, merged(page.read_text(encoding="utf-8"), rows)) for page in pages]
    for page, text in texts:
        write_file(page, text)


def row(*cells: str) -> dict[str, str]:
    """One row of the table, by its first cell."""
    return {cells[0]: f"| {' | '.join(cells)} |"}


def _first_cell(line: str) -> str:
    return line.strip("|").split("|")[0].strip()
