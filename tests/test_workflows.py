"""GitHub's workflows: they run the README's words, with no more rights than they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from test_readme import commands
from tools.lock import OLDEST_PYTHON

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    return loaded


def lines_run(job: dict[str, Any]) -> list[str]:
    return [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_the_commands_of_the_readme_run_word_for_word_on_three_systems() -> None:
    job = workflow("tests.yml")["jobs"]["readme"]
    assert set(commands("README.md")[:2]) < set(lines_run(job))
    assert "python -m tools.lock --installed" in lines_run(job)
    matrix = job["strategy"]["matrix"]
    assert [system.partition("-")[0] for system in matrix["system"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"][0] == OLDEST_PYTHON and len(matrix["python"]) == 2
    assert job["defaults"]["run"]["shell"] == "bash"  # pipes fail where a command in them fails, on Windows too


def test_every_week_with_the_newest_of_everything() -> None:
    loaded = workflow("newest.yml")
    assert re.fullmatch(r"\d+ \d+ \* \* \d", loaded[True]["schedule"][0]["cron"])  # YAML reads `on` as True
    assert "python -m tools.releases newest --report report.md" in lines_run(loaded["jobs"]["newest"])
    # The token is only where nothing from outside runs.
    assert loaded["jobs"]["issue"]["permissions"] == {"contents": "read", "issues": "write"}
    assert not any("pip" in line for line in lines_run(loaded["jobs"]["issue"]))
    assert "permissions" not in loaded["jobs"]["newest"]


def test_the_coverage_is_held() -> None:
    assert {"python -m coverage run -m pytest -q -n 0", "python -m coverage report"} <= set(
        lines_run(workflow("tests.yml")["jobs"]["coverage"])
    )
    limit = re.search(r"^fail_under = (\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert limit and int(limit[1]) >= 80


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rights_times_and_versions(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    loaded = workflow(file.name)
    assert loaded["permissions"] == {"contents": "read"}
    assert "group" in loaded["concurrency"]
    for job in loaded["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"] == {"persist-credentials": False}
    assert "://" not in text  # what is installed comes from where pip looks


def test_there_are_workflows() -> None:
    assert {file.name for file in FILES} == {"newest.yml", "tests.yml"}
