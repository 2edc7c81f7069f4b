"""LoRA as PEFT has it: all linear layers, rsLoRA, DoRA, initialisations; merging into a quantised base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import chatglm
from chatglm import export
from chatglm.adapters.lora import requantization_error
from chatglm.quantization.layers import QuantizedLayer
from ptuning import main as program
from tiny_folders import make_folder
from tuning import arguments, losses, make_tuner, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")

LORA = ["--method", "lora", "--learning_rate", "0.01", "--lora_dropout", "0", "--lora_rank", "4"]
KINDS = {
    "all-linear": ["--lora_target_modules", "all-linear"],
    "rsLoRA": ["--use_rslora"],
    "DoRA": ["--use_dora"],
    "gaussian": ["--init_lora_weights", "gaussian"],
    "PiSSA": ["--init_lora_weights", "pissa"],
    "OLoRA": ["--init_lora_weights", "olora", "--use_rslora"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "chatglm3-tiny", 3)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(100, 130)[None]
    found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("gaussian", "OLoRA") else []) for kind in KINDS]
)
def test_an_adapter_answers_as_it_was_trained_and_goes_on(kind: str, base: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "train.json"), tmp_path / "out"
    argv = arguments(base, rows, out, *LORA, *KINDS[kind], "--max_steps", "4", "--save_steps", "2")
    untuned = logits(chatglm.load(base, "cpu")[0])
    tuner = make_tuner(argv, tmp_path)
    assert torch.allclose(logits(tuner.model), untuned, atol=1e-4)  # it begins as the base
    tuner.train()
    trained = logits(tuner.model)
    loaded = chatglm.load(base, "cpu", adapter=out / "checkpoint-4")[0]
    assert torch.allclose(logits(loaded), trained, atol=1e-4)
    assert (trained - untuned).abs().max() > 1e-3
    config = json.loads((out / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["use_rslora"] == ("--use_rslora" in KINDS[kind]) and config["use_dora"] == (kind == "DoRA")
    assert len(config["target_modules"]) == (4 if kind == "all-linear" else 1)
    if kind in ("PiSSA", "OLoRA"):
        assert config["init_lora_weights"] is True and config["r"] == 8
    # A resumed run is the unbroken one.
    assert program.main([*argv, "--resume_from_checkpoint", str(out / "checkpoint-2"), "--baseline_samples", "0"]) == 0
    again = json.loads((out / "trainer_state.json").read_text())["log_history"]
    found = {entry["step"]: entry["loss"] for entry in again if "loss" in entry}
    assert found == pytest.approx(losses(tuner), abs=1e-4)


WRONG = {
    "unknown": (["--init_lora_weights", "eva"], "--init_lora_weights eva: use one of default, gaussian, orthogonal"),
    "two": (["--init_lora_weights", "pissa", "--use_dora"], "--init_lora_weights pissa and --use_dora: use one"),
    "quantised": (["--use_dora", "--quantization_bit", "4"], "--use_dora computes with the weights of the base"),
    "svd": (["--init_lora_weights", "pissa_niter_4", "--quantization_bit", "8"], "pissa_niter_4 computes with the"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra, message = WRONG[case]
    assert program.main(arguments("x", write_rows(tmp_path / "train.json"), tmp_path, *LORA, *extra)) == 2
    assert message in capsys.readouterr().err


def test_a_base_that_is_quantised_already(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    int4 = tmp_path / "int4"
    model, tokenizer = chatglm.load(base, "cpu", quantize=4)
    model.save_pretrained(int4)
    tokenizer.save_pretrained(int4)
    rows = write_rows(tmp_path / "train.json")
    assert program.main(arguments(int4, rows, tmp_path / "out", *LORA, "--use_dora")) == 2
    assert "--use_dora computes with the weights of the base, and this one is quantised" in capsys.readouterr().err

    # LoRA on it, and merged into it: the error is told, and is what the merged weights show.
    argv = arguments(int4, rows, tmp_path / "out", *LORA, "--lora_target_modules", "all-linear", "--max_steps", "4",
                     "--lora_alpha", "400")  # fmt: skip
    assert program.main(argv) == 0
    adapter, out = tmp_path / "out" / "checkpoint-4", tmp_path / "merged"
    capsys.readouterr()
    assert export.main([str(int4), str(adapter), str(out)]) == 1
    assert "or add --requantize" in capsys.readouterr().err
    assert export.main([str(int4), str(adapter), str(out), "--requantize"]) == 0
    told = capsys.readouterr().out
    with_adapter = chatglm.load(int4, "cpu", adapter=adapter)[0].requires_grad_(False)
    error = requantization_error(with_adapter)
    assert f"rounding errs by {error:.0%} of what the LoRA adapter changes" in told and error > 0.01
    merged = chatglm.load(out, "cpu")[0]
    lost = added = 0.0
    quantised = {name: module for name, module in merged.named_modules() if isinstance(module, QuantizedLayer)}
    for name, layer in with_adapter.named_modules():
        if name in quantised and hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight(with_adapter.current_adapter)
            lost += float((quantised[name].dequantize() - layer.get_base_layer().dequantize() - delta).square().sum())
            added += float(delta.square().sum())
    assert added and (lost / added) ** 0.5 == pytest.approx(error, rel=1e-3)


WHOLE = ["--modules_to_save", "output_layer", "final_layernorm"]


@pytest.mark.parametrize("kind", ["plain", "PiSSA", "INT4", "bfloat16"])
def test_layers_that_are_trained_as_a_whole(kind: str, base: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "train.json"), tmp_path / "out"
    extra = {"plain": ["--use_dora"], "PiSSA": ["--init_lora_weights", "pissa"], "INT4": ["--quantization_bit", "4"],
             "bfloat16": ["--dtype", "bfloat16"]}[kind]  # fmt: skip
    argv = arguments(base, rows, out, *LORA, *WHOLE, *extra, "--max_steps", "4", "--save_steps", "2")
    bits, dtype, atol = (4 if kind == "INT4" else None), ("bfloat16" if kind == "bfloat16" else "auto"), 1e-4
    untuned = logits(chatglm.load(base, "cpu", dtype, quantize=bits)[0])
    tuner = make_tuner(argv, tmp_path)
    assert torch.allclose(logits(tuner.model), untuned, atol=1e-4 if kind != "bfloat16" else 0.05)
    tuner.train()
    trained = logits(tuner.model)
    assert (trained - untuned).abs().max() > 1e-2
    names = {name for name, one in tuner.model.named_parameters() if one.requires_grad and "lora_" not in name}
    assert {name.partition(".modules_to_save.")[0].rsplit(".", 1)[-1] for name in names} == set(WHOLE[1:])
    assert all(one.dtype == torch.float32 for one in tuner.model.parameters() if one.requires_grad)
    loaded = chatglm.load(base, "cpu", dtype, adapter=out / "checkpoint-4", quantize=bits)[0]
    assert torch.allclose(logits(loaded), trained, atol=atol)
    with loaded.adapter(None):
        assert torch.equal(logits(loaded), untuned)
    argv += ["--resume_from_checkpoint", str(out / "checkpoint-2"), "--baseline_samples", "0"]
    assert program.main(argv) == 0  # a resumed run is the unbroken one
    again = json.loads((out / "trainer_state.json").read_text())["log_history"]
    found = {entry["step"]: entry["loss"] for entry in again if "loss" in entry}
    assert found == pytest.approx(losses(tuner), abs=1e-4)
    assert program.main([*argv, "--modules_to_save", "final_layernorm"]) == 2  # another checkpoint than this run's
    if kind == "plain":
        assert export.main([str(base), str(out / "checkpoint-4"), str(tmp_path / "merged")]) == 0
        merged = chatglm.load(tmp_path / "merged", "cpu")[0]
        assert torch.allclose(logits(merged), trained, atol=atol) and merged.adapter_names == []


NOT_WHOLE = {
    "unknown": (3, ["lm_head"], [], "--modules_to_save: no layer is called lm_head: this model has "),
    "a part": (3, ["mlp"], [], "--modules_to_save: mlp is a part with several layers: this model has dense"),
    "quantised": (3, ["dense"], ["--quantization_bit", "4"], "--modules_to_save: the weights of dense are quantised"),
    "tied": (1, ["lm_head"], [], "--modules_to_save: lm_head is tied to another layer"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_layers_that_cannot_be_trained_as_a_whole(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, names, extra, message = NOT_WHOLE[case]
    base = make_folder(tmp_path / f"chatglm{version}-tiny", version)
    rows = write_rows(tmp_path / "train.json")
    argv = arguments(base, rows, tmp_path / "out", *LORA, "--modules_to_save", *names, *extra)
    assert program.main([*argv, "--gradient_checkpointing", "False"]) == 2
    assert message in capsys.readouterr().err
    argv = arguments(base, rows, tmp_path / "out", "--pre_seq_len", "4", "--modules_to_save", *names)
    assert program.main(argv) == 2
    assert "--modules_to_save is for --method lora, and this is ptuning" in capsys.readouterr().err
