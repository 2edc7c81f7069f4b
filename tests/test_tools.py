"""`python -m tools.lock`, `tools.releases` and `tools.issue`; stand-ins take the place of uv, pip, pytest and gh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import environments, issue, lock, releases

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with requirements files of its own, and a lock."""
    files = {
        "requirements.txt": "# why\n-c requirements.lock\nuvicorn>=0.54,<1  # why\ntransformers>=5.17,<5.25  # why\n",
        "ptuning/requirements.txt": "-c ../requirements.lock\ntorch==2.13.0\n",
        "ptuning/requirements-prefer.txt": "-c ../requirements.lock\n-r requirements.txt\n",
        "deploy/requirements-ray.txt": "-c ../requirements.lock\n",
        "tests/requirements.txt": '-r ../ptuning/requirements.txt\npexpect>=4.9; sys_platform != "win32"\n',
        "requirements.lock": lock.HEADER + "torch==2.13.0\ntransformers==5.24.0\ncuda-toolkit<=13.0.3\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "LOCK", tmp_path / "requirements.lock")
    return tmp_path


@pytest.fixture
def uv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Stands in for uv and for .ci/run: uv(answer, status) returns the list that the calls go to."""

    def stand_in(answer: str, status: int = 0, tests: int = 0) -> list[Any]:
        calls: list[Any] = []

        def run(command: list[str], **keywords: Any) -> SimpleNamespace:
            calls.append(SimpleNamespace(command=command, **keywords))
            if command[0] == "bash":
                return SimpleNamespace(returncode=tests)
            output = Path(command[command.index("--output-file") + 1])
            calls[-1].found = output.read_text(encoding="utf-8") if output.exists() else None
            output.write_text(answer, encoding="utf-8")
            return SimpleNamespace(returncode=status, stderr="nothing fits\n")

        monkeypatch.setitem(sys.modules, "uv", SimpleNamespace(__spec__="found"))
        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return stand_in


def test_a_lock_is_resolved_from_the_ranges_and_what_was_locked(
    checkout: Path, uv: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_FIND_LINKS", "wheels")
    calls = uv("torch==2.13.0\ntriton==3.7.1 ; sys_platform == 'linux'\n")
    assert lock.main([]) == 0
    assert lock.LOCK.read_text(encoding="utf-8") == lock.HEADER + (
        "torch==2.13.0\ntriton<=3.7.1 ; sys_platform == 'linux'\n"
    )
    assert calls[0].input.splitlines() == [
        "uvicorn>=0.54,<1", "transformers>=5.17,<5.25", "torch==2.13.0", 'pexpect>=4.9; sys_platform != "win32"',
    ]  # fmt: skip
    assert "cuda-toolkit==13.0.3" in calls[0].found  # a pin, which uv keeps
    assert "UV_FIND_LINKS" not in calls[0].env
    assert not any(argument.startswith("--upgrade") for argument in calls[0].command)
    assert calls[1].command == ["bash", str(checkout / ".ci" / "run")]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("arguments", "options"),
    [([], ["--upgrade"]), (["peft", "torch"], ["--upgrade-package=peft", "--upgrade-package=torch"])],
)
def test_upgrade_moves_everything_or_what_is_named(
    checkout: Path, uv: Callable[..., list[Any]], arguments: list[str], options: list[str]
) -> None:
    calls = uv("torch==2.13.0\n")
    assert lock.main(["--upgrade", *arguments, "--no-tests"]) == 0
    assert [argument for argument in calls[0].command if argument.startswith("--upgrade")] == options
    assert len(calls) == 1


def test_nothing_runs_where_the_lock_stays(checkout: Path, uv: Callable[..., list[Any]], capsys: Any) -> None:
    before = lock.LOCK.read_text(encoding="utf-8")
    calls = uv(before.removeprefix(lock.HEADER).replace("<=", "=="))
    assert lock.main(["--upgrade"]) == 0
    assert lock.LOCK.read_text(encoding="utf-8") == before
    assert len(calls) == 1 and "is up to date" in capsys.readouterr().out


def test_a_failure_leaves_the_old_lock(checkout: Path, uv: Callable[..., list[Any]], capsys: Any) -> None:
    before = lock.LOCK.read_text(encoding="utf-8")
    uv("half a l", status=1)
    assert lock.main(["--upgrade"]) == 1
    assert lock.LOCK.read_text(encoding="utf-8") == before
    assert capsys.readouterr().err == "nothing fits\n"
    assert len(list(checkout.iterdir())) == 5  # nothing half-written beside it


def test_failing_tests_say_how_to_get_the_old_lock_back(
    checkout: Path, uv: Callable[..., list[Any]], capsys: Any
) -> None:
    uv("torch==2.14.0\n", tests=3)
    assert lock.main(["--upgrade"]) == 3
    assert "git checkout requirements.lock" in capsys.readouterr().err


def test_without_uv_the_command_that_brings_it(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "uv", None)
    assert lock.main([]) == 1
    assert "pip install -r requirements.txt -r tests/requirements.txt" in capsys.readouterr().err


def test_what_each_wish_asks_pip_for(checkout: Path) -> None:
    assert releases.requested("newest") == ["uvicorn", "transformers", "torch", 'pexpect; sys_platform != "win32"']
    assert releases.requested("newest", keep=["torch"])[-2:] == ['pexpect; sys_platform != "win32"', "torch==2.13.0"]
    assert releases.requested("allowed") == ["transformers>=5.17,<5.25"]
    assert releases.requested("oldest") == ["transformers==5.17"]
    assert releases.requested("peft==0.20.1") == ["peft==0.20.1"]


def test_what_is_kept_has_to_be_locked(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        releases.main(["newest", "--keep", "troch"])
    assert "troch" in capsys.readouterr().err


class Stand:
    """Stands in for releases.Environment: answers by the first argument of `python -m`."""

    answers: dict[str, tuple[int, str]]
    calls: list[tuple[str, ...]]
    borrowed: list[bool]

    def __init__(self, folder: Path, borrows: bool) -> None:
        type(self).borrowed.append(borrows)

    def run(self, *arguments: str) -> tuple[int, str]:
        if arguments[0] == "pip":
            assert arguments[:3] == ("pip", "install", "-q")
            if "--upgrade" in arguments:
                arguments = ("pip", *Path(arguments[-1]).read_text(encoding="utf-8").splitlines())
            else:
                arguments = ("pip", *arguments[3:])
        type(self).calls.append(arguments)
        return type(self).answers[arguments[0]]

    install = releases.Environment.install


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    Stand.calls, Stand.borrowed = [], []
    Stand.answers = {"pip": (0, ""), "tools.lock": (1, "peft 0.22.0, locked 0.21.2\n")}
    Stand.answers["pytest"] = (0, "...\n3 passed in 1s\n")
    monkeypatch.setattr(releases, "Environment", Stand)
    return Stand


def test_the_lock_but_for_one_release(stand: type[Stand], capsys: Any) -> None:
    assert releases.main(["transformers==5.20.2", "--quick"]) == 0
    assert stand.calls == [
        ("pip", "-r", "requirements.txt", "-r", "tests/requirements.txt"),
        ("pip", "transformers==5.20.2"),
        ("tools.lock", "--installed"),
        ("pytest", "-q", "-rfE", "@tests/quick.txt"),
    ]
    assert stand.borrowed == [False]
    assert "3 passed in 1s" in capsys.readouterr().out


def test_what_is_borrowed_is_not_installed_again(stand: type[Stand], capsys: Any) -> None:
    assert releases.main(["transformers==5.20.2", "--quick", "--borrow"]) == 0
    assert stand.borrowed == [True]
    assert [call[0] for call in stand.calls] == ["pip", "tools.lock", "pytest"]
    assert stand.calls[0] == ("pip", "transformers==5.20.2")
    with pytest.raises(SystemExit):
        releases.main(["newest", "--borrow"])
    assert "--borrow" in capsys.readouterr().err


def test_a_borrowed_library_gives_way_to_one_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent, own = tmp_path / "lent", tmp_path / "own"
    for folder, version in ((lent, "1"), (own, "2")):
        (folder / f"borrowed_thing-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: borrowed-thing\nVersion: {version}\n"
        (folder / f"borrowed_thing-{version}.dist-info" / "METADATA").write_text(text)
        (folder / "borrowed_thing.py").write_text(f"version = {version}\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(lent))
    environments.borrow_libraries(python)
    monkeypatch.undo()
    code = "import borrowed_thing as one; from tools import lock; print(one.version, lock.installed_here())"

    def said() -> str:
        return subprocess.run([python, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert said() == "1 {'borrowed-thing': '1'}\n"
    (library,) = (tmp_path / "venv").rglob("site-packages")
    for path in own.iterdir():
        path.rename(library / path.name)
    assert said() == "2 {'borrowed-thing': '2'}\n"


def test_the_newest_of_everything_knows_no_lock(stand: type[Stand], tmp_path: Path) -> None:
    summary = "FAILED tests/test_x.py::test_y - TypeError\n1 failed, 2 passed in 1s\n"
    stand.answers["pytest"] = (1, f"..F\nlong text\n=== short test summary info ===\n{summary}")
    assert releases.main(["newest", "--report", str(tmp_path / "report.md")]) == 1
    assert [call[0] for call in stand.calls] == ["pip", "tools.lock", "pytest"]
    assert "transformers" in stand.calls[0] and not any("<" in word for word in stand.calls[0])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in ("**1 failed, 2 passed in 1s**", "peft 0.22.0, locked 0.21.2", summary, "tools.releases newest"):
        assert words in text
    assert "long text" not in text


def test_releases_that_cannot_be_installed_together_are_a_finding(stand: type[Stand], capsys: Any) -> None:
    stand.answers["pip"] = (1, "ERROR: ResolutionImpossible\n")
    assert releases.main(["newest"]) == 1
    assert "ResolutionImpossible" in capsys.readouterr().out
    assert len(stand.calls) == 1


def test_the_newest_allowed_being_the_locked_one_is_said(stand: type[Stand], capsys: Any) -> None:
    stand.answers["tools.lock"] = (0, "all 100 packages as locked\n")
    assert releases.main(["allowed", "--quick"]) == 0
    assert "the newest allowed transformers is the locked one" in capsys.readouterr().out
    assert "pytest" not in [call[0] for call in stand.calls]
    assert releases.main(["oldest", "--quick"]) == 0  # only "allowed" may be the lock itself
    assert "pytest" in [call[0] for call in stand.calls]


def test_the_real_environment_runs_python_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keywords: None)  # the venv is not made
    environment = releases.Environment(tmp_path)
    environment.python = sys.executable
    status, output = environment.run("tools.lock", "--help")
    assert status == 0 and "--upgrade" in output
    assert environment.run("tools.no_such_module")[0] == 1


def test_the_quick_set_exists() -> None:
    lines = (ROOT / "tests" / "quick.txt").read_text(encoding="utf-8").splitlines()
    assert lines and all((ROOT / line).is_file() for line in lines)


@pytest.fixture
def gh(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stands in for GitHub and records calls; the first entry has the open issues, as `gh issue list` prints them."""
    told: list[tuple[str, ...]] = [("[]",)]

    def answer(*arguments: str, text: str | None = None) -> str:
        if arguments[1] == "list":
            return told[0][0]
        told.append((arguments[1], arguments[2], text or ""))
        return "address\n"

    monkeypatch.setattr(issue, "gh", answer)
    return told


OPEN = (f'[{{"number": 3, "title": "another"}}, {{"number": 7, "title": "{issue.TITLE}"}}]',)


def test_a_failure_opens_an_issue_and_the_next_is_added_to_it(gh: list[tuple[str, ...]], tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.write_text("what was found", encoding="utf-8")
    issue.main([str(report), "failure"])
    assert gh[1:] == [("create", "--title", "what was found")]
    gh[:] = [OPEN]
    issue.main([str(report), "failure"])
    assert gh[1:] == [("comment", "7", "what was found")]


def test_a_success_closes_it(gh: list[tuple[str, ...]], tmp_path: Path, capsys: Any) -> None:
    report = tmp_path / "report.md"
    report.write_text("all is well", encoding="utf-8")
    issue.main([str(report), "success"])
    assert gh[1:] == [] and "nothing failed" in capsys.readouterr().out
    gh[:] = [OPEN]
    issue.main([str(report), "success"])
    assert gh[1:] == [("comment", "7", "all is well"), ("close", "7", "")]


def test_a_run_without_a_report_is_told_too(gh: list[tuple[str, ...]], tmp_path: Path) -> None:
    issue.main([str(tmp_path / "missing.md"), "cancelled"])
    assert "without a report" in gh[1][2]
