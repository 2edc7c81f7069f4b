"""Fixtures for all tests: golden data and the marker for tests that need it, checkpoint folders, an old name."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

# One thread, as the models are tiny. Set before torch is imported, and also for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# If DeepSpeed is installed, transformers imports it, and it prints to standard output that it finds no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"

needs_shared = pytest.mark.skipif(
    not (SHARED / "goldens").is_dir(), reason=f"the golden data of the originals is not at {SHARED}"
)


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Gradient checkpointing, with the options of `torch.utils.checkpoint`."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers are the same in each run, whatever other tests this process has run before: that is chance."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def kernels_from_the_first_product() -> None:
    """No test sees its products change from torch's to ours in the middle, when the compiler is ready."""
    from chatglm import kernels

    kernels.LOADING_SECONDS = 600.0


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that tries to reach the network; the environment names no model."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"something wants to reach the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)


@pytest.fixture(scope="session", params=[1, 2, 3], ids=["v1", "v2", "v3"])
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder of each generation; for reading only."""
    from tiny_folders import make_folder

    return make_folder(tmp_path_factory.mktemp("any") / f"v{request.param}", request.param)


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint folder of generation 3; for reading only."""
    from tiny_folders import make_folder

    return make_folder(tmp_path_factory.mktemp("whole") / "chatglm3-tiny", 3)


@pytest.fixture
def folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole_folder, tmp_path / "broken"))
