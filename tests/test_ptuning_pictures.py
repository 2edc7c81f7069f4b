"""Fine-tuning on rows of `img`, `prompt` and `label`: the original's ids and labels, and a LoRA adapter that learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMTokenizer,
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
)
from chatglm.checkpoints.clues import VISUAL
from chatglm.conversation import chat_format
from chatglm.demo import FOLDERS
from conftest import SHARED, needs_shared
from ptuning import data, preferences
from ptuning.arguments import ArgumentsError
from ptuning.encoding import encode_row
from ptuning.pictures import Features, check_arguments
from ptuning.rows import Columns, DataError, read_rows
from ptuning.streaming import StreamedExamples
from tiny_visualglm import EVA, QFORMER, picture_file, tiny_visualglm

VISION = chat_format(VISUAL)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def demo_with_eyes() -> VisualGLMForConditionalGeneration:
    """The bundled ChatGLM, with a random image encoder: LoRA learns to name what random features tell apart."""
    text = ChatGLMForConditionalGeneration.from_pretrained(FOLDERS[1], dtype=torch.float32)
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size", "bos_token_id",
             "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")  # fmt: skip
    values = {name: getattr(text.config, name) for name in sizes}
    torch.manual_seed(0)
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**values, eva_config=EVA, qformer_config=QFORMER))
    assert not model.load_state_dict(text.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        for name, parameter in model.image_encoder.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.float()


@needs_shared
def test_ids_and_labels_are_the_original_s(tmp_path: Path) -> None:
    golden = json.loads((SHARED / "goldens" / "tokenizer" / "visualglm.json").read_text(encoding="utf-8"))["finetune"]
    for row in golden["rows"]:
        picture_file(tmp_path, row["img"])
    rows = read_rows(write(tmp_path, golden["rows"]), chat_format=VISION)
    tokenizer = ChatGLMTokenizer.from_pretrained(SHARED / "checkpoints" / "chatglm-6b", chatglm_version=VISUAL)
    made = [encode_row(tokenizer, row, 128, 64) for row in rows[:2]]
    theirs = golden["datasets"][2]["result"]["ok"]
    for number, ours in enumerate(made):
        size = len(ours["input_ids"])
        ids = [3 if token == 0 else token for token in ours["input_ids"]]  # SAT's placeholder is the pad token
        assert ids == theirs["input_ids"][number][:size] and ours["labels"] == theirs["labels"][number][:size]


def test_what_is_refused(tmp_path: Path) -> None:
    picture_file(tmp_path)
    for rows, form, words in (
        ([{"img": "no.png", "prompt": "a", "label": "b"}], VISION, "there is no picture"),
        ([{"img": "red.png", "prompt": "a", "label": "b"}], chat_format(2), "reads text only"),
        ([{"img": 5, "prompt": "a", "label": "b"}], VISION, "must be text"),
    ):
        with pytest.raises(DataError, match=words):
            read_rows(write(tmp_path, rows), chat_format=form)
    mixed = [{"img": "red.png", "prompt": "a", "label": "b"}, {"prompt": "a", "response": "b"}]
    rows = read_rows(write(tmp_path, mixed), chat_format=VISION)
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    with pytest.raises(DataError, match="two files"):
        data.make_dataset(tokenizer, rows, 128, 32, cache_dir=tmp_path)
    features = Features(tiny_visualglm(tokenizer), tokenizer)
    with pytest.raises(DataError, match="two files"):
        features.of([{"image": str(tmp_path / "red.png")}, {}])
    for given in ((True, 0), (False, 2)):
        with pytest.raises(ArgumentsError, match="leave it out"):
            check_arguments(*given)


def test_streamed_rows_have_their_pictures(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    picture = picture_file(tmp_path)
    path.write_text(json.dumps({"img": "red.png", "prompt": "a", "label": "b"}) + "\n", encoding="utf-8")
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    made = list(StreamedExamples(tokenizer, [str(path)], Columns(), (96, 16, "")))
    assert [one["image"] for one in made] == [str(picture)] and made[0]["input_ids"].count(0) == 32


def test_preferences_refuse_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, [{"img": "red.png", "prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1])
    with pytest.raises(DataError, match="'img' is a picture"):
        preferences.read_pairs(str(path), tokenizer, 96, 16)


def test_lora_learns_what_is_in_a_picture(tmp_path: Path) -> None:
    """Through the program itself: the loss falls, and the adapter answers by the picture."""
    from ptuning.main import main

    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    demo_with_eyes().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    picture_file(tmp_path, "red.png")
    picture_file(tmp_path, "blue.png", colour=(10, 20, 250))
    rows = [{"img": f"{name}.png", "prompt": "what?", "label": name} for name in ("red", "blue")]
    path, out = write(tmp_path, rows), tmp_path / "out"
    assert not main(
        ["--do_train", "--train_file", str(path), "--model_name_or_path", str(tmp_path / "base"),
         "--output_dir", str(out), "--method", "lora", "--lora_rank", "8", "--max_steps", "60",
         "--learning_rate", "5e-3",
         "--per_device_train_batch_size", "2", "--max_source_length", "96", "--max_target_length", "16", "--use_cpu",
         "--logging_steps", "20", "--save_steps", "60", "--do_predict", "--test_file", str(path)]
    )  # fmt: skip
    predictions = (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in predictions] == [{"labels": n, "predict": n} for n in ("red", "blue")]
    model, _ = chatglm.load(tmp_path / "base", device="cpu", dtype="float32", adapter=out / "checkpoint-60")
    said = [model.chat(tokenizer, tmp_path / f"{name}.png", "what?", do_sample=False, min_length=1, max_new_tokens=6)[0]
            for name in ("red", "blue")]  # fmt: skip
    assert said == ["red", "blue"]


def test_features_of_a_batch(tmp_path: Path) -> None:
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    model = tiny_visualglm(tokenizer).train()
    path = str(picture_file(tmp_path))
    batch = Features(model, tokenizer).of([{"image": path}, {"image": path}])
    assert batch["image_features"].shape == (2, 32, 32) and not batch["image_features"].requires_grad
    assert torch.equal(*batch["image_features"]) and model.image_encoder.training
