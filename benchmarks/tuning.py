"""Speed of fine-tuning, in turns, in tokens (without padding) per second of CPU time:

python -m benchmarks.tuning padding DATA TOKENIZER             packing, beside rows padded in three ways
python -m benchmarks.tuning peer DATA TOKENIZER --method lora  our trainer, beside transformers' on GlmForCausalLM

The model has ChatGLM3's layers with random weights. DATA: a file that ptuning reads; TOKENIZER: a folder of ChatGLM3.
`OMP_NUM_THREADS=1` makes CPU time a fair measure on a shared machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import torch
import transformers

from chatglm.adapters.lora import add_lora
from chatglm.adapters.prefixes import add_prefix
from chatglm.checkpoints.adapters import import_peft
from chatglm.configuration_chatglm import ChatGLM3Config
from chatglm.modeling_chatglm2 import ChatGLM2ForCausalLM
from chatglm.tokenization_chatglm import ChatGLMTokenizer
from ptuning import data
from ptuning.arguments import parse
from ptuning.encoding import encode_row
from ptuning.methods import ALL_LAYERS
from ptuning.packing import Packer
from ptuning.trainer import Tuner

SOURCE, TARGET, PREFIX, RANK = 64, 128, 32, 8  # as in the originals' train.sh, but for the prefix
PEER_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def make_model(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = ChatGLM3Config(
        num_layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=args.hidden * 8 // 3 // 64 * 64,
        num_attention_heads=args.hidden // 64, kv_channels=64, multi_query_group_num=2, padded_vocab_size=65024,
        torch_dtype="float32",
    )  # fmt: skip
    model = ChatGLM2ForCausalLM(config)
    if args.method == "ptuning":
        add_prefix(model, PREFIX)
    elif args.method == "lora":
        add_lora(model, import_peft().LoraConfig(r=RANK, target_modules=list(ALL_LAYERS)))
    model.config.use_cache = False
    return model


def make_peer(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    ours = args.hidden
    config = transformers.GlmConfig(
        num_hidden_layers=args.layers, hidden_size=ours, intermediate_size=ours * 8 // 3 // 64 * 64,
        num_attention_heads=ours // 64, num_key_value_heads=2, head_dim=64, vocab_size=65024, attention_bias=True,
        tie_word_embeddings=False, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model, peft = transformers.GlmForCausalLM(config), import_peft()
    if args.method == "ptuning":
        return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    if args.method == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=PEER_LAYERS, task_type="CAUSAL_LM"))
    return model


class Clock(transformers.TrainerCallback):  # type: ignore[misc, unused-ignore]
    """CPU time at the end of every step, before our check of the last one: that is once per run, around the steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.process_time())


@dataclasses.dataclass
class Fixed:
    """The originals' batches: every row padded to the limit."""

    pad: int
    width: int = SOURCE + TARGET + 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = torch.full((2, len(examples), self.width), self.pad)
        rows[1] = data.IGNORED
        for number, example in enumerate(examples):
            rows[0, number, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            rows[1, number, : len(example["labels"])] = torch.tensor(example["labels"])
        return {"input_ids": rows[0], "labels": rows[1]}


class Masked(data.Collator):
    """With the mask that transformers' own collators add."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        return batch | {"attention_mask": (batch["input_ids"] != self.pad_token_id).long()}


def flags(args: argparse.Namespace, folder: str, strategy: str) -> list[str]:
    return [
        "--output_dir", folder, "--per_device_train_batch_size", str(args.batch), "--max_steps", str(args.steps),
        "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "--logging_steps", "1",
        "--train_sampling_strategy", strategy, "--learning_rate", "1e-4", "--gradient_checkpointing", "False",
    ]  # fmt: skip


def ours(args: argparse.Namespace, rows: Any, tokenizer: Any, way: str, folder: str) -> Any:
    """The trainer; `way`: originals, padded, grouped, packed, or peer (rows in the order of the file)."""
    strategy = {"grouped": "group_by_length", "peer": "sequential"}.get(way, "random")
    method = ["--pre_seq_len", str(PREFIX)] if args.method == "ptuning" else ["--method", args.method]
    argv = ["--do_train", "--model_name_or_path", "none", "--train_file", args.data, *method]
    training = parse([*argv, *flags(args, folder, strategy)]).training
    model, pad = make_model(args), tokenizer.pad_token_id
    collator: Any = data.Collator(pad, packer=Packer(model) if way == "packed" else None)
    kind: Any = Tuner
    if way == "originals":
        collator = Fixed(pad)

        class Plain(Tuner):
            """With logits everywhere."""

            def compute_loss(self, *given: Any, **more: Any) -> Any:
                self.compute_loss_func = None
                return transformers.Seq2SeqTrainer.compute_loss(self, *given, **more)

        kind = Plain
    return kind(method=args.method, base="none", stop_ids=[2], max_new_tokens=1, model=model, args=training,
                train_dataset=rows, processing_class=tokenizer, data_collator=collator)  # fmt: skip


def peer(args: argparse.Namespace, rows: Any, tokenizer: Any, folder: str) -> Any:
    words = transformers.HfArgumentParser(transformers.TrainingArguments)
    training = words.parse_args_into_dataclasses(flags(args, folder, "sequential"))[0]
    return transformers.Trainer(model=make_peer(args), args=training, train_dataset=rows,
                                data_collator=Masked(tokenizer.pad_token_id))  # fmt: skip


def run(make: Callable[[str], Any], warm: int) -> tuple[float, float, float]:
    """Trains; returns tokens per second of CPU time after the warm-up, CPU time around the steps, and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock, counts = make(folder), Clock(), []
        collate = trainer.data_collator

        def counted(examples: Sequence[Mapping[str, Any]]) -> Any:
            counts.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        trainer.data_collator = counted
        trainer.callback_handler.callbacks.insert(0, clock)
        begin = time.process_time()
        trainer.train()
        end = time.process_time()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = clock.times
    tokens = sum(counts[warm : len(steps)])
    rate = tokens / (steps[-1] - steps[warm - 1])
    around = end - begin - (steps[-1] - steps[warm - 1]) * len(steps) / (len(steps) - warm)
    return rate, around, losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("padding", "peer"))
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--method", choices=("ptuning", "lora", "full"), default="lora")
    for name, value in (("layers", 16), ("hidden", 1024), ("batch", 4), ("steps", 4), ("warm", 1), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ways", nargs="+", default=["originals", "padded", "grouped", "packed"])
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = ChatGLMTokenizer.from_pretrained(args.tokenizer, local_files_only=True, chatglm_version=3)
    read = data.read_rows(args.data, None, tokenizer.chat_format)
    encoded = [encode_row(tokenizer, row, SOURCE, TARGET) for row in read]
    for example in encoded:
        del example["truncated"]
        example["length"] = len(example["input_ids"])
    rows = datasets.Dataset.from_list(encoded)
    makers: dict[str, Callable[[str], Any]] = {}
    if args.what == "padding":
        for way in args.ways:
            makers[way] = partial(ours, args, rows, tokenizer, way)
    else:
        makers["ours"] = partial(ours, args, rows, tokenizer, "peer")
        makers["Trainer, GlmForCausalLM"] = partial(peer, args, rows, tokenizer)
    found: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(args.turns):
        order = list(makers.items())
        for name, make in order if turn % 2 == 0 else reversed(order):
            rate, around, loss = run(make, args.warm)
            gc.collect()
            found[name].append(rate)
            told = f"{rate:.1f} tokens/s, {around:.1f} s around the steps, loss {loss:.4f}"
            print(f"{turn + 1} {name}: {told}", flush=True)
    first = statistics.median(next(iter(found.values())))
    for name, rates in found.items():
        print(f"{name}: {statistics.median(rates):.1f} tokens/s, {statistics.median(rates) / first:.2f} of the first")


if __name__ == "__main__":
    main()
