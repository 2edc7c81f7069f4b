"""The trainer of ptuning/ learns and resumes exactly, and its checkpoints survive however a run ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import chatglm
from chatglm.quantization import QuantizedLinear
from ptuning import data
from ptuning.arguments import ArgumentsError, parse
from ptuning.batches import StepSampler
from ptuning.checkpoints import STATE, CheckpointError, last_checkpoint
from ptuning.resuming import check_unchanged
from ptuning.trainer import TrainingError, Tuner
from tiny_chat import FOLDERS
from tiny_folders import make_folder
from tuning import METHODS, arguments, losses, make_tuner, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a tiny random model of a generation."""
    made: dict[int, Path] = {}

    def folder(version: int) -> Path:
        if version not in made:
            made[version] = make_folder(tmp_path_factory.mktemp("models") / f"chatglm{version}", version)
        return made[version]

    return folder


def trained_demo(folder: Path, version: int) -> Path:
    """A demo model of this generation as base: it gives sensible answers, unlike random weights.

    The demo of generation 3 ends its answers with <|user|> and never with </s>: its head gets an ordinary row for that.
    """
    model, tokenizer = chatglm.load(FOLDERS[version], "cpu")
    if version > 1:
        head = model.transformer.output_layer.weight.data
        torch.manual_seed(0)
        head[tokenizer.eos_token_id] = torch.randn(head.shape[1]) * head.std()
    model.save_pretrained(folder)
    for path in FOLDERS[version].iterdir():
        if path.name.startswith("token") or path.suffix == ".model":
            shutil.copy(path, folder)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()) | {"chatglm_version": version}
        values.pop("architectures", None)
        (folder / name).write_text(json.dumps(values))
    return folder


# ---- learning --------------------------------------------------------------------------------------------------------

OVERFIT = {
    "ptuning": ["--pre_seq_len", "16", "--learning_rate", "0.1"],
    "lora": ["--method", "lora", "--learning_rate", "0.01", "--lora_dropout", "0"],
    "full": ["--method", "full", "--learning_rate", "0.001"],
}


class UntilLearned(TrainerCallback):  # type: ignore[misc]
    """Ends a run with the first step whose loss is small."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and logs.get("loss", 1.0) < 0.05:
            control.should_training_stop = True


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_method_learns_one_batch_by_heart(version: int, tmp_path: Path) -> None:
    folder = trained_demo(tmp_path / "base", version)
    rows = write_rows(tmp_path / "train.json", 2)
    for method, options in OVERFIT.items():
        argv = arguments(folder, rows, tmp_path / method, *options, "--max_steps", "40", "--save_strategy", "no",
                         "--lr_scheduler_type", "constant", "--gradient_checkpointing", "False")  # fmt: skip
        tuner = make_tuner(argv, tmp_path)
        tuner.add_callback(UntilLearned())
        tuner.train()
        found = list(losses(tuner).values())
        assert found[-1] < 0.05 < 1 < found[0], method


@pytest.mark.parametrize(("version", "method"), [(1, "ptuning"), (3, "ptuning"), (3, "lora")])
def test_a_quantised_base_gets_no_gradients(version: int, method: str, folders: Any, tmp_path: Path) -> None:
    argv = arguments(folders(version), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS[method],
                     "--quantization_bit", "4", "--max_steps", "2", "--learning_rate", "0.1")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    assert any(isinstance(module, QuantizedLinear) for module in tuner.model.modules())
    before = {name: value.clone() for name, value in tuner.model.named_parameters()}
    tuner.train()
    changed = {name for name, value in tuner.model.named_parameters() if not torch.equal(before[name], value)}
    marker = {"ptuning": "prefix_encoder", "lora": "lora_"}[method]
    assert changed and all(marker in name for name in changed)
    trained = [value for value in tuner.model.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32}


def test_trained_weights_are_float32_beside_a_half_precision_base(folders: Any, tmp_path: Path) -> None:
    for method in ("ptuning", "lora"):
        argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS[method],
                         "--dtype", "bfloat16", "--max_steps", "2", "--learning_rate", "0.1")  # fmt: skip
        tuner = make_tuner(argv, tmp_path)
        tuner.train()
        kinds = {(value.requires_grad, value.dtype) for value in tuner.model.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_unbroken_one(method: str, folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.json")

    def run(name: str, resume: Path | None = None, dropout: str = "0.1") -> Tuner:
        argv = arguments(folders(3), rows, tmp_path / name, *METHODS[method], "--max_steps", "7", "--save_steps", "3",
                         "--learning_rate", "0.05", "--gradient_accumulation_steps", "2")  # fmt: skip
        tuner = make_tuner(argv, tmp_path)  # 2 steps an epoch: 3 is in the middle of one, 6 at the end
        tuner.train(resume_from_checkpoint=None if resume is None else str(resume))
        return tuner

    whole = run("whole")
    expected = losses(whole)
    assert sorted(expected) == list(range(1, 8))
    for step in (3, 6):
        resumed = run(f"again{step}", tmp_path / "whole" / f"checkpoint-{step}")
        assert losses(resumed) == pytest.approx(expected, abs=1e-5)
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_the_command_wins_over_the_checkpoint(folders: Any, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "train.json"), tmp_path / "out"

    def make(*extra: str) -> Tuner:
        return make_tuner(arguments(folders(3), rows, out, *METHODS["ptuning"], "--learning_rate", "0.05", *extra,
                                    "--lr_scheduler_type", "constant"), tmp_path)  # fmt: skip

    make("--max_steps", "4", "--save_steps", "4").train()
    again = make("--max_steps", "8", "--save_steps", "3", "--logging_steps", "2", "--learning_rate", "0.01",
                 "--weight_decay", "0.1")  # fmt: skip
    again.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 6, 8)}
    assert (again.state.save_steps, again.state.logging_steps) == (3, 2)
    assert [step for step in losses(again) if step > 4] == [6, 8]
    (group, *_) = again.optimizer.param_groups
    assert group["lr"] == 0.01 and group["weight_decay"] in (0, 0.1)
    assert any(one["weight_decay"] == 0.1 for one in again.optimizer.param_groups)
    rates = {entry["step"]: entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry}
    assert rates[4] == 0.05 and rates[6] == 0.01


FIXED = {
    "rows": (["--gradient_accumulation_steps", "2"], "4 rows per step .*made with 2.*its place in the data"),
    "seed": (["--seed", "7"], "--seed 7: a resumed run cannot change it .*made with 42.*another order"),
    "optimizer": (["--optim", "sgd"], "--optim sgd: a resumed run cannot change it .*adamw_torch.*another optimizer"),
}


@pytest.mark.parametrize("case", FIXED)
def test_what_a_resumed_run_cannot_change_is_refused(case: str, folders: Any, tmp_path: Path) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"])
    make_tuner([*argv, "--max_steps", "1"], tmp_path).train()
    extra, message = FIXED[case]
    checkpoint = tmp_path / "out" / "checkpoint-1"
    same = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    check_unchanged(checkpoint, parse([*argv, *same, "--max_steps", "9", "--learning_rate", "1"]).training)
    with pytest.raises(ArgumentsError, match=message):
        check_unchanged(checkpoint, parse([*argv, *extra]).training)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_the_umask_decides_who_may_read_a_checkpoint(folders: Any, tmp_path: Path) -> None:
    rows, before = write_rows(tmp_path / "train.json"), os.umask(0o027)
    try:
        for method, options in METHODS.items():
            make_tuner(arguments(folders(3), rows, tmp_path / method, *options, "--max_steps", "1"), tmp_path).train()
            folder = tmp_path / method / "checkpoint-1"
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}, method
            assert folder.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)


def test_losses_are_fetched_once_per_step(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would wait each time."""
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--gradient_accumulation_steps", "4", "--max_steps", "3", "--logging_steps", "100")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    fetched: list[int] = []
    check = Tuner._check_losses
    monkeypatch.setattr(Tuner, "_check_losses", lambda self: fetched.append(self.state.global_step) or check(self))
    step = Tuner.training_step

    def watched(self: Tuner, *args: Any, **kwargs: Any) -> torch.Tensor:
        inside = self.accelerator.sync_gradients
        with pytest.MonkeyPatch.context() as patch:
            if not inside:  # between the steps, nothing may turn a tensor into a number
                for name in ("__float__", "item", "tolist", "__bool__"):
                    patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("fetched between the steps"))
            return step(self, *args, **kwargs)

    monkeypatch.setattr(Tuner, "training_step", watched)
    tuner.train()
    assert fetched == [0, 1, 2]


def test_a_checkpoint_holds_only_what_was_trained(folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.json")
    weights = {"ptuning": "model.safetensors", "lora": "adapter_model.safetensors", "full": "model.safetensors"}
    for method, options in METHODS.items():
        tuner = make_tuner(arguments(folders(3), rows, tmp_path / method, *options, "--max_steps", "1"), tmp_path)
        tuner.train()
        folder = tmp_path / method / "checkpoint-1"
        names = {path.name for path in folder.iterdir()}
        assert weights[method] in names and not any(name.endswith(".bin") for name in names)
        contents = chatglm.checkpoints.files.read_contents(folder / weights[method])
        wanted = {"ptuning": "transformer.prefix_encoder.", "lora": "base_model.model.", "full": "transformer."}
        assert contents and all(name.startswith(wanted[method]) for name in contents)
        assert ("tokenizer_config.json" in names) == (method == "full")
        if method == "full":
            model, _ = chatglm.load(folder, "cpu")
            assert model.config.use_cache
        else:
            model, _ = chatglm.load(folders(3), "cpu", adapter=folder)
        ours = dict(tuner.model.state_dict())
        assert all(torch.equal(value, ours[name.replace("checkpoint-1", "default")])
                   for name, value in model.state_dict().items())  # fmt: skip


# ---- what ends a run -------------------------------------------------------------------------------------------------


class _At(TrainerCallback):  # type: ignore[misc]
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_a_checkpoint(
    number: signal.Signals, folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "9", "--save_steps", "100", "--learning_rate", "0.1")  # fmt: skip
    before = signal.getsignal(number)
    tuner = make_tuner(argv, tmp_path)
    tuner.add_callback(_At(2, lambda: os.kill(os.getpid(), number)))
    tuner.train()
    assert tuner.interrupted and tuner.state.global_step in (2, 3)
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / f"checkpoint-{tuner.state.global_step}"
    assert "stopping after this step" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_the_second_interrupt_ends_at_once(folders: Any, tmp_path: Path) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "9")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    tuner.add_callback(_At(2, twice))
    with pytest.raises(KeyboardInterrupt):
        tuner.train()


def test_a_full_disk_leaves_the_last_checkpoint(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "6", "--save_steps", "2")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    save = torch.save

    def full(thing: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if tuner.state.global_step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*checkpoint-2"):
        tuner.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    again = make_tuner(argv, tmp_path)
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "out")))
    assert again.state.global_step == 6


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from tuning import make_tuner
from ptuning.trainer import Tuner
save = Tuner._save_rng_state
def die(self, folder):
    save(self, folder)
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Tuner._save_rng_state = die
make_tuner({argv!r}, Path({cache!r})).train()
"""


def test_killed_while_saving(folders: Any, tmp_path: Path) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "6", "--save_steps", "2", "--learning_rate", "0.1")  # fmt: skip
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), argv=argv, cache=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    last = last_checkpoint(tmp_path / "out")
    assert last is not None and last.name == "checkpoint-2"
    whole = make_tuner([*argv, "--output_dir", str(tmp_path / "whole")], tmp_path)
    whole.train()
    resumed = make_tuner(argv, tmp_path)
    resumed.train(resume_from_checkpoint=str(last))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    assert not list((tmp_path / "out").glob("tmp-*"))


def test_last_checkpoint_is_the_one_written_last(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for number, name in enumerate(("checkpoint-3000", "checkpoint-1000", "old-checkpoint-20", "tmp-checkpoint-30")):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_text("{}")
        os.utime(tmp_path / name / STATE, ns=(number, number))
    (tmp_path / "checkpoint-9").mkdir()  # of something else
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"  # its replacement was interrupted
    shutil.rmtree(tmp_path / "checkpoint-20")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"


def test_only_so_many_checkpoints_are_kept(folders: Any, tmp_path: Path) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "2")  # fmt: skip
    make_tuner(argv, tmp_path).train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "the loss is nan: lower --learning_rate"),
                                                (0.0, "exactly 0 for 10 batches")])  # fmt: skip
def test_a_loss_that_means_trouble_stops_with_a_diagnosis(
    value: float, message: str, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "20")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    compute = Tuner.compute_loss
    monkeypatch.setattr(Tuner, "compute_loss", lambda self, *a, **k: compute(self, *a, **k) * 0 + value)
    with pytest.raises(TrainingError, match=message):
        tuner.train()


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["ptuning"],
                     "--max_steps", "3")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    tuner.model.transformer.prefix_encoder.embedding.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="step 1: a gradient is not finite"):
        tuner.train()
    assert torch.isfinite(tuner.model.transformer.prefix_encoder.embedding.weight).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("saving", [["--save_steps", "1"], ["--save_strategy", "no"], ["--save_strategy", "epoch"]])
def test_a_step_that_spoils_the_weights_is_not_kept(
    method: str, saving: list[str], folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS[method], *saving,
                     "--max_steps", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "0.01")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)

    class Spoils(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:  # counted after it: the fourth, which is the last one
                next(one for one in model.parameters() if one.requires_grad).data.fill_(float("nan"))

    tuner.add_callback(Spoils())
    with pytest.raises(TrainingError, match="step 4: the trained weights are not finite after it: lower"):
        tuner.train()
    kept = ["checkpoint-1", "checkpoint-2", "checkpoint-3"] if "1" in saving else []
    assert sorted(path.name for path in (tmp_path / "out").glob("*")) == kept


def test_a_last_step_that_went_too_far_is_told(folders: Any, tmp_path: Path) -> None:
    """The weights are finite, but the loss is no longer."""
    argv = arguments(folders(3), write_rows(tmp_path / "train.json"), tmp_path / "out", *METHODS["full"],
                     "--max_steps", "2", "--learning_rate", "1e10", "--save_steps", "1")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    with pytest.raises(TrainingError, match=r"step 2: the loss after it is nan: lower --learning_rate \(it is 1e\+10"):
        tuner.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


# ---- batches and predictions -----------------------------------------------------------------------------------------


def test_the_order_of_rows() -> None:
    lengths = [(7 * row) % 101 for row in range(1003)]
    orders = []
    for epoch in (0, 1, 0):
        sampler = StepSampler(1003, 8, lengths, seed=1)
        sampler.epoch = epoch
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(1003)) and len(sampler) == 1003
    spread = [max(lengths[row] for row in step) - min(lengths[row] for row in step)
              for step in (orders[0][place : place + 8] for place in range(0, 1000, 8))]  # fmt: skip
    assert sum(spread) / len(spread) < 5  # about 78 at random
    means = [sum(lengths[row] for row in orders[0][place : place + 8]) for place in range(0, 1000, 8)]
    assert means != sorted(means)  # steps of all lengths in turn
    assert sorted(StepSampler(5, 2, None, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("version", [1, 3])
def test_predictions_are_what_chat_answers(version: int, tmp_path: Path) -> None:
    folder = FOLDERS[version]
    argv = arguments(folder, write_rows(tmp_path / "train.json", 6), tmp_path / "out", *METHODS["ptuning"],
                     "--predict_with_generate", "--per_device_eval_batch_size", "4")  # fmt: skip
    tuner = make_tuner(argv, tmp_path)
    output = tuner.predict(tuner.eval_dataset)
    tokenizer = tuner.processing_class
    rows = data.read_rows(tmp_path / "train.json", None, version)
    assert len(output.predictions) == len(output.label_ids) == len(rows) == 6
    for row, ids, wanted in zip(rows, output.predictions, output.label_ids, strict=True):
        question, answer = (message["content"] for message in row.messages)
        stop = {int(index) for index in tuner.stop_ids}
        assert stop.isdisjoint(ids.tolist())
        expected, _ = tuner.model.chat(tokenizer, question, do_sample=False, max_new_tokens=tuner.max_new_tokens)
        text = tokenizer.decode([index for index in ids if index >= 0], skip_special_tokens=True).strip()
        assert chatglm.conversation.clean_response(version, text) == expected
        wanted_text = tokenizer.decode([index for index in wanted if index >= 0]).strip()
        assert wanted_text.replace("!", "！") == answer  # generation 1's tokenizer makes such marks ASCII


def test_the_loss_of_the_untuned_model(folders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.json")
    found = []
    for options in METHODS.values():
        tuner = make_tuner(arguments(folders(3), rows, tmp_path / "out", *options), tmp_path)
        before = tuner.model.current_adapter
        found.append(tuner.baseline(tuner.eval_dataset))
        assert tuner.model.current_adapter == before
    assert found == pytest.approx([found[0]] * 3, abs=1e-5)
