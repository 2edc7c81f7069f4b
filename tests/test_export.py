"""`python -m chatglm.export`: a base with its adapter as one checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatglm import adapters, export, load
from tiny_adapters import VERSIONS, error_of, logits, make_lora, make_prefix, tiny
from tiny_folders import make_folder


@pytest.mark.parametrize("version", VERSIONS)
def test_export(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    base = make_folder(tmp_path / "base", version)
    half = load(base, dtype="float16")[0]
    half.save_pretrained(base)
    model, tokenizer = load(base)
    for name, make in (("lora", make_lora), ("prefix", make_prefix)):
        adapter, out = make(tmp_path / name, model), tmp_path / "out" / name
        assert export.main([str(base), str(adapter), str(out)]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == str(out)
        assert printed.err.splitlines()[-1].endswith(f"python cli_demo.py --model {out}")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "peft", None)
            merged, own = load(out)
        assert own("你好")["input_ids"] == tokenizer("你好")["input_ids"]
        if name == "lora":
            assert merged.adapter_names == []
            assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
        kinds = {key: tensor.dtype for key, tensor in load_file(out / "model.safetensors").items()}
        assert all(kind == (torch.float32 if "prefix" in key else torch.float16) for key, kind in kinds.items())
        adapters.load_adapter(unmerged := load(base)[0], adapter)
        error, change = (logits(merged) - logits(unmerged)).norm(), (logits(unmerged) - logits(model)).norm()
        assert error < 0.02 * change
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
        assert export.main([str(base), str(adapter), str(out)]) == 1
        assert "exists already" in capsys.readouterr().err
    quantised = tmp_path / "int4"
    load(base, quantize=4)[0].save_pretrained(quantised)
    assert export.main([str(quantised), str(tmp_path / "lora"), str(tmp_path / "new")]) == 1
    assert "full-precision checkpoint as BASE" in capsys.readouterr().err


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_folder(tmp_path / "base", 3)
    lora = make_lora(tmp_path / "lora", load(base)[0])

    def full(self: Any, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny(3)), "save_pretrained", full)
    assert "No space left" in error_of(lambda: export.export(base, lora, tmp_path / "out" / "new"), OSError)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_base_that_does_not_tell_its_generation(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", 2)
    prefix = make_prefix(tmp_path / "prefix", load(base)[0])
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((base / name).read_text())
        del values["chatglm_version"]
        (base / name).write_text(json.dumps(values))
    assert export.main([str(base), str(prefix), str(tmp_path / "out"), "--chatglm-version", "2"]) == 0
    model, tokenizer = load(tmp_path / "out")
    assert model.config.chatglm_version == tokenizer.chatglm_version == 2
