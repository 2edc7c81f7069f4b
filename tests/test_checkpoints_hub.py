"""Hub ids: what is fetched, and what a user without a network gets, and when."""

from __future__ import annotations

import shutil
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from chatglm import load
from chatglm.checkpoints import hub
from chatglm.checkpoints.files import ModelLoadError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def cached(whole_folder: Path, cache: Path) -> str:
    """The commit of the model that was fetched before."""
    commit = "0123456789012345678901234567890123456789"
    repository = cache / "models--somebody--chatglm3-tiny"
    shutil.copytree(whole_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No network; counts the attempts to reach it."""
    tries: list[int] = []

    def request(*args: Any, **kwargs: Any) -> None:
        tries.append(1)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", request)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", request)
    return tries


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network that swallows everything."""
    end = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: end.wait(60))
    monkeypatch.setattr(hub, "SOON", 0.01)
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    yield
    end.set()


def test_without_network_the_error_comes_at_once(unreachable: list[int]) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no folder somebody/chatglm9-6b, .* \(ConnectionError\)"):
        load("somebody/chatglm9-6b")
    assert len(unreachable) == 1


def test_what_was_fetched_before_needs_no_network(cached: str, unreachable: list[int]) -> None:
    model, _ = load("somebody/chatglm3-tiny")
    assert Path(model.name_or_path).name == cached


def test_a_hub_that_does_not_answer(silent: None) -> None:
    with (
        pytest.warns(
            UserWarning, match="the hub has not answered for 0.01 s: waiting up to 0.05 s; without a network"
        ) as told,
        pytest.raises(ModelLoadError, match="and the hub cannot be reached \\(TimeoutError\\): download it elsewhere"),
    ):
        load("somebody/chatglm9-6b")
    assert told[0].filename == __file__  # not a line of ours


def test_what_was_fetched_before_needs_no_answer(cached: str, silent: None) -> None:
    with pytest.warns(UserWarning, match="the hub has not answered"):
        assert hub.fetch("somebody/chatglm3-tiny").name == cached


def test_a_slow_answer_is_an_answer(whole_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()

    def model_info(self: Any, repo_id: str, **kwargs: Any) -> Any:
        assert told.wait(60)
        return types.SimpleNamespace(siblings=[])

    def warn(message: str, stacklevel: int) -> None:
        assert "has not answered" in message
        told.set()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(whole_folder))
    monkeypatch.setattr(hub, "SOON", 0.01)
    monkeypatch.setattr(warnings, "warn", warn)
    assert hub.fetch("somebody/chatglm3-tiny") == whole_folder


@pytest.mark.parametrize("names", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model-00001-of-00008.bin"]])
def test_from_the_hub_come_data_and_one_kind_of_weights(
    whole_folder: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    asked: dict[str, Any] = {}

    def model_info(self: Any, repo_id: str, **kwargs: Any) -> Any:
        assert kwargs["revision"] == "v1.0"
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in names])

    def download(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(whole_folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load("somebody/chatglm3-tiny", revision="v1.0")
    kind = "*.safetensors" if "model.safetensors" in names else "*.bin"
    assert asked == {
        "repo_id": "somebody/chatglm3-tiny", "revision": "v1.0", "allow_patterns": ["*.json", "*.model", kind]
    }  # fmt: skip
