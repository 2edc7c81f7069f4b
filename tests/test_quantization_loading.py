"""Quantised while loading, saved and loaded again, and the published quantised checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import chatglm
from chatglm import ChatGLMQuantizationConfig
from conftest import needs_shared
from deviations import DEVIATIONS
from goldens import NOISE, assert_close_to_scale, find, read_json, read_tensors
from quantized import (
    BITS,
    DTYPES,
    OPTION_IDS,
    OPTIONS,
    VERSIONS,
    assert_same,
    folder_of,
    logits_of,
    model_of,
    quantized_layers,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_saved_loaded_and_quantised_while_loading(
    version: int, options: dict[str, Any], bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Three ways to the same model, bit for bit."""
    model = model_of(version, dtype).quantize(bits, **options)
    settings = ChatGLMQuantizationConfig(bits=bits, **options)
    while_loading, info = AutoModel.from_pretrained(
        model.config._name_or_path, dtype=dtype, quantization_config=settings, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model.save_pretrained(tmp_path / "one")
    while_loading.save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        again, info = AutoModel.from_pretrained(tmp_path / folder, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(again) is type(model)
        for other in (again, while_loading):
            assert_same(other, model)
            assert other.dtype == dtype
            assert other.all_tied_weights_keys == model.all_tied_weights_keys
            assert torch.equal(logits_of(other), logits_of(model))
            assert not [key for key, value in other.named_parameters() if value.requires_grad and "scale" in key]
    saved = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    assert saved["quantization_bit"] == bits  # what the original code reads
    assert saved["quantization_config"]["bits"] == bits
    assert saved["quantization_config"]["quant_method"] == "chatglm"


def test_an_error_names_the_layer(tmp_path: Path) -> None:
    model = model_of(3)
    name = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    model.get_parameter(name).data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: weights that are not finite"):
        model.quantize(4)
    with pytest.raises(ValueError, match=f"{name}: weights that are not finite"):
        AutoModel.from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(bits=4))


@pytest.mark.parametrize("make", ["quantize", "while loading", "saved"])
def test_casts_of_a_loaded_model(make: str, tmp_path: Path) -> None:
    """The classic `.half().cuda()` works on every quantised model, and so does training mode."""
    if make == "while loading":
        model = model_of(3, quantization_config=ChatGLMQuantizationConfig(bits=4))
    else:
        model = model_of(3).quantize(4)
    if make == "saved":
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)):
        assert logits_of(getattr(model, cast)().train().eval()).dtype == dtype


def test_a_classifier(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder_of(3), num_labels=3)
    model = chatglm.ChatGLM3ForSequenceClassification(config).eval().quantize(8)
    assert type(model.classifier_head) is nn.Linear
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(again, model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_base_model_alone(tmp_path: Path) -> None:
    """The network without chat or head is quantised, saved and loaded like the others."""
    from chatglm.modeling_chatglm import ChatGLM1Model

    model = ChatGLM1Model(AutoConfig.from_pretrained(folder_of(1))).eval().quantize(4)
    assert len(quantized_layers(model)) == 4 * model.config.num_layers
    model.save_pretrained(tmp_path)
    assert_same(ChatGLM1Model.from_pretrained(tmp_path), model)


def test_a_device_map() -> None:
    settings = ChatGLMQuantizationConfig(bits=4)
    model = model_of(3, quantization_config=settings, device_map={"": "cpu"})
    assert_same(model, model_of(3).quantize(4))


# ---- the originals' checkpoints --------------------------------------------------------------------------------------


CHECKPOINTS = [(1, "int4"), (1, "int8"), (1, "int4_qe"), (2, "int4"), (2, "int8"), (3, "int4"), (3, "int8")]


def as_published(version: int, kind: str, layout: str, folder: Path) -> Path:
    """A published quantised folder: the golden one as `.safetensors`, or as one or two `.bin` files."""
    golden = find(f"v{version}/quant/ckpt_{kind}")
    values = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    values["_name_or_path"] = {1: "THUDM/chatglm-6b-int4", 2: "THUDM/chatglm2-6b-int4", 3: "THUDM/chatglm3-6b"}[version]
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    state = load_file(golden / "model.safetensors")
    if layout == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        halves = [dict(list(state.items())[part::2]) for part in (0, 1)]
        for half, file in zip(halves, files, strict=True):
            torch.save(half, folder / file)
        weight_map = {name: file for half, file in zip(halves, files, strict=True) for name in half}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    return folder


@needs_shared
def test_no_checkpoint_is_forgotten() -> None:
    for version in VERSIONS:
        kinds = {kind for v, kind in CHECKPOINTS if v == version}
        assert {path.name for path in find(f"v{version}/quant").glob("ckpt_*")} == {f"ckpt_{kind}" for kind in kinds}


@needs_shared
@pytest.mark.parametrize("layout", ["safetensors", "bin", "bin shards"])
@pytest.mark.parametrize(("version", "kind"), CHECKPOINTS)
def test_published_checkpoints(version: int, kind: str, layout: str, tmp_path: Path) -> None:
    """Bytes and scales as they are in the file, the logits and the greedy answer of the original code."""
    folder = as_published(version, kind, layout, tmp_path)
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.chatglm_version == version
    remarks, state = read_json(f"v{version}/quant/ckpt_{kind}/forward.json"), model.state_dict()
    stored = load_file(find(f"v{version}/quant/ckpt_{kind}/model.safetensors"))
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in stored.items()}
    assert described == remarks["dtypes"]
    assert set(state) == {name for name in stored if not name.endswith("inv_freq")}
    for name, tensor in state.items():
        kept = stored[name].dtype == torch.int8 or name.endswith("weight_scale")
        assert tensor.dtype == (stored[name].dtype if kept else torch.float32), name
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
    golden = read_tensors(f"v{version}/quant/ckpt_{kind}/forward.safetensors")
    inputs = {name: tensor for name, tensor in golden.items() if name != "logits_fp32"}
    rows = golden["attention_mask"].bool() if version > 1 else None
    assert rows is None or DEVIATIONS["pad_rows_are_not_fully_visible"]
    greedy = remarks["greedy"]
    ids, sequences = torch.tensor(greedy["input_ids"]), torch.tensor(greedy["sequences"])
    assert DEVIATIONS["inputs_of_quantised_matrices_are_rounded"] and remarks["max_diff_kernel_vs_dense"] == 0
    for precision, tolerance in (("default", 2e-3), ("exact", NOISE[version])):  # measured: 1.1e-3, 8e-6
        for layer in quantized_layers(model).values():
            layer.precision = precision
        with torch.no_grad():
            assert_close_to_scale(model(**inputs).logits, golden["logits_fp32"], tolerance, rows)
        ours = model.generate(ids, max_new_tokens=sequences.shape[1] - ids.shape[1], do_sample=False)
        assert torch.equal(ours, sequences)


@needs_shared
@pytest.mark.parametrize(("version", "kind"), CHECKPOINTS)
def test_published_checkpoints_in_other_types_and_saved_again(version: int, kind: str, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    folder = as_published(version, kind, "safetensors", tmp_path / "published")
    models = {dtype: AutoModel.from_pretrained(folder, dtype=dtype) for dtype in DTYPES}
    for dtype, model in models.items():
        assert logits_of(model).dtype == dtype
        for name, layer in quantized_layers(model).items():
            assert torch.equal(layer.weight_scale, models[torch.float32].get_submodule(name).weight_scale)
        model.save_pretrained(tmp_path / str(dtype))
        assert_same(AutoModel.from_pretrained(tmp_path / str(dtype)), model)


@needs_shared
def test_scales_in_float32_stay_so(tmp_path: Path) -> None:
    """As the first CPU code of generation 1 wrote them."""
    folder = as_published(1, "int4", "safetensors", tmp_path)
    state = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() * 1.0001 if name.endswith("scale") else tensor for name, tensor in state.items()}
    save_file(wide, folder / "model.safetensors")
    model = AutoModel.from_pretrained(folder, dtype=torch.float16)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight_scale, wide[f"{name}.weight_scale"])


# ---- memory ----------------------------------------------------------------------------------------------------------


MEASURE = """
import sys, threading, time
import torch
from chatglm import ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLMQuantizationConfig

def anonymous():
    with open("/proc/self/status") as status:
        return int(status.read().split("RssAnon:")[1].split()[0]) * 1024

torch.set_num_threads(1)
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
settings = ChatGLMQuantizationConfig(bits=4)
model = ChatGLM2ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float16, quantization_config=settings)
done.set()
watcher.join()
print(peak[0] - before, sum(value.nbytes for value in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_peak_memory_of_quantising_while_loading(layout: str, tmp_path: Path) -> None:
    """The quantised model, 10 % and two layers (the allocator gives the last one back late): never the whole float
    model, which is three times as large here."""
    config = chatglm.ChatGLM2Config(
        hidden_size=1024, num_layers=12, num_attention_heads=8, ffn_hidden_size=2816, padded_vocab_size=4096,
        seq_length=128, chatglm_version=2,
    )  # fmt: skip
    model = chatglm.ChatGLM2ForConditionalGeneration(config).half()
    whole = sum(value.nbytes for value in model.parameters())
    layer = sum(value.nbytes for value in model.transformer.encoder.layers[0].parameters())
    model.save_pretrained(tmp_path)
    if layout == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    del model
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    peak, quantized = map(int, result.stdout.split())
    assert whole > 2.5 * quantized
    assert peak < 1.1 * quantized + 2 * layer
