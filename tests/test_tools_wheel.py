"""The sdist and the wheel: whole, and with front doors. `python -m tools.wheel` tries more, in new environments."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from test_program import ENVIRONMENT
from tools import wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, as pip would put it into site-packages."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77")
    folder = tmp_path_factory.mktemp("built")
    _, path = wheel.build(folder)  # compares what it holds with the repository
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_the_console_command(installed: Path) -> None:
    (file,) = installed.glob("*.dist-info/entry_points.txt")
    scripts = configparser.ConfigParser()
    scripts.read_string(file.read_text(encoding="utf-8"))
    assert dict(scripts["console_scripts"]) == {"chatglm": "chatglm.__main__:program"}


def test_every_command_is_tried() -> None:
    from chatglm.__main__ import COMMANDS

    assert tuple(COMMANDS) == wheel.COMMANDS


def test_the_installed_package_answers(installed: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "chatglm", *words], cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(installed)},
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip

    done = run("chat", "-p", "hello", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert str(installed) in run("doctor", "--no-checks").stdout
    assert run("tune", "--help").stdout.startswith("usage: chatglm tune ")


def test_what_is_forgotten_is_named() -> None:
    with pytest.raises(wheel.Failed, match=r"the wheel lacks chatglm/a\.c, chatglm/b\.json"):
        wheel._compare("wheel", {Path("chatglm/b.json"), Path("chatglm/a.c"), Path("c")}, {Path("c")})
