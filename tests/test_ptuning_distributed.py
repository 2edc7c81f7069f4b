"""Fine-tuning with several processes: two on this machine's CPU, which talk through gloo.

With the same rows in each optimizer step, results equal those of one process. The two start once for all tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import chatglm
from ptuning import main
from several_processes import without_dropout
from tiny_folders import make_folder
from tuning import METHODS, arguments, write_rows

pytest.importorskip("datasets")
pytest.importorskip("peft")
TESTS = Path(__file__).resolve().parent
PTUNING = TESTS.parent / "ptuning"
ROWS, HELD_OUT, STEPS = 11, 7, 4  # neither number of rows fills the last batches
CASES = {"ptuning": 3, "lora": 1, "full": 3}  # method: generation
MORE = {"lora": ["--modules_to_save", "final_layernorm"]}
RATES = {"ptuning": "1e-2", "lora": "1e-2", "full": "1e-3"}


def command(case: str, folder: Path, output: str, processes: int, *extra: str) -> list[str]:
    """Training, evaluation and predictions, with 4 rows in an optimizer step however many processes there are."""
    held_out = str(folder / "dev.json")
    model = folder / f"chatglm{CASES[case]}"
    return arguments(
        model, folder / "train.json", folder / output, "--do_eval", "--do_predict", "--validation_file", held_out,
        "--test_file", held_out, "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "2",
        "--gradient_accumulation_steps", str(4 // processes), "--max_steps", str(STEPS), "--save_steps", "2",
        "--learning_rate", RATES[case], "--predict_with_generate", *METHODS[case], *MORE.get(case, ()), *extra,
    )  # fmt: skip


def start(jobs: list[dict[str, Any]], folder: Path, *launcher: str, status: int = 0) -> dict[str, list[dict[str, Any]]]:
    """What each process wrote about each job; `status` is that of the whole."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "LANG": "en_US.UTF-8", "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    words = [sys.executable, "-m", *launcher, str(TESTS / "several_processes.py"), str(folder / "jobs.json")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    told = [path.read_text("utf-8")[-3000:] for path in sorted(folder.glob("*.[01].json"))]
    assert done.returncode == status, "\n".join([done.stdout[-3000:], done.stderr[-6000:], *told])
    return {
        job["name"]: [json.loads((folder / f"{job['name']}.{rank}.json").read_text("utf-8")) for rank in (0, 1)]
        for job in jobs
    }


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("several")
    for version in set(CASES.values()):
        make_folder(found / f"chatglm{version}", version)
    write_rows(found / "train.json", ROWS)
    write_rows(found / "dev.json", HELD_OUT)
    bad = found / "bad.json"
    bad.write_text('{"prompt": "1", "response": "2"}\n{"prompt": 3, "response": "4"}\n')
    return found


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All jobs of two processes, which are started once."""
    jobs: list[dict[str, Any]] = [{"name": case, "argv": command(case, folder, f"{case}-2", 2)} for case in CASES]
    checkpoint = str(folder / "ptuning-2" / "checkpoint-2")
    resumed = command("ptuning", folder, "resumed-2", 2, "--resume_from_checkpoint", checkpoint)
    faults = {fault: command("ptuning", folder, fault, 2) for fault in ("nan", "error")}
    bad = command("ptuning", folder, "bad", 2, "--train_file", str(folder / "bad.json"))
    jobs += [{"name": "resumed", "argv": resumed}, {"name": "bad", "argv": bad}]
    jobs += [{"name": fault, "argv": argv, "fault": fault} for fault, argv in faults.items()]  # "error" ends them
    return start(jobs, folder, *TORCHRUN, status=1)


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """main.py in this process, into the folder whose name is returned."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache-1")

    def run(case: str, output: str, *extra: str) -> Path:
        with without_dropout():
            assert main.main(command(case, folder, output, 1, *extra)) == 0
        return folder / output

    return run


def curve(output: Path) -> list[tuple[int, float, float]]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry]


def close(one: Any, other: Any) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=2e-5)


def predictions(output: Path) -> list[dict[str, str]]:
    text = (output / "generated_predictions.txt").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def results(output: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / "all_results.json").read_text())
    return found


def same_run(one: Path, other: Path) -> None:
    """The loss of each step, the held-out loss, what is answered to which question, and the scores."""
    close(curve(one), curve(other))
    mine, theirs = results(one), results(other)
    for name in theirs:
        if name in ("eval_loss", "predict_loss") or "bleu" in name or "rouge" in name:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert predictions(one) == predictions(other)
    assert len(predictions(one)) == HELD_OUT == mine["predict_samples"]


# ---- torchrun --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(case: str, runs: Any, folder: Path, alone: Any) -> None:
    """11 rows, 4 in a step: the last step of each epoch has fewer for one process than for the other."""
    assert [run["status"] for run in runs[case]] == [0, 0], runs[case][0]["printed"]
    same_run(folder / f"{case}-2", alone(case, f"{case}-1"))


@pytest.mark.parametrize("case", CASES)
def test_one_process_reads_the_checkpoint(case: str, runs: Any, folder: Path, alone: Any) -> None:
    checkpoint = folder / f"{case}-2" / f"checkpoint-{STEPS}"
    argv = [word for word in command(case, folder, f"{case}-again", 1) if word not in ("--do_train", "--do_eval")]
    argv = argv[: -len(METHODS[case])]
    if case == "full":
        argv += ["--model_name_or_path", str(checkpoint)]
        model, _ = chatglm.load(checkpoint, device="cpu")
        assert model.config.chatglm_version == CASES[case]
    else:
        argv += ["--ptuning_checkpoint", str(checkpoint)]
    assert main.main(argv) == 0
    assert predictions(folder / f"{case}-again") == predictions(folder / f"{case}-2")


def test_everything_is_written_and_said_once(runs: Any, folder: Path) -> None:
    for case in CASES:
        first, second = (run["printed"] for run in runs[case])
        assert second.replace("\n", "") == "", second
        assert first.count("untuned model") == 1
        names = {path.name for path in (folder / f"{case}-2").iterdir()}
        checkpoints = {name for name in names if name.startswith("checkpoint-")}
        assert checkpoints == {"checkpoint-2", "checkpoint-4"}  # and nothing half-written
        assert not any(name.startswith(("tmp-", "old-")) for name in names)


def test_one_process_makes_the_tokens_and_the_others_read_them(runs: Any) -> None:
    first, second = runs["ptuning"]
    assert (first["made"], second["made"]) == (ROWS + HELD_OUT, 0)  # the held-out rows are also the test file


def test_resuming_goes_on_as_if_unbroken(runs: Any, folder: Path, alone: Any) -> None:
    assert [run["status"] for run in runs["resumed"]] == [0, 0], runs["resumed"][0]["printed"]
    same_run(folder / "resumed-2", folder / "ptuning-2")
    checkpoint = str(folder / "ptuning-2" / "checkpoint-2")
    same_run(alone("ptuning", "resumed-1", "--resume_from_checkpoint", checkpoint), folder / "ptuning-2")


def test_bad_data_ends_both_with_one_message(runs: Any, folder: Path) -> None:
    told = [run["printed"] for run in runs["bad"]]
    assert [run["status"] for run in runs["bad"]] == [1, 1]
    assert sum(text.count("error: ") for text in told) == 1
    assert f"{folder / 'bad.json'}:2: " in "".join(told)


def test_a_loss_that_is_no_number_in_one_process_ends_both(runs: Any, folder: Path) -> None:
    told = [run["printed"] for run in runs["nan"]]
    assert [run["status"] for run in runs["nan"]] == [1, 1]
    assert sum(text.count("error: ") for text in told) == 1 and "Traceback" not in "".join(told)
    assert re.search(r"error: step 2: the loss is nan: lower --learning_rate", "".join(told))


def test_an_error_in_one_process_ends_both(runs: Any, folder: Path) -> None:
    told = [run["printed"] for run in runs["error"]]
    assert [run["status"] for run in runs["error"]] == [1, 1]
    assert sum(text.count("error: ") for text in told) == 1 and "Traceback" not in "".join(told)
    assert "error: broken on purpose" in told[1]


# ---- the configurations that ship ------------------------------------------------------------------------------------


def test_the_fsdp_configuration_is_accelerates() -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    found = load_config_from_file(str(PTUNING / "fsdp.yaml"))
    assert (found.distributed_type, found.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    known = set(FullyShardedDataParallelPlugin.__dataclass_fields__) | {"fsdp_version"}
    assert {name.removeprefix("fsdp_") for name in found.fsdp_config} <= {name.removeprefix("fsdp_") for name in known}


@pytest.mark.parametrize("version", [1, 3])
def test_what_is_wrapped_as_a_unit_is_in_the_network(version: int) -> None:
    """FSDP and a device map take these names of classes for the blocks of the network."""
    from tiny_chat import pair

    model, _ = pair(version)
    classes = [type(module).__name__ for module in model.modules()]
    assert [classes.count(name) for name in model._no_split_modules] == [model.config.num_layers]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_configurations_are_deepspeeds(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    values = json.loads((PTUNING / {2: "deepspeed.json", 3: "deepspeed_zero3.json"}[stage]).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own code
        from deepspeed.runtime.config import DeepSpeedConfig

        zero = DeepSpeedConfig({"train_batch_size": 1} | _without_auto(values)).zero_config
    assert (zero.stage, zero.gather_16bit_weights_on_model_save) == (stage, stage == 3)


def _without_auto(value: Any) -> Any:
    """`auto` is what transformers fills in from the arguments."""
    if not isinstance(value, dict):
        return value
    return {name: _without_auto(one) for name, one in value.items() if one != "auto"}


# ---- pieces of a model in each process -------------------------------------------------------------------------------

ACCELERATE = ("accelerate.commands.launch", "--config_file", str(PTUNING / "fsdp.yaml"), "--num_processes", "2")
SHARDED = {
    "fsdp": ((*ACCELERATE, "--mixed_precision", "no", "--main_process_port", "0"), ()),
    "zero2": (TORCHRUN, ("--deepspeed", str(PTUNING / "deepspeed.json"))),
    "zero3": (TORCHRUN, ("--deepspeed", str(PTUNING / "deepspeed_zero3.json"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_training(kind: str, folder: Path, alone: Any) -> None:
    """The curve of one process, the checkpoint read by one process, and resuming."""
    launcher, extra = SHARDED[kind]
    if kind != "fsdp":
        pytest.importorskip("deepspeed")
    jobs = [{"name": f"{kind}-{case}", "argv": command(case, folder, f"{kind}-{case}", 2, *extra)} for case in CASES]
    checkpoint = str(folder / f"{kind}-full" / "checkpoint-2")
    resumed = command("full", folder, f"{kind}-resumed", 2, *extra, "--resume_from_checkpoint", checkpoint)
    for job in [*jobs, {"name": f"{kind}-resumed", "argv": resumed}]:  # neither library takes a second model well
        found = start([job], folder, *launcher)[job["name"]]
        assert [run["status"] for run in found] == [0, 0], found[0]["printed"]
    for case in CASES:
        same_run(folder / f"{kind}-{case}", alone(case, f"{kind}-{case}-1"))
    same_run(folder / f"{kind}-resumed", folder / f"{kind}-full")
    model, _ = chatglm.load(folder / f"{kind}-full" / f"checkpoint-{STEPS}", device="cpu")
    assert model.config.chatglm_version == CASES["full"]
    for case in ("ptuning", "lora"):
        base = folder / f"chatglm{CASES[case]}"
        model, _ = chatglm.load(base, device="cpu", adapter=folder / f"{kind}-{case}" / f"checkpoint-{STEPS}")
        assert len(model.adapter_names) == 1
