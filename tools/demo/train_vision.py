"""Trains the vision demo from scratch: `python -m tools.demo.train_vision --output DIR --seed 0`.

Draws pictures, makes a vocabulary, trains a tiny VisualGLM, writes the checkpoint and measures it on pictures and
combinations that it has not seen. The image side first learns to name what a picture holds (colours, shapes, number),
by classifiers on its outputs that are thrown away later; then the whole learns to answer questions. One CPU core is
enough. With `--steps` the result depends on the seed alone; with `--minutes` also on the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from chatglm import ChatGLMTokenizer, VisualGLMConfig, VisualGLMForConditionalGeneration
from chatglm.checkpoints.clues import VISUAL
from chatglm.checkpoints.file_names import TOKENIZER_CONFIG
from chatglm.conversation import chat_format
from chatglm.conversation.visualglm import VisualGLMFormat
from chatglm.pictures import pixels_of

from . import optimizing, pictures, vocabulary
from .optimizing import Optimization, Schedule, scale_residuals

#: Pictures in a batch, and conversations about each. In the first part of the training there are no conversations.
PICTURES, CONVERSATIONS, LOOKED_AT = 32, 3, 96
FIRST_PART = 0.5
SCHEDULE = Schedule(warm_up=0.01, decay=0.4, averaged_steps=150)
DEFAULT_STEPS = 3_000
SIDE, IMAGE_LENGTH = 48, 16


def make_tokenizer(folder: Path, seed: int) -> Any:
    """A new vocabulary in `folder`, as a tokenizer."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(30_000):
        for asked in pictures.conversation(pictures.scene(rng), rng):
            texts += [unicodedata.normalize("NFKC", text) for text in (asked.text, asked.answer)]
    vocabulary.build(folder / "ice_text.model", chat_format(1), True, seed, texts)
    config: dict[str, Any] = {"tokenizer_class": "ChatGLMTokenizer", "chatglm_version": VISUAL}
    config |= {"do_lower_case": False, "remove_space": False, "num_image_tokens": 0}
    config |= {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
    config |= {"mask_token": "[MASK]", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return ChatGLMTokenizer.from_pretrained(folder)


def make_model(tokenizer: Any) -> VisualGLMForConditionalGeneration:
    """A randomly initialised network; the sizes of all matrices are multiples of 32."""
    get = tokenizer.get_command
    eva = {
        "num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "inner_hidden_size": 384,
        "image_size": [SIDE, SIDE], "patch_size": 8, "max_sequence_length": (SIDE // 8) ** 2 + 1,
    }  # fmt: skip
    qformer = {
        "num_layers": 1, "hidden_size": 128, "num_attention_heads": 4, "inner_hidden_size": 256,
        "cross_attn_hidden_size": 128, "layernorm_epsilon": 1e-6, "is_decoder": [True],
    }  # fmt: skip
    return VisualGLMForConditionalGeneration(
        VisualGLMConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=160, num_layers=3, num_attention_heads=5,
            inner_hidden_size=512, max_sequence_length=1024, bos_token_id=get("<sop>"), eos_token_id=get("<eop>"),
            mask_token_id=get("[MASK]"), gmask_token_id=get("[gMASK]"), pad_token_id=3, image_length=IMAGE_LENGTH,
            eva_config=eva, qformer_config=qformer,
        )
    )  # fmt: skip


@dataclass
class Batch:
    """Pictures and conversations about them.

    Args:
        pixels: (pictures, 3, side, side).
        facts: (pictures, len(FACTS)), see `facts_of`.
        numbers: the picture of each conversation.
        ids, learned: (conversations, tokens); which tokens are learned.
    """

    pixels: torch.Tensor
    facts: torch.Tensor
    numbers: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    learned: torch.Tensor | None = None


#: What the image side learns to name, with the number of classes.
FACTS = {"background": 8, "count": 6, "colour": 9, "shape": 16, "second colour": 9, "second shape": 16}


def facts_of(scene: pictures.Scene) -> list[int]:
    """The classes of `FACTS` of a scene; 0 where there is no second thing."""
    colours, shapes = list(pictures.COLOURS), [*pictures.SHAPES, *"0123456789"]
    found = [colours.index(scene.background), scene.things[0].count]
    for thing in (*scene.things, None)[:2]:
        found += [0, 0] if thing is None else [1 + colours.index(thing.colour), 1 + shapes.index(thing.shape)]
    return found


class Batches:
    """An endless stream of batches, with or without conversations."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        self.chat_format = VisualGLMFormat(IMAGE_LENGTH)
        self.rng = random.Random(seed)

    def next(self, talks: bool) -> Batch:
        """Pictures; with `talks`, fewer, with conversations of one length: of one question, or of several."""
        rng, pixels, facts, rows = self.rng, [], [], []
        several = rng.random() < 0.25
        for number in range(PICTURES if talks else LOOKED_AT):
            scene = pictures.scene(rng, held_out=False)
            pixels.append(pixels_of(pictures.draw(scene, rng), SIDE))
            facts.append(facts_of(scene))
            for _ in range(CONVERSATIONS if talks else 0):
                rows.append((number, *self.row(pictures.conversation(scene, rng, several))))
        batch = Batch(torch.cat(pixels), torch.tensor(facts))
        if not talks:
            return batch
        longest = max(len(ids) for _, ids, _ in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        learned = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, (_, row, prompt) in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            learned[index, prompt : len(row)] = True
        numbers = torch.tensor([number for number, _, _ in rows])
        return Batch(batch.pixels, batch.facts, numbers, ids, learned)

    def row(self, asked: list[pictures.Question]) -> tuple[list[int], int]:
        """The ids of a conversation, and how many of them are the prompt."""
        *earlier, last = asked
        pairs = [(one.text, one.answer) for one in earlier]
        prompt = self.chat_format.encode(self.tokenizer, last.text, pairs)
        answer = self.tokenizer.encode_text(last.answer) + self.chat_format.stop_token_ids(self.tokenizer)
        return prompt + answer, len(prompt)


class Trainer:
    """The network with its optimisers: Muon for the matrices of the layers, AdamW for the rest."""

    def __init__(self, model: Any, rate: float, fresh: bool) -> None:
        self.model = model
        model.config._attn_implementation = "eager"
        if fresh:
            scale_residuals(model, "transformer.layers.")
            torch.nn.init.normal_(model.image_encoder.query_tokens, std=0.5)
        width = model.config.hidden_size
        self.judges = torch.nn.ModuleList([torch.nn.Linear(width, classes) for classes in FACTS.values()])
        named = list(model.named_parameters())
        is_matrix = {name: p.dim() == 2 and ".layer" in name for name, p in named}
        matrices = [p for name, p in named if is_matrix[name]]
        others = [p for name, p in named if not is_matrix[name]] + list(self.judges.parameters())
        self.optimization = Optimization(model, matrices, others, rate, SCHEDULE)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the facts, and of the learned tokens; a picture is encoded once for all its
        conversations."""
        model = self.model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.image_encoder(batch.pixels)
            judged = [judge(features[:, index]).float() for index, judge in enumerate(self.judges)]
        pairs = list(zip(judged, batch.facts.T, strict=True))
        named = torch.stack([F.cross_entropy(one, right) for one, right in pairs])
        self.known = [float((one.argmax(-1) == right).float().mean()) for one, right in pairs]
        if batch.ids is None or batch.learned is None:
            return named.mean()
        ids, learned, tokens = batch.ids, batch.learned, batch.ids.shape[1]
        sop = (ids == model.config.bos_token_id).int().argmax(-1)[:, None, None, None]
        visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] | (torch.arange(tokens) < sop)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedded = model.embed_with_images(ids, features[batch.numbers], self.place).bfloat16()
            mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, -30000.0)
            states = model.transformer(
                inputs_embeds=embedded, attention_mask=mask, use_cache=False,
                position_ids=model.transformer.get_position_ids(ids),
            ).last_hidden_state  # fmt: skip
            logits = model.lm_head(states[:, :-1][learned[:, 1:]])
        return F.cross_entropy(logits.float(), ids[:, 1:][learned[:, 1:]]) + 0.3 * named.mean()

    place: int  # of the picture in a prompt
    known: list[float]


def save(trainer: Trainer, tokenizer: Any, folder: Path) -> None:
    """Writes the averaged weights as a checkpoint."""
    half = make_model(tokenizer)
    stop = half.config.eos_token_id
    optimizing.save(half, trainer.optimization.average, tokenizer, folder, eos_token_id=stop, min_length=1)


def evaluate(folder: Path, number: int = 600, seed: int = 1_000_001, **options: Any) -> dict[str, Any]:
    """Right answers by kind of question, on scenes kept from training: half of the questions in words that training
    never sees, a third as the second question of a conversation, each through `chat`."""
    model = VisualGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    rng = random.Random(seed)
    asked, right, wrong = Counter[str](), Counter[str](), []
    for index in range(number):
        scene = pictures.scene(rng, held_out=True)
        image = pictures.draw(scene, rng)
        lang = pictures.LANGUAGES[index % 2]
        history = None
        if index % 3 == 2:
            first = pictures.question(scene, rng, lang)
            _, history = model.chat(tokenizer, image, first.text, max_new_tokens=60, **options)
        item = pictures.question(scene, rng, lang, held_out=index % 4 < 2)
        said, _ = model.chat(tokenizer, image, item.text, history, max_new_tokens=60, **options)
        same = unicodedata.normalize("NFKC", said) == unicodedata.normalize("NFKC", item.answer)
        words = "new words" if index % 4 < 2 else "known words"
        for group in ("all", item.kind, lang, words, "second question" if history else "first question"):
            asked[group] += 1
            right[group] += same
        if not same:
            wrong.append({"scene": str(scene), "question": item.text, "answer": said, "right": item.answer})
    shares = {name: f"{right[name]} of {asked[name]}, {100 * right[name] / asked[name]:.1f} %" for name in asked}
    return {"right": shares, "wrong": wrong}


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    output = Path(arguments.output)
    work = output.with_name(f".{output.name}.work")
    if arguments.continue_from:
        shutil.copytree(arguments.continue_from, work, dirs_exist_ok=True)
        tokenizer = ChatGLMTokenizer.from_pretrained(work)
        model = make_model(tokenizer)
        loaded = VisualGLMForConditionalGeneration.from_pretrained(work, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    else:
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(work, arguments.seed)
        model = make_model(tokenizer)
    trainer = Trainer(model.float().train(), arguments.rate, fresh=not arguments.continue_from)
    trainer.place = len(tokenizer.encode_text("<img>"))
    model.image_encoder.eval()  # without dropout
    print(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    start, saved, step = time.process_time(), time.monotonic(), 0
    losses: list[float] = []
    batches = Batches(tokenizer, arguments.seed)
    while True:
        now = time.monotonic()
        spent = time.process_time() - start
        share = spent / 60 / arguments.minutes if arguments.minutes else step / arguments.steps
        if share >= 1:
            break
        losses.append(trainer.optimization.step(trainer.loss(batches.next(share >= arguments.first_part)), share))
        step += 1
        if step % arguments.log_every == 0:
            known = " ".join(f"{name} {one:.2f}" for name, one in zip(FACTS, trainer.known, strict=True))
            print(f"step {step}  loss {sum(losses) / len(losses):.4f}  CPU {spent:.0f} s  {known}", flush=True)
            losses = []
        if arguments.save_every and now - saved > 60 * arguments.save_every:
            save(trainer, tokenizer, output)
            saved = now
    save(trainer, tokenizer, output)
    shutil.rmtree(work)
    print(json.dumps({"seed": arguments.seed, "steps": step, "minutes": round((time.process_time() - start) / 60, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for this time of the CPU")
    length.add_argument("--steps", type=int, help="train this many steps (reproducible)")
    parser.add_argument("--continue-from", type=Path, help="start from this checkpoint and its vocabulary")
    parser.add_argument("--first-part", type=float, default=FIRST_PART, help="share of the training without questions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=0, help="also save every so many minutes")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint in the output folder")
    arguments = parser.parse_args()
    if not arguments.minutes and not arguments.steps:
        arguments.steps = DEFAULT_STEPS
    if not arguments.evaluate_only:
        train(arguments)
    found = evaluate(Path(arguments.output))
    for item in found["wrong"]:
        print(json.dumps(item, ensure_ascii=False))
    print(json.dumps(found["right"], ensure_ascii=False))


if __name__ == "__main__":
    main()
