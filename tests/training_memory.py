"""A program that trains for a few steps and prints the peak of its resident memory above the level before loading.

    python tests/training_memory.py FOLDER SETTINGS

SETTINGS: JSON of the keyword arguments of `ptuning.estimate.estimate`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: F401  # as ptuning/main.py does
import peft
import torch
from transformers import Seq2SeqTrainer  # noqa: F401

import chatglm
from chatglm.adapters import add_lora, add_prefix
from chatglm.loading import DTYPES
from ptuning.estimate import Settings
from ptuning.estimate.rehearsal import checkpoint


def status(name: str) -> int:
    """The bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(folder: str, options: dict[str, Any]) -> int:
    settings = Settings(**options | {"dtype": DTYPES[options["dtype"]]})
    torch.set_num_threads(1)
    level = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    full = settings.method == "full"
    model, _ = chatglm.load(
        folder, "cpu", torch.float32 if full else settings.dtype, quantize=settings.quantize, check_memory=False
    )
    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::1024].sum()  # a long run looks up every row of the embeddings
    if settings.gradient_checkpointing:
        checkpoint(model)
    if settings.method == "ptuning":
        add_prefix(model, settings.pre_seq_len or 0, settings.prefix_projection)
    elif settings.method == "lora":
        add_lora(model, peft.LoraConfig(r=settings.lora_rank, target_modules=list(settings.lora_targets)))
    else:
        model.requires_grad_(True)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=settings.optimizer == "adamw_torch_fused")
    autocast = full and settings.dtype != torch.float32
    for _ in range(2):  # the optimizer's states are there from the second step on
        for _ in range(settings.gradient_accumulation):
            ids = torch.randint(5, 900, (settings.batch_size, settings.sequence_length))
            if model.config.chatglm_version == 1:
                middle = settings.sequence_length // 2
                ids[:, middle], ids[:, middle + 1] = model.config.gmask_token_id, model.config.bos_token_id
            with torch.autocast("cpu", settings.dtype) if autocast else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return status("VmHWM") - level


if __name__ == "__main__":
    print(main(sys.argv[1], json.loads(sys.argv[2])))
