"""Trains a demo checkpoint from scratch: `python -m tools.demo.train --generation 3 --output DIR --seed 0`.

Makes the vocabulary, trains on dialogues made by `corpus.py`, writes the checkpoint and evaluates it. Two CPU cores
are enough. With `--steps` the result depends on the seed alone; with `--minutes` also on the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from chatglm import ChatGLM1Tokenizer, ChatGLM4Tokenizer, ChatGLMTokenizer
from chatglm.chat import (
    ChatGLM1ForConditionalGeneration,
    ChatGLM3ForConditionalGeneration,
    ChatGLM4ForConditionalGeneration,
)
from chatglm.checkpoints.file_names import TOKENIZER_CONFIG
from chatglm.configuration_chatglm import ChatGLM1Config, ChatGLM3Config, ChatGLM4Config
from chatglm.conversation import chat_format
from chatglm.loading import load

from . import byte_vocabulary, optimizing, vocabulary
from .batches import Batch, batches
from .optimizing import Optimization, Schedule, scale_residuals

TOKENS_PER_BATCH = 3072
SCHEDULE = Schedule(warm_up=0.02, decay=0.45, averaged_steps=250)
#: Tokens of a sequence up to which eager attention is faster than sdpa on a CPU.
EAGER_UNTIL = 256
DEFAULT_STEPS = {1: 9200, 3: 7400, 4: 7400}


def make_tokenizer(folder: Path, generation: int, seed: int) -> Any:
    """A new vocabulary in `folder`, as a tokenizer. Needs the package protobuf."""

    tokenizer_class = ChatGLMTokenizer.classes[generation]
    if issubclass(tokenizer_class, ChatGLM4Tokenizer):
        byte_vocabulary.build(folder / tokenizer_class.vocab_files_names["vocab_file"], chat_format(generation), seed)
        values = {"tokenizer_class": "ChatGLM4Tokenizer", "chatglm_version": generation, "padding_side": "left"}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        return ChatGLMTokenizer.from_pretrained(folder)
    ice_text = issubclass(tokenizer_class, ChatGLM1Tokenizer)
    vocabulary.build(folder / tokenizer_class.vocab_files_names["vocab_file"], chat_format(generation), ice_text, seed)
    config: dict[str, Any] = {"tokenizer_class": "ChatGLMTokenizer", "chatglm_version": generation}
    config |= {"do_lower_case": False, "remove_space": False}
    if ice_text:
        config |= {"num_image_tokens": 0, "bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>"}
        config |= {"gmask_token": "[gMASK]", "mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return ChatGLMTokenizer.from_pretrained(folder)


def make_model(tokenizer: Any) -> Any:
    """A randomly initialised network for the vocabulary; all linear sizes are multiples of 32."""
    get = tokenizer.get_command
    size = -(-len(tokenizer) // 64) * 64
    if isinstance(tokenizer, ChatGLM1Tokenizer):
        return ChatGLM1ForConditionalGeneration(
            ChatGLM1Config(
                vocab_size=size, hidden_size=256, num_layers=4, num_attention_heads=8, inner_hidden_size=1280,
                max_sequence_length=2048, bos_token_id=get("<sop>"), eos_token_id=get("<eop>"),
                mask_token_id=get("[MASK]"), gmask_token_id=get("[gMASK]"), pad_token_id=3,
            )
        )  # fmt: skip
    sizes: dict[str, Any] = {
        "padded_vocab_size": size, "hidden_size": 256, "num_layers": 4, "num_attention_heads": 8, "kv_channels": 32,
        "ffn_hidden_size": 896, "multi_query_group_num": 2, "seq_length": 2048,
    }  # fmt: skip
    if isinstance(tokenizer, ChatGLM4Tokenizer):
        stops = tokenizer.chat_format.stop_token_ids(tokenizer)
        sizes |= {"eos_token_id": stops, "pad_token_id": stops[0], "rope_ratio": 1}
        return ChatGLM4ForConditionalGeneration(ChatGLM4Config(**sizes))
    return ChatGLM3ForConditionalGeneration(ChatGLM3Config(**sizes))


@torch.no_grad()
def start_from(model: Any, tokenizer: Any, folder: Path) -> None:
    """Takes the blocks of another checkpoint with the same network, and for each token the mean of the tokens that the
    other vocabulary has for its text."""
    other, pieces = load(folder, device="cpu", dtype="float32")
    state, mine = other.state_dict(), model.state_dict()
    for name, tensor in state.items():
        if mine[name].shape == tensor.shape and "word_embeddings" not in name and "output_layer" not in name:
            mine[name].copy_(tensor)
    for name in ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"):
        for row in range(len(tokenizer)):
            text = tokenizer.token_pieces()[row]
            if text:
                ids = [0] if not text.strip() else pieces.encode_text(text.decode("utf-8", errors="ignore"))
                ids = [id for id in ids if pieces.token_bytes(id).strip()] or ids
            else:
                control = tokenizer.convert_ids_to_tokens(row)
                known = _COMMANDS.get(control, control)
                ids = [pieces.get_command(known)] if known in pieces.commands else []
            if ids:
                mine[name][row] = state[name][ids].mean(0)


_COMMANDS = {"<sop>": "sop", "<eop>": "eop", "<|endoftext|>": "<eos>"}


class Trainer:
    """The network with its optimisers: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, model: Any, compiled: bool, rate: float, fresh: bool = True) -> None:
        self.model = model
        self.is_first = isinstance(model, ChatGLM1ForConditionalGeneration)
        body = model.transformer
        self.layers = body.layers if self.is_first else body.encoder.layers
        self.embedding = model.get_input_embeddings()
        self.head = model.get_output_embeddings()
        if fresh and self.is_first:
            scale_residuals(model, "transformer.layers.")
        if compiled:
            for layer in self.layers:
                layer.compile(dynamic=True)
        matrices = [p for layer in self.layers for p in layer.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        self.optimization = Optimization(model, matrices, others, rate, SCHEDULE)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the learned tokens; the head is computed for them alone."""
        tokens = batch.ids.shape[1]
        self.model.config._attn_implementation = "eager" if tokens < EAGER_UNTIL else "sdpa"
        extra: dict[str, Any] = {}
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        if self.is_first:
            sop = (batch.ids == self.model.config.bos_token_id).int().argmax(-1)[:, None, None, None]
            causal = causal | (torch.arange(tokens) < sop)
            extra["position_ids"] = self.model.transformer.get_position_ids(batch.ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedded = self.embedding(batch.ids).bfloat16()
            mask = torch.zeros(causal.shape, dtype=torch.bfloat16).masked_fill(~causal, -30000.0)
            states = self.model.transformer(
                inputs_embeds=embedded, attention_mask=mask, use_cache=False, **extra
            ).last_hidden_state
            logits = self.head(states[:, :-1][batch.learned[:, 1:]])
        return F.cross_entropy(logits.float(), batch.ids[:, 1:][batch.learned[:, 1:]])


def save(trainer: Trainer, tokenizer: Any, folder: Path) -> None:
    """Writes the averaged weights as a checkpoint."""
    stops = tokenizer.chat_format.stop_token_ids(tokenizer)
    # Sums and names leave no choice: no sampling.
    optimizing.save(make_model(tokenizer), trainer.optimization.average, tokenizer, folder, eos_token_id=stops)


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output)
    work = output.with_name(f".{output.name}.work")
    if arguments.continue_from:
        shutil.copytree(arguments.continue_from, work, dirs_exist_ok=True)
        tokenizer = ChatGLMTokenizer.from_pretrained(work)
        model = make_model(tokenizer)
        model.load_state_dict(type(model).from_pretrained(work, dtype=torch.float32).state_dict())
    else:
        tokenizer = make_tokenizer(work, arguments.generation, arguments.seed)
        model = make_model(tokenizer)
        if arguments.start_from:
            start_from(model, tokenizer, arguments.start_from)
    model = model.float().train()
    fresh = not (arguments.continue_from or arguments.start_from)
    trainer = Trainer(model, arguments.compile, arguments.rate, fresh)
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    start = saved = time.monotonic()
    seen, losses = 0, []
    for step, batch in enumerate(batches(tokenizer, arguments.seed, arguments.tokens)):
        now = time.monotonic()
        share = (now - start) / 60 / arguments.minutes if arguments.minutes else step / arguments.steps
        if share >= 1:
            break
        losses.append(trainer.optimization.step(trainer.loss(batch), share))
        seen += batch.ids.numel()
        if step % arguments.log_every == arguments.log_every - 1:
            spent = time.monotonic() - start
            mean, speed = sum(losses) / len(losses), seen / spent
            print(
                f"step {step + 1}  loss {mean:.4f}  {speed:.0f} tokens/s  {spent:.0f} s, CPU {time.process_time():.0f}",
                flush=True,
            )
            losses = []
        if arguments.save_every and now - saved > 60 * arguments.save_every:
            save(trainer, tokenizer, output)
            saved = now
    save(trainer, tokenizer, output)
    shutil.rmtree(work)
    record = {"generation": arguments.generation, "seed": arguments.seed, "steps": step, "tokens": seen,
              "minutes": round((time.monotonic() - start) / 60, 1)}  # fmt: skip
    print(json.dumps(record), flush=True)
    if arguments.evaluate:
        from .evaluate import evaluate_folder, report

        report(evaluate_folder(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generation", type=int, choices=(1, 3, 4), default=3)
    parser.add_argument("--output", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train this long (the result depends on the machine's speed)")
    length.add_argument("--steps", type=int, help="train this many steps (reproducible)")
    parser.add_argument("--continue-from", type=Path, help="start from this checkpoint and its vocabulary")
    parser.add_argument("--start-from", type=Path, help="start from the blocks of a checkpoint, with a new vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_BATCH, help="tokens of a batch")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the blocks"
    )
    parser.add_argument("--evaluate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=0, help="also save every so many minutes")
    arguments = parser.parse_args()
    if not arguments.minutes and not arguments.steps:
        arguments.steps = DEFAULT_STEPS[arguments.generation]
    train(arguments)


if __name__ == "__main__":
    main()
