"""`python -m tools.wheel` builds the sdist and the wheel, and tries the wheel in an environment of its own.

The wheel is built from the sdist, as pip would do it. The new environment borrows the libraries of the one that runs
this, so that torch is not installed again; our packages come from the wheel alone. Another one has no libraries at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.environments import borrow_libraries
from tools.lock import ROOT

FOLDERS = (".ci", "benchmarks", "chatglm", "docs", "evaluation", "ptuning", "tests", "tools")
PACKAGES = ("chatglm", "ptuning")
COMMANDS = ("chat", "web", "serve", "tune", "export", "doctor", "kernels")
_GENERATED = ("__pycache__", "*.py[cod]", "*.so", "output")
_NOT_IN_THE_WHEEL = (".md", ".sh", ".txt")


class Failed(Exception):
    """Something is missing, or does not work; the message says what."""


# ---- building --------------------------------------------------------------------------------------------------------


def build(folder: Path) -> tuple[Path, Path]:
    """Builds both into `folder` and returns the paths of (sdist, wheel). Needs setuptools in this environment.

    Raises Failed if a file of the repository is missing in one of them.
    """
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*_GENERATED))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, source)
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    sdist = _backend("build_sdist", source, folder)
    with tarfile.open(sdist) as archive:
        _extract(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    _compare("sdist", files, {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()})
    wheel = _backend("build_wheel", unpacked, folder)
    with zipfile.ZipFile(wheel) as packed:
        found = {Path(name) for name in packed.namelist()}
    ours = {path for path in files if path.parts[0] in PACKAGES}
    _compare("wheel", {path for path in ours if path.suffix not in _NOT_IN_THE_WHEEL}, found)
    others = {path.parts[0] for path in found} - set(PACKAGES)
    if [name for name in others if not name.endswith(".dist-info")]:
        raise Failed(f"the wheel installs more than our packages: {sorted(others)}")
    return sdist, wheel


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):  # Python 3.10.12 and later
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


def _backend(hook: str, source: Path, out: Path) -> Path:
    """Calls a hook of setuptools, as pip does, and returns what it has written."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise Failed(f"{hook}: {done.stderr}")
    return out / done.stdout.splitlines()[-1]


def _compare(name: str, wanted: set[Path], found: set[Path]) -> None:
    missing = sorted(path.as_posix() for path in wanted - found)
    if missing:
        raise Failed(f"the {name} lacks {', '.join(missing)}")


# ---- trying ----------------------------------------------------------------------------------------------------------


class Environment:
    """A new virtual environment with the wheel in it, and a folder to work in, where no clone can be imported.

    Args:
        libraries: whether the libraries of the running environment can be imported.
    """

    def __init__(self, folder: Path, wheel: Path, libraries: bool) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        scripts = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python, self.command = str(scripts / "python"), str(scripts / "chatglm")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, str(wheel)], check=True)
        if libraries:
            borrow_libraries(self.python)
        self.work = folder / "work"
        self.work.mkdir()
        own = ("PYTHON", "CHATGLM", "LC_", "LANG")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.variables |= {
            "PYTHONUTF8": "1", "LANG": "en_US.UTF-8", "HF_HUB_OFFLINE": "1", "CHATGLM_HISTORY": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def run(self, *words: str, status: int = 0, says: str = "", errors: int | None = None) -> None:
        """Runs a command. Raises Failed for another exit status, or if its output lacks `says`.

        Args:
            errors: the number of lines on standard error, if that matters.
        """
        shown = " ".join(Path(word).name if word in (self.python, self.command) else word for word in words)
        print(f"+ {shown}", end="", flush=True)
        begin = time.perf_counter()
        done = subprocess.run(
            words, cwd=self.work, env=self.variables, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        print(f"  ({time.perf_counter() - begin:.1f} s)", flush=True)
        told = done.stdout + done.stderr
        lines = len(done.stderr.splitlines())
        if done.returncode != status or says not in told or errors not in (None, lines):
            raise Failed(f"{shown}: exit status {done.returncode}, output:\n{told}")

    @contextlib.contextmanager
    def server(self, *words: str) -> Iterator[str]:
        """A server, once it is healthy; yields its address. Raises Failed if it does not start, or end well."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        print(f"+ chatglm {' '.join(words)} --port {port}", flush=True)
        log = self.work / "server.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [self.command, *words, "--port", str(port)], cwd=self.work, env=self.variables, stderr=file
            )
        url = f"http://127.0.0.1:{port}"
        try:
            while not _healthy(f"{url}/health"):
                if process.poll() is not None:
                    raise Failed(f"the server ended with {process.returncode}:\n{log.read_text(encoding='utf-8')}")
                time.sleep(0.1)
            yield url
            process.send_signal(signal.SIGTERM)
            if process.wait(30) != 0:
                raise Failed(f"the server ended badly at SIGTERM:\n{log.read_text(encoding='utf-8')}")
        finally:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


def try_bare(folder: Path, wheel: Path) -> None:
    """Without a single library: help works, and the rest says in one line what to do."""
    bare = Environment(folder, wheel, libraries=False)
    bare.run(bare.command, "--help", says="usage: chatglm")
    bare.run(bare.command, "chat", "--help", says="usage: chatglm chat")
    for command in ("chat", "web", "serve", "tune", "kernels"):
        bare.run(bare.command, command, status=1, says="python -m chatglm.doctor", errors=1)
    bare.run(bare.command, "doctor", status=1, says="WRONG")


def try_all(folder: Path, wheel: Path) -> None:
    """With all libraries: every command."""
    full = Environment(folder, wheel, libraries=True)
    full.run(full.command, "--version", says="chatglm ")
    for command in COMMANDS:
        full.run(full.command, command, "--help", says=f"usage: chatglm {command}")
    full.run(full.python, "-m", "chatglm", "doctor", says=str(folder))
    data = full.work / "data.json"
    data.write_text(json.dumps({"content": "hello", "summary": "Hello!"}) + "\n", encoding="utf-8")
    code = "from chatglm.demo import DEFAULT; print(DEFAULT)"
    demo = subprocess.run(
        [full.python, "-c", code], cwd=full.work, env=full.variables, check=True, capture_output=True, encoding="utf-8"
    ).stdout.strip()
    tuning = ["--do_train", "--train_file", "data.json", "--prompt_column", "content", "--response_column", "summary"]
    tuning += ["--model_name_or_path", demo, "--output_dir", "out", "--pre_seq_len", "2", "--max_steps", "1"]
    full.run(full.command, "tune", *tuning, "--save_steps", "1", says="chatglm chat --model")
    full.run(full.command, "export", demo, "out/checkpoint-1", "exported", says="exported")
    full.run(full.command, "chat", "--model", "exported", "-p", "hello", "--max-new-tokens", "8")
    with full.server("serve") as url:
        body = json.dumps({"prompt": "hello", "history": []}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            if not json.load(response)["response"]:
                raise Failed("the server has no answer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m tools.wheel", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the sdist and the wheel here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            sdist, wheel = build(folder)
            print(f"built {sdist.name} and {wheel.name}", flush=True)
            try_bare(folder / "bare", wheel)
            try_all(folder / "full", wheel)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy2(path, options.out)
    print("wheel and sdist are well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
