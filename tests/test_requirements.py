"""The lock, the ranges that are written by hand, and what the READMEs say of both."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import lock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ["3.10.4", "3.11.7", "3.12.1", "3.13.0", "3.14.0"]  # torch 2.13 has wheels for these
SYSTEMS = {
    "Linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    "macOS": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    "Windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
}
def markers(system: str, python: str) -> dict[str, str]:
    return {**SYSTEMS[system], "python_full_version": python, "python_version": python.rpartition(".")[0]}


everywhere = pytest.mark.parametrize(
    "environment",
    [pytest.param(markers(system, python), id=f"{system}-{python}") for system in SYSTEMS for python in PYTHONS],
)


def here(lines: list[str], environment: dict[str, str]) -> list[Requirement]:
    requirements = [Requirement(line) for line in lines]
    return [each for each in requirements if each.marker is None or each.marker.evaluate(dict(environment))]


def locked(environment: dict[str, str]) -> dict[str, Version]:
    """The locked versions by names."""
    versions: dict[str, Version] = {}
    for each in here(lock.lock_lines(), environment):
        (specifier,) = each.specifier
        assert each.name not in versions, f"{each.name} is locked twice"
        versions[each.name] = Version(specifier.version)
    return versions


def of_package() -> dict[str, SpecifierSet]:
    """The ranges of pyproject.toml by names, optional ones too."""
    lists = [PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"].values()]
    return {each.name: each.specifier for lines in lists for each in map(Requirement, lines)}


def bound(ranges: SpecifierSet, operator: str) -> Version:
    (version,) = [Version(each.version) for each in ranges if each.operator == operator]
    return version


def newest_run(ranges: SpecifierSet) -> str:
    """The newest minor release within a range: "5.24" of ">=5.17,<5.25"."""
    end = bound(ranges, "<")
    return f"{end.major}.{end.minor - 1}"


@everywhere
def test_what_is_asked_for_is_locked_within_its_range(environment: dict[str, str]) -> None:
    versions = locked(environment)
    for each in here(lock.requirement_lines(), environment):
        assert versions[canonicalize_name(each.name)] in each.specifier, each


@everywhere
def test_the_ranges_of_the_package_hold_what_is_locked(environment: dict[str, str]) -> None:
    versions = locked(environment)
    for name, ranges in of_package().items():
        assert versions[name] in ranges, name
        assert versions[name] < bound(ranges, "<"), name


def test_the_package_ends_at_the_newest_release_that_was_run_where_minor_releases_broke_it() -> None:
    newest = locked(markers("Linux", "3.13.0"))
    for name in ("transformers", "peft"):
        assert newest_run(of_package()[name]) == f"{newest[name].major}.{newest[name].minor}"
        (by_hand,) = [each for each in map(Requirement, lock.requirement_lines()) if each.name == name]
        assert by_hand.specifier == of_package()[name]


def test_the_lock_holds_versions_and_nothing_else() -> None:
    for line in lock.lock_lines():
        requirement = Requirement(line)
        assert requirement.url is None and not requirement.extras, line  # pip takes neither as a constraint
        operator = "<=" if re.match("cuda-|nvidia-|triton", line) else "=="
        assert [each.operator for each in requirement.specifier] == [operator], line
    text = lock.LOCK.read_text(encoding="utf-8")
    assert text.startswith(lock.HEADER)
    body = text.removeprefix(lock.HEADER)
    assert "/" not in body and not re.search("^-", body, re.MULTILINE)  # no address, no path, no option of pip


@pytest.mark.parametrize("name", lock.REQUIREMENTS)
def test_the_requirements_take_their_versions_from_the_lock(name: str) -> None:
    file = ROOT / name
    constraints = re.findall(r"^-c (\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(file.parent / each).resolve() for each in constraints] == [lock.LOCK]


def test_every_range_has_its_reason() -> None:
    for name in lock.REQUIREMENTS:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert re.search(r"# \S", line), line


def test_the_lock_begins_with_the_oldest_python() -> None:
    assert PYPROJECT["project"]["requires-python"] == f">={lock.OLDEST_PYTHON}"
    assert PYTHONS[0].startswith(lock.OLDEST_PYTHON + ".")


def test_a_torch_for_an_older_cuda_fits_into_the_lock() -> None:
    environment = markers("Linux", "3.12.1")
    versions = {name: str(version) for name, version in locked(environment).items()}
    assert lock.differences(versions, environment) == []
    of_cuda_12 = {"torch": "2.13.0+cu126", "cuda-toolkit": "12.6.3", "cuda-bindings": "12.9.5"}
    assert lock.differences(versions | of_cuda_12, environment) == []


def sentences() -> dict[str, str]:
    """What each README must say of the versions that were run."""
    pythons = [line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line]
    ranges = of_package()
    words = [f"{pythons[0]} to {pythons[-1]}"]
    words += [f"{name} {bound(ranges[name], '>=')} to {newest_run(ranges[name])}" for name in ("torch", "transformers")]
    english = ", ".join(words)
    chinese = "、".join(words).replace(" to ", " 至 ")
    return {
        "README.md": f"Python {lock.OLDEST_PYTHON} or later (run on {english}).",
        "README_zh.md": f"需要 Python {lock.OLDEST_PYTHON} 或更高版本（在 Python {chinese} 上运行过）。",
    }


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_readme_says_which_versions_were_run(readme: str) -> None:
    assert sentences()[readme] in (ROOT / readme).read_text(encoding="utf-8")


def test_differences_name_what_is_not_as_locked() -> None:
    environment = markers("Linux", "3.11.7")
    versions = locked(environment)
    as_locked = {"torch": f"{versions['torch']}+cpu", "Jinja2": str(versions["jinja2"]), "pip": "23.2.1"}
    assert lock.differences(as_locked, environment) == []
    moved = {"transformers": "5.17.0", "some_thing": "1.0"}
    assert lock.differences(as_locked | moved, environment) == [
        "some-thing 1.0, not in the lock",
        f"transformers 5.17.0, locked {versions['transformers']}",
    ]
