"""Hub ids against a hub on this machine: the lines of every model card, revisions, mirrors, the cache alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatglm import load
from fake_hub import FakeHub
from tiny_folders import make_folder, to_bin

ROOT = Path(__file__).resolve().parents[1]
CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py")
#: Repository -> generation, bits, other values of its config.json, and the card whose lines are run.
CARDS: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "THUDM/chatglm-6b": (1, 0, {}, "chatglm_6b"),
    "THUDM/chatglm-6b-int4": (1, 4, {}, "chatglm_6b"),
    "THUDM/chatglm-6b-int8": (1, 8, {}, "chatglm_6b"),
    "THUDM/chatglm2-6b": (2, 0, {}, "chatglm2_6b"),
    "THUDM/chatglm2-6b-int4": (2, 4, {}, "chatglm2_6b"),
    "THUDM/chatglm2-6b-32k": (2, 0, {"rope_ratio": 50}, "chatglm2_6b"),
    "THUDM/chatglm3-6b": (3, 0, {}, "quantised"),
    "THUDM/chatglm3-6b-32k": (3, 0, {"rope_ratio": 50}, "chatglm2_6b"),
    "THUDM/chatglm3-6b-base": (3, 0, {}, "base"),
    "zai-org/chatglm3-6b": (3, 0, {}, "chatglm2_6b"),
}


#: A fine-tuned ChatGLM2 whose config.json has lost its name: only its tokenizer_config.json has one.
TUNED = "somebody/tuned"


def publish(folder: Path, name: str, version: int, bits: int = 0, **changes: Any) -> Path:
    """A folder as the originals published it: names inside, no stated generation, and code that must not run."""
    make_folder(folder, version, **changes)
    if bits:
        model, _ = load(folder, quantize=bits)
        model.save_pretrained(folder)
    to_bin(folder)
    for file in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / file).read_text())
        for key in ("chatglm_version", "quantization_config", "is_base_model", "added_tokens_decoder"):
            values.pop(key, None)
        values["_name_or_path" if file == "config.json" else "name_or_path"] = name
        values["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        if file == "config.json":
            values["auto_map"] = {
                "AutoConfig": "configuration_chatglm.ChatGLMConfig",
                "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            }
        (folder / file).write_text(json.dumps(values))
    for code in CODE:
        (folder / code).write_text("raise SystemExit('code of the repository was run')\n")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("published")
    repositories = {}
    for name, (version, bits, changes, _) in CARDS.items():
        repositories[name] = {"main": publish(root / name, name, version, bits, **changes)}
    repositories["THUDM/chatglm-6b"]["v1.0"] = publish(root / "v1.0", "THUDM/chatglm-6b", 1, num_layers=1)
    tuned = publish(root / TUNED, "THUDM/chatglm2-6b", 2, seq_length=2048)
    values = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(values | {"_name_or_path": "output"}))
    repositories[TUNED] = {"main": tuned}
    with FakeHub(repositories).running() as running:
        yield running


def run(hub: FakeHub, cache: Path, *cards: tuple[str, str], **environment: str) -> tuple[list[dict[str, Any]], str]:
    """Runs the lines of cards with this hub and this cache; returns what each gave, and what was said."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in names and "PROXY" not in name.upper()}
    variables = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    command = [sys.executable, "-m", "published_lines", json.dumps(cards)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT / "tests", timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_the_lines_of_every_card_through_a_mirror(hub: FakeHub, tmp_path: Path) -> None:
    hub.requests.clear()
    cards = [(card, name) for name, (_, _, _, card) in CARDS.items()]
    cards += [("revision", "THUDM/chatglm-6b"), ("model_first", TUNED)]
    results, said = run(hub, tmp_path, *cards)
    for name, result in zip(CARDS, results, strict=False):
        version, bits, _, card = CARDS[name]
        assert (result["name"], result["generation"], result["layers"]) == (name, version, 2)
        assert result["quantized"] == bool(bits or card == "quantised")
        assert isinstance(result["answer"], str)
        if card != "base":
            assert result["turns"] == (1 if card == "quantised" else 2) * (2 if version == 3 else 1)
    assert results[-2]["layers"] == 1 and "snapshots" in results[-2]["answer"]
    assert results[-1]["generation"] == 2
    assert "taken for" not in said
    assert not [request for request in hub.requests if request.startswith("GET") and request.endswith(".py")]
    # What was fetched needs no hub: the mirror is gone, and nobody asks for it.
    again, _ = run(FakeHub({}), tmp_path, ("chatglm2_6b", "THUDM/chatglm2-6b"), HF_HUB_OFFLINE="1", HF_ENDPOINT="")
    assert again[0]["answer"] == results[list(CARDS).index("THUDM/chatglm2-6b")]["answer"]


def test_local_files_only_asks_nobody(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--chatglm2-tiny"
    make_folder(repository / "snapshots" / ("0" * 40), 2)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("0" * 40)
    model, _ = load("somebody/chatglm2-tiny", revision="v2", local_files_only=True)
    assert model.config.chatglm_version == 2
    for revision, words in ((None, "of this name on"), ("v3", "of this name at revision 'v3' on")):
        with pytest.raises(OSError, match=f"no hub model {words} this machine: load it once without local_files_only"):
            load("somebody/chatglm2-tiny", revision=revision, local_files_only=True)
    with pytest.raises(OSError, match="local_files_only"):
        load("nobody/chatglm9-6b", local_files_only=True)
