"""Packed rows: the losses and gradients of padded ones, in every generation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_chat
from ptuning import data
from ptuning.packing import Packer, PackingError, first_example
from tiny_folders import make_folder
from tuning import METHODS, arguments, losses, make_tuner, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    count = int((batch["labels"] != -100).sum())
    inputs = {name: value for name, value in batch.items() if name != "tokens"}
    loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), [one.grad.clone() for one in model.parameters() if one.requires_grad]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("version", "method"), [(1, "ptuning"), (1, "full"), (2, "ptuning"), (2, "full"), (3, "lora")])
def test_packed_and_padded_rows_learn_the_same(version: int, method: str, attention: str, tmp_path: Path) -> None:
    base = make_folder(tmp_path / f"chatglm{version}", version)
    argv = arguments(base, write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS[method])
    tuner = make_tuner(argv, tmp_path)
    model = tuner.model.eval()
    model.set_attn_implementation(attention)
    for one in model.parameters():  # a fresh LoRA adds nothing
        if one.requires_grad and one.dim() > 1:
            torch.nn.init.normal_(one, std=0.05)
    rows = [tuner.train_dataset[index] for index in range(8)]
    packed = Packer(model)(rows)
    assert packed["input_ids"].shape == (1, packed["tokens"].sum())
    assert packed["cu_seq_lens_q"].diff()[0].tolist() == [len(row["input_ids"]) for row in rows]
    pad = tuner.processing_class.pad_token_id
    alone, together = gradients(model, data.Collator(pad)(rows)), gradients(model, packed)
    assert together[0] == pytest.approx(alone[0], abs=2e-5)
    for one, other in zip(alone[1], together[1], strict=True):
        assert torch.allclose(one, other, atol=1e-5 + 1e-4 * float(one.abs().max()))
    one = gradients(model, data.Collator(pad)(rows[:1]))
    del packed["tokens"]
    assert gradients(model, first_example(packed))[0] == pytest.approx(one[0], abs=2e-5)


def test_a_packed_run_has_the_losses_of_a_padded_one(tmp_path: Path) -> None:
    base, rows = make_folder(tmp_path / "chatglm3", 3), write_rows(tmp_path / "train.json")
    found = []
    for name, extra in (("padded", []), ("packed", ["--packing"])):
        argv = arguments(base, rows, tmp_path / name, *METHODS["ptuning"], *extra, "--max_steps", "4",
                         "--per_device_train_batch_size", "4", "--learning_rate", "0.05")  # fmt: skip
        tuner = make_tuner(argv, tmp_path)
        for module in tuner.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its masks depend on the shape
        before = tuner.evaluate(tuner.train_dataset)["eval_loss"]  # not packed
        tuner.train()
        found.append([before, *losses(tuner).values()])
        told = [entry for entry in tuner.state.log_history if "loss" in entry]
        assert all(entry["tokens_per_second"] > 0 for entry in told) and told[-1]["seconds_left"] == 0
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 3])
def test_a_packed_row_has_the_logits_of_its_examples(version: int) -> None:
    model = tiny_chat.pair(version)[0].eval()
    start = [model.config.gmask_token_id, model.config.bos_token_id] if version == 1 else []
    examples = [torch.tensor([[5 + number, 6, *start, *range(7, 7 + length)]])
                for number, length in enumerate((3, 40, 1, 38, 12))]  # fmt: skip
    ends = torch.tensor([0, *(one.shape[1] for one in examples)]).cumsum(0)
    row = torch.cat(examples, 1)
    found = model(input_ids=row, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=48, max_length_k=48).logits
    for one, part in zip(examples, found.split([one.shape[1] for one in examples], 1), strict=True):
        torch.testing.assert_close(part, model(input_ids=one).logits, rtol=1e-4, atol=1e-4)
    some = torch.zeros_like(row, dtype=torch.bool)
    some[0, 7:50:3] = True
    assert torch.allclose(model(input_ids=row, cu_seq_lens_q=ends, logits_to_keep=some).logits, found[some], atol=1e-4)
    mask = torch.ones_like(row)
    for wrong in ({"cu_seq_lens_q": ends + 1}, {"cu_seq_lens_q": ends, "attention_mask": mask}, {"max_length_q": 9},
                  {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends + 1}):  # fmt: skip
        with pytest.raises(ValueError, match="cu_seq_lens_"):
            model(input_ids=row, **wrong)


def test_other_attention_is_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    with pytest.raises(PackingError, match="--packing needs sdpa or eager attention"):
        Packer(model)
