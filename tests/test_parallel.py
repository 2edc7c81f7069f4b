"""Tensor parallelism over processes: the results of one process, to the last bit where weights are quantised."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm import load
from chatglm.parallel import Group, ParallelError, load_parallel
from chatglm.parallel import group as parallel
from chatglm.parallel.group import parse_address
from chatglm.parallel.layers import ShardedLinear
from ports import free_port
from scripted import SECONDS
from tiny_adapters import make_lora, make_prefix
from tiny_folders import error_of, make_folder
from tiny_glm4 import make_glm4

ROOT = Path(__file__).resolve().parents[1]
SECOND = """
import sys
from chatglm.parallel import Group, work
group = Group.join(1, 2, sys.argv[1])
for name, bits in zip(sys.argv[2::2], sys.argv[3::2]):
    work(name, group, "float32", quantize=int(bits) or None)
"""


def second_process(address: str, cases: list[tuple[Path, int]]) -> subprocess.Popen[bytes]:
    words = [str(part) for case in cases for part in case]
    return subprocess.Popen([sys.executable, "-c", SECOND, address, *words], cwd=ROOT)


def answers(model: Any, tokenizer: Any) -> tuple[torch.Tensor, Any]:
    """The logits of a prompt, and a greedy chat."""
    ids = tokenizer("你好 world", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits, model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=6)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """One second process for everything: it is the import of the libraries that takes time."""
    cases: list[tuple[Path, int]] = []
    for version in (1, 2, 3, 4):
        folder = make_glm4(tmp_path / "v4") if version == 4 else make_folder(tmp_path / f"v{version}", version)
        packed = tmp_path / f"packed{version}"
        shutil.copytree(folder, packed)
        (packed / "model.safetensors").unlink()
        load(folder, quantize=4)[0].save_pretrained(packed)
        cases += [(folder, 0), (folder, 8), (packed, 0)]
    tied = make_folder(tmp_path / "tied", 3, tie_word_embeddings=True)
    prefix = make_prefix(tmp_path / "prefix", load(tied)[0])
    lora = make_lora(tmp_path / "lora", load(tied)[0])
    cases += [(tied, 4)]
    address = f"127.0.0.1:{free_port()}"
    child = second_process(address, cases)
    group = Group.start(2, address)
    for folder, bits in cases:
        options: dict[str, Any] = {"quantize": bits or None, "adapter": prefix if folder == tied else None}
        model, tokenizer = load_parallel(folder, group, "float32", **options)
        ours, wanted = answers(model, tokenizer), answers(*load(folder, dtype="float32", **options))
        if bits or folder.name.startswith("packed"):
            assert torch.equal(ours[0], wanted[0]), (folder.name, bits)
        assert (ours[0] - wanted[0]).abs().max() < 1e-5, folder.name
        assert ours[1] == wanted[1]
        shared = [one for one in model.modules() if isinstance(one, ShardedLinear)]
        assert shared and all(len(one.own.weight) == one.out_features // 2 for one in shared)
        group.release()
    assert "merge it first" in error_of(lambda: load_parallel(tied, group, adapter=lora), ValueError)
    group.close()
    assert child.wait(SECONDS) == 0


def test_the_program_starts_the_others_and_an_end_of_one_is_an_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 1)
    group = Group.start(2, arguments=["--model", str(folder), "--quantize", "4", "--dtype", "float32"])
    model, tokenizer = load_parallel(folder, group, "float32", quantize=4)
    alone = load(folder, dtype="float32", quantize=4)
    assert torch.equal(answers(model, tokenizer)[0], answers(*alone)[0])
    (child,) = group._children
    child.kill()
    child.wait()
    assert "has ended" in error_of(lambda: answers(model, tokenizer), ParallelError)
    group.close()


def test_a_process_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ANSWER_SECONDS", 2)
    folder = make_folder(tmp_path / "folder", 1)
    group = Group.start(2, arguments=["--model", str(folder), "--dtype", "float32"])
    model, tokenizer = load_parallel(folder, group, "float32")
    (child,) = group._children
    child.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # the reason stays, though the connections are closed since
            assert "not answered for 2 s" in error_of(lambda: answers(model, tokenizer), ParallelError)
    finally:
        child.kill()
    group.close()


def test_what_an_interrupted_product_leaves_is_not_taken_for_the_next(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", 1)
    group = Group.start(2, arguments=["--model", str(folder), "--dtype", "float32"])
    model, tokenizer = load_parallel(folder, group, "float32")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    layer = next(module for module in model.modules() if isinstance(module, ShardedLinear))
    hook = layer.own.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        answers(model, tokenizer)
    hook.remove()
    assert "out of step" in error_of(lambda: answers(model, tokenizer), ParallelError)
    group.close()


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:99999", "host:x"])
def test_addresses(text: str) -> None:
    assert "HOST:PORT" in error_of(lambda: parse_address(text), ValueError)


def test_a_process_alone_is_none() -> None:
    assert "two processes or more" in error_of(lambda: Group.start(1), ValueError)
