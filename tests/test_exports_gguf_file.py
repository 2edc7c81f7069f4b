"""GGUF files, read back by the gguf package: the same values, vocabulary and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chatglm import export, load
from chatglm.exports.gguf_file import export_gguf
from chatglm.kernels import reference
from tiny_adapters import make_lora
from tiny_folders import error_of, make_folder

pytestmark = pytest.mark.filterwarnings("ignore:this vocabulary is a unigram model")
gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

#: Columns that are multiples of 32, as in every published model.
WIDE: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 32}


def values(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in float32, by name."""
    found = {}
    for tensor in gguf.GGUFReader(out).tensors:
        array = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        found[tensor.name] = torch.from_numpy(array).reshape(*reversed(tensor.shape.tolist()))
    return found


def setting(out: Path, name: str) -> Any:
    return gguf.GGUFReader(out).fields[name].contents()


@pytest.mark.parametrize("version", (2, 3))
def test_float_weights(version: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", version, **WIDE)
    export_gguf(folder, tmp_path / "out.gguf")
    found, ours = values(tmp_path / "out.gguf"), load_file(folder / "model.safetensors")
    layer = "transformer.encoder.layers.1."
    for theirs, name in (
        ("token_embd.weight", "transformer.embedding.word_embeddings.weight"),
        ("output.weight", "transformer.output_layer.weight"),
        ("output_norm.weight", "transformer.encoder.final_layernorm.weight"),
        ("blk.1.attn_qkv.weight", f"{layer}self_attention.query_key_value.weight"),
        ("blk.1.attn_qkv.bias", f"{layer}self_attention.query_key_value.bias"),
        ("blk.1.ffn_up.weight", f"{layer}mlp.dense_h_to_4h.weight"),
        ("blk.1.ffn_norm.weight", f"{layer}post_attention_layernorm.weight"),
    ):
        assert torch.equal(found[theirs], ours[name]), theirs
    assert len(found) == len(ours)
    config = load(folder)[0].config
    assert setting(tmp_path / "out.gguf", "chatglm.feed_forward_length") == config.ffn_hidden_size
    assert setting(tmp_path / "out.gguf", "chatglm.rope.dimension_count") == config.kv_channels // 2
    assert setting(tmp_path / "out.gguf", "chatglm.attention.head_count_kv") == config.num_key_value_heads


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_quantised_weights_keep_their_values(bits: int, kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, **WIDE)
    load(folder, dtype="float16", quantize=bits)[0].save_pretrained(tmp_path / "quantised")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "quantised" / name).write_bytes((folder / name).read_bytes())
    export_gguf(tmp_path / "quantised", tmp_path / "out.gguf")
    found, ours = values(tmp_path / "out.gguf"), load_file(tmp_path / "quantised" / "model.safetensors")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for theirs, part in (
        ("attn_qkv", "self_attention.query_key_value"),
        ("attn_output", "self_attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ):
        name = f"transformer.encoder.layers.0.{part}.weight"
        wanted = reference.dequantize(ours[name], ours[f"{name}_scale"], bits, torch.float32)
        assert torch.equal(found[f"blk.0.{theirs}.weight"], wanted), theirs
        assert types[f"blk.0.{theirs}.weight"] == kind
    assert types["output.weight"] == "F16"
    reason = error_of(lambda: export_gguf(tmp_path / "quantised", tmp_path / "o.gguf", "q8_0"), ValueError)
    assert "leave out --type" in reason


@pytest.mark.parametrize(
    ("kind", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2), ("q4_0", 0.2)]
)
def test_types_for_float_weights(kind: str, error: float, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, **WIDE)
    export_gguf(folder, tmp_path / "out.gguf", kind)
    ours = load_file(folder / "model.safetensors")["transformer.output_layer.weight"]
    found = values(tmp_path / "out.gguf")["output.weight"]
    assert 0 < ((found - ours).norm() / ours.norm()).item() < error


def test_the_vocabulary_and_the_rope_of_each_generation(tmp_path: Path) -> None:
    for version, ratio in ((2, 8), (3, 50)):
        out = tmp_path / f"{version}.gguf"
        folder = make_folder(tmp_path / f"{version}", version, rope_ratio=ratio, **WIDE)
        export_gguf(folder, out)
        model, tokenizer = load(folder)
        tokens = setting(out, "tokenizer.ggml.tokens")
        assert len(tokens) == model.config.padded_vocab_size
        assert tokens[tokenizer.get_command("sop")] == "<sop>"
        assert tokens[tokenizer.get_command("[gMASK]")] == "[gMASK]"
        assert setting(out, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
        assert setting(out, "tokenizer.chat_template").startswith("[gMASK]<sop>")
        fields = gguf.GGUFReader(out).fields
        if version == 3:
            assert setting(out, "tokenizer.ggml.eot_token_id") == tokenizer.get_command("<|user|>")
            assert setting(out, "chatglm.rope.freq_base") == 10000.0 * ratio
        else:
            assert "tokenizer.ggml.eot_token_id" not in fields
            assert setting(out, "chatglm.rope.scaling.factor") == ratio


def test_lora_and_heads_side_by_side(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 2, multi_query_attention=False, **WIDE)
    lora = make_lora(tmp_path / "lora", load(folder)[0])
    export.export(folder, lora, tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "two.gguf")
    assert export.main([str(folder), str(tmp_path / "one.gguf"), "--to", "gguf", "--adapter", str(lora)]) == 0
    one, two = values(tmp_path / "one.gguf"), values(tmp_path / "two.gguf")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    rows = ours["transformer.encoder.layers.0.self_attention.query_key_value.weight"].unflatten(0, (2, 3, 32))
    assert torch.equal(one["blk.0.attn_qkv.weight"][:64], rows[:, 0].flatten(0, 1))


def test_what_has_no_place_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = make_folder(tmp_path / "narrow", 3, ffn_hidden_size=40)
    reason = error_of(lambda: export_gguf(narrow, tmp_path / "out.gguf", "q4_0"), ValueError)
    assert "no multiple of 32" in reason
    first = make_folder(tmp_path / "first", 1)
    assert "two-dimensional" in error_of(lambda: export_gguf(first, tmp_path / "out.gguf"), ValueError)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install gguf" in error_of(lambda: export_gguf(narrow, tmp_path / "out.gguf"), ImportError)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_unigram_vocabulary_is_reported(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 3, **WIDE)
    with pytest.warns(UserWarning, match="will split some texts otherwise"):
        export_gguf(folder, tmp_path / "out.gguf")
