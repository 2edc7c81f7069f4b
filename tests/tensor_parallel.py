"""Run by test_tensor_parallel.py in two processes: a sharded network gives the results of the whole one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from goldens import causal_lm
from tiny_networks import VERSIONS, text, tiny_model


def main(folder: Path) -> None:
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo")
    for version in VERSIONS:
        model, ids = tiny_model(version), text(version, 9, 4)
        path = folder / str(version)
        if dist.get_rank() == 0:
            model.save_pretrained(path)
        dist.barrier()
        plan = DistributedConfig(tp_plan="auto")
        sharded = causal_lm(version).from_pretrained(path, dtype=torch.float32, distributed_config=plan)
        expected, ours = model(ids).logits, sharded(ids).logits
        difference = ((ours - expected).abs().max() / expected.abs().max()).item()
        name, whole = next((name, tensor) for name, tensor in model.named_parameters() if "query_key_value" in name)
        share = sharded.get_parameter(name).to_local().numel() / whole.numel()
        print(f"generation {version}: same {difference < 1e-5}, share {share}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
