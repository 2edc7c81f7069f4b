"""The tensor-parallel plans: two processes hold half of each matrix and say what one process says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from chatglm.configuration_chatglm import ChatGLM1Config, ChatGLM3Config

CONFIGS = {
    "generation 1, tied": ChatGLM1Config(
        vocab_size=512, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=128,
        max_sequence_length=64, mask_token_id=500, gmask_token_id=501, bos_token_id=502, eos_token_id=503,
        initializer_range=0.2,
    ),
    "generation 3": ChatGLM3Config(
        padded_vocab_size=512, hidden_size=64, num_layers=2, num_attention_heads=4, kv_channels=16,
        multi_query_group_num=2, ffn_hidden_size=96, seq_length=64, initializer_range=0.2,
    ),
}  # fmt: skip
WORKER = """
import sys
import torch
import torch.distributed
import transformers
import chatglm
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt", weights_only=True)
model = transformers.AutoModel.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
split = sum(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
assert split >= 8, split
with torch.no_grad():
    logits = model(input_ids=expected["ids"]).logits
assert (logits - expected["logits"]).abs().max() < 1e-4
torch.distributed.barrier()
torch.distributed.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_say_what_one_says(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 400, (2, 12))
    ids[:, -2], ids[:, -1] = 501, 502
    model = AutoModel.from_config(CONFIGS[name]).float().eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(input_ids=ids).logits}, tmp_path / "expected.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
