"""Time and memory of loading a full-shape 6B model: `python -m benchmarks.load_6b FOLDER`.

Makes a checkpoint with the published shapes and random bfloat16 weights in FOLDER (12.5 GB), then, in a fresh process,
loads it with `chatglm.load` and generates a few tokens. Prints the peak resident memory beside the size of the weights,
and the loading time beside that of a plain read of the same files. Drops the files from the page cache before each of
the two, if the system allows it. Deletes the checkpoint at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import chatglm
from chatglm.chat import CHAT_MODELS
from chatglm.checkpoints import file_names
from chatglm.checkpoints.memory import readable
from chatglm.configuration_chatglm import ChatGLMConfig
from chatglm.demo import with_vocabulary_of
from chatglm.loading import model_class

SHARD = 2 * 10**9  # bytes, as in the published repositories
TINY = {
    1: {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "inner_hidden_size": 128},
    2: {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "kv_channels": 32, "ffn_hidden_size": 96},
}  # fmt: skip
TINY[3] = TINY[2]


def make(folder: Path, generation: int, tiny: bool) -> None:
    """Writes a checkpoint with the published shapes, random weights in shards and the vocabulary of a demo model."""
    demo = with_vocabulary_of(generation)
    for path in demo.iterdir():
        if path.suffix == ".model" or path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(path, folder)
    tokenizer = json.loads((folder / file_names.TOKENIZER_CONFIG).read_text())
    (folder / file_names.TOKENIZER_CONFIG).write_text(json.dumps(tokenizer | {"chatglm_version": generation}))
    # The sizes are the defaults of the config classes; the ids have to be those of the vocabulary.
    known = json.loads((demo / file_names.CONFIG).read_text())
    ids = {name: value for name, value in known.items() if "token_id" in name}
    values = {"chatglm_version": generation, "dtype": "bfloat16"} | ids | (TINY[generation] if tiny else {})
    config = ChatGLMConfig.from_dict({"model_type": "chatglm"} | values)
    config.save_pretrained(folder)
    write_weights(folder, config, check_disk=not tiny)


def write_weights(folder: Path, config: ChatGLMConfig, silent: Sequence[int] = (), *, check_disk: bool = True) -> None:
    """Writes random bfloat16 weights for `config` in shards; the `silent` tokens are never the likeliest."""
    with torch.device("meta"):
        model = model_class(config)(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if check_disk:
        size = 2 * sum(shape.numel() for shape in shapes.values())
        free = shutil.disk_usage(folder).free
        if free < size * 1.02:
            raise SystemExit(f"the disk of {folder} has {readable(free)} free, {readable(size)} are needed")
    output = model.get_output_embeddings().weight
    head = next(name for name, parameter in model.named_parameters() if parameter is output)
    torch.manual_seed(0)
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, shape in shapes.items():
        room -= 2 * shape.numel()
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD - 2 * shape.numel()
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        print(f"writing {file}", file=sys.stderr)
        # Standard deviation 0.02, as in initialised models; the weights of norms are 1.
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if "norm" in name and name.endswith("weight")
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
            for name in names
        }
        if silent and head in tensors:
            tensors[head][list(silent)] = 0
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = folder / f"{file_names.SAFETENSORS}{file_names.INDEX}"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(folder: Path, tokens: int, device: str, dtype: str) -> dict[str, Any]:
    """The time and memory that this process needs to read the files, load the model and generate."""
    files = sorted(folder.glob("*.safetensors"))
    forget(files)
    start = time.perf_counter()
    buffer = bytearray(2**24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    read_seconds = time.perf_counter() - start
    forget(files)

    before, own = peak_memory(), OwnMemory()
    start = time.perf_counter()
    model, tokenizer = chatglm.load(folder, device=device, dtype=dtype)
    load_seconds = time.perf_counter() - start
    after_load = peak_memory()
    inputs = tokenizer("你好", return_tensors="pt").to(model.device)
    times = []
    with torch.inference_mode():
        for length in (1, tokens):
            start = time.perf_counter()
            model.generate(**inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length)
            times.append(time.perf_counter() - start)
    return {
        "weights": sum(path.stat().st_size for path in files),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "before": before,
        "after_load": after_load,
        "peak": peak_memory(),
        "own": own.peak,
        "read_seconds": read_seconds,
        "load_seconds": load_seconds,
        "first_seconds": times[0],
        "all_seconds": times[1],
    }


def forget(files: list[Path]) -> None:
    """Asks the system to drop the files from its cache, so that reads come from the disk."""
    if hasattr(os, "posix_fadvise"):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class OwnMemory(threading.Thread):
    """The peak of the memory without pages of files, which the system reclaims when needed; Linux only."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        status = Path("/proc/self/status")
        while found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text() if status.is_file() else ""):
            self.peak = max(self.peak, int(found[1]) * 1024)
            time.sleep(0.02)


def peak_memory() -> int:
    """The peak of resident bytes so far, mapped file pages included."""
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, which on Linux includes the peak of the parent process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(result: dict[str, Any], tokens: int) -> None:
    grown = result["peak"] - result["before"]
    rest = (result["all_seconds"] - result["first_seconds"]) / max(1, tokens - 1)
    print(f"weights on disk                     {readable(result['weights'])}")
    print(f"computed in                         {result['dtype']} on {result['device']}")
    print(f"resident before loading             {readable(result['before'])}")
    print(f"peak while loading                  {readable(result['after_load'])}")
    print(f"peak with {tokens} tokens generated       {readable(result['peak'])}")
    print(f"  of it not pages of files          {readable(result['own'])}")
    print(f"peak over the start, to weights     {grown / result['weights']:.3f}")
    print(f"plain read of the files             {result['read_seconds']:.1f} s")
    print(f"chatglm.load                        {result['load_seconds']:.1f} s")
    print(f"first token (reads what is mapped)  {result['first_seconds']:.1f} s")
    print(f"every further token                 {rest:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder, on a disk with 13 GB free")
    parser.add_argument("--generation", type=int, choices=sorted(CHAT_MODELS), default=3)
    parser.add_argument("--tokens", type=int, default=8, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="as chatglm.load takes it (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="as chatglm.load takes it (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--tiny", action="store_true", help="a toy shape, to try the script out")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.tokens, args.device, args.dtype)))
        return
    try:
        args.folder.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"{args.folder} exists: name a new folder")
    try:
        make(args.folder, args.generation, args.tiny)
        command = [sys.executable, "-m", "benchmarks.load_6b", *sys.argv[1:], "--measure"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report(json.loads(done.stdout), args.tokens)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
