"""Which generation a checkpoint is: every kind of evidence, what decides, what is said, and what overrides it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import utils
from chatglm import ChatGLM2ForConditionalGeneration, ChatGLMConfig, ChatGLMTokenizer, load
from chatglm.checkpoints import clues
from chatglm.checkpoints.generation import Verdict, weigh
from chatglm.front.arguments import add_model_arguments, load_from_arguments
from checkpoints import original_config
from conftest import SHARED, needs_shared
from tiny_folders import make_folder, to_bin

pytestmark = pytest.mark.usefixtures("no_network")

NAMES = ("_name_or_path", "name_or_path")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is said about the generation, in order."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("chatglm.checkpoints.generation")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def nameless(folder: Path, version: int, **changes: Any) -> Path:
    """A folder whose files neither name a model nor state a generation; `seq_length` hints at none."""
    make_folder(folder, version)
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, chatglm_version=..., _name_or_path=..., name_or_path=...)
    if version != 1:
        edit(folder / "config.json", seq_length=2048)
    edit(folder / "config.json", **changes)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Fields of a JSON file; ... takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def generations(folder: Path, **options: Any) -> set[tuple[int, int]]:
    """Of model and tokenizer, however they are loaded."""
    model, tokenizer = load(folder, **options)
    found = {(model.config.chatglm_version, tokenizer.chatglm_version)}
    for auto in (AutoModel, AutoModelForCausalLM):
        for trust in (True, False):
            ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, **options)
            theirs = auto.from_pretrained(folder, trust_remote_code=trust, **options)
            assert type(theirs) is type(model)
            found.add((theirs.config.chatglm_version, ours.chatglm_version))
    found.add((ChatGLMConfig.from_pretrained(folder, **options).chatglm_version, tokenizer.chatglm_version))
    return found


# ------------------------------------------------------------------------------------------------- what decides


CODE_OF_2 = 'prompt += "[Round {}]\\n\\n问：{}\\n\\n答：".format(i, query)'
CODE_OF_3 = 'role_special_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]'


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "kind",
    [
        "config", "tokenizer", "published name", "local path", "windows path", "path above", "auto_map",
        "architectures", "template", "template file", "special tokens", "added tokens", "code", "folder", "training",
        "hub", "modelscope", "modelscope new", "link",
    ],
)  # fmt: skip
def test_one_clue_is_enough(kind: str, version: int, tmp_path: Path, said: list[str]) -> None:
    """Of a fine-tuned model, whichever of its clues is left."""
    name = f"chatglm{version}-6b"
    places = {
        "folder": f"my-{name}-tuned", "training": f"My-ChatGLM{version}_tuned/checkpoint-500",
        "hub": f"models--somebody--{name}-tuned/snapshots/0123456789abcdef", "modelscope": f"hub/ZhipuAI/{name}",
        "modelscope new": f"models/ZhipuAI--{name}/snapshots/master", "path above": f"{name}/output/model",
    }  # fmt: skip
    folder = nameless(tmp_path / places.get(kind, "model"), version)
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    template = "{{ '<|user|>' }}" if version == 3 else "{{ '[Round 1]' }}问：答："
    if kind == "config":
        edit(config, chatglm_version=version)
    elif kind == "tokenizer":
        edit(tokenizer, name_or_path=f"ZhipuAI/{name}")
    elif kind == "published name":
        edit(config, _name_or_path=f"THUDM/{name}-32k")
    elif kind == "local path":
        edit(config, _name_or_path=f"/data/chatglm1/{name}/")
    elif kind == "windows path":
        edit(config, _name_or_path=f"D:\\models\\{name}")
    elif kind == "auto_map":
        edit(config, auto_map={"AutoModel": f"THUDM/{name}--modeling_chatglm.ChatGLMForConditionalGeneration"})
    elif kind == "architectures":
        edit(config, architectures=[f"ChatGLM{version}ForConditionalGeneration"])
    elif kind == "template":
        edit(tokenizer, chat_template=template)
    elif kind == "template file":
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif kind in ("special tokens", "added tokens") and version == 2:
        pytest.skip("ChatGLM2 has no tokens of its own")
    elif kind == "special tokens":
        edit(tokenizer, additional_special_tokens=["<|user|>", "<|observation|>"])
    elif kind == "added tokens":
        edit(tokenizer, added_tokens_decoder={"64795": {"content": "<|user|>", "special": True}})
    elif kind == "code":
        (folder / "tokenization_chatglm.py").write_text(CODE_OF_2 if version == 2 else CODE_OF_3, encoding="utf-8")
    elif kind == "link":
        (tmp_path / name).mkdir()
        folder = Path(shutil.move(folder, tmp_path / name / "x")).rename(tmp_path / f"{name}-mine")
        os.symlink(folder, tmp_path / "current")
        folder = tmp_path / "current"
    verdict = weigh(folder)
    assert verdict.generation == version and not verdict.against
    model, ours = load(folder)
    assert model.config.chatglm_version == ours.chatglm_version == version
    if kind == "path above":
        assert len(said) == 1 and f"taken for a ChatGLM of generation {version} (path: {name}), a guess" in said[0]
    else:
        assert said == [] and not verdict.is_guess


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("kind", ["config", "safetensors", "bin", "shards", "vocabulary"])
def test_the_networks_are_told_apart(kind: str, version: int, tmp_path: Path) -> None:
    """Generation 1 by any one of: keys of config.json, names of the weights, the name of the vocabulary."""
    folder = nameless(tmp_path / "model", version)
    if kind == "bin":
        to_bin(folder)
    if kind == "shards":
        shutil.rmtree(folder)
        nameless(folder, version)
    keep = {"config": "config.json", "vocabulary": "*.model"}.get(kind, "*model*.*")
    (tmp_path / "part").mkdir()
    for path in folder.glob(keep):
        if kind == "vocabulary" or path.suffix != ".model":
            shutil.copy(path, tmp_path / "part")
    verdict = weigh(tmp_path / "part")
    assert (verdict.generation == 1) == (version == 1)
    assert 1 in verdict.possible or version != 1
    assert verdict.possible <= {1} or version != 1


def test_torchs_old_format_is_not_read_for_a_clue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    folder = make_folder(tmp_path / "model", 2)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(clues, "read_contents", lambda path: pytest.fail("read as a whole"))
    assert weigh(folder).generation == 2


def test_codegeex2_is_of_generation_2(tmp_path: Path, said: list[str]) -> None:
    marks: list[dict[str, Any]] = [
        {"_name_or_path": "THUDM/codegeex2-6b"}, {"rotary_percent": 0.5}, {"interleaved_qkv": False, "seq_length": 8192}
    ]  # fmt: skip
    for number, changes in enumerate(marks):
        assert generations(nameless(tmp_path / f"model{number}", 2, **changes)) == {(2, 2)}
    assert generations(nameless(tmp_path / "CodeGeeX2-6B-tuned", 2)) == {(2, 2)}
    assert said == []


@needs_shared
@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("chatglm-6b", 1), ("chatglm-6b-v1.0", 1), ("chatglm-6b-int4", 1), ("chatglm2-6b", 2), ("chatglm3-6b", 3),
        ("chatglm3-6b-32k-int4", 3), ("codegeex2-6b", 2), ("visualglm-6b", 11),
    ],
)  # fmt: skip
def test_published_files_are_in_no_doubt(name: str, version: int, said: list[str]) -> None:
    verdict = weigh(SHARED / "checkpoints" / name)
    assert verdict.generation == version and verdict.doubt("it") is None
    config = json.loads((SHARED / "checkpoints" / name / "config.json").read_text(encoding="utf-8"))
    assert ChatGLMConfig.from_dict(config).chatglm_version == version
    assert said == []


@needs_shared
def test_glm4_is_not_taken_for_chatglm3() -> None:
    folder = SHARED / "checkpoints" / "glm-4-9b-chat"
    verdict = weigh(folder)
    assert (verdict.generation, verdict.doubt("it")) == (4, None)
    assert verdict.decisive is not None and verdict.decisive.text == "config.json: padded_vocab_size = 151552"
    assert AutoConfig.from_pretrained(folder).chatglm_version == 4


# ------------------------------------------------------------------------------------------------- what is said


def test_nothing_tells(tmp_path: Path, said: list[str]) -> None:
    """The default is generation 3, and one line says so, however often the folder is loaded."""
    folder = nameless(tmp_path / "model", 2)
    assert generations(folder) == {(3, 3)}
    (line,) = said
    assert line.startswith(f"{folder}: taken for a ChatGLM of generation 3 (nothing in it tells more), a guess.")
    assert 'give chatglm_version=2, or write "chatglm_version": 2 into config.json' in line


@pytest.mark.parametrize(("length", "version"), [(32768, 2), (8192, 3), (131072, 3)])
def test_a_hint_is_a_guess_too(length: int, version: int, tmp_path: Path, said: list[str]) -> None:
    """A fine-tuned ChatGLM2 that has lost all names still has the context length of ChatGLM2's config.json."""
    folder = nameless(tmp_path / "model", 2, seq_length=length)
    assert generations(folder) == {(version, version)}
    (line,) = said
    assert f"generation {version} (config.json: seq_length = {length}), a guess" in line


@pytest.mark.parametrize(
    ("inside", "folder", "version", "words"),
    [
        ("THUDM/chatglm2-6b", "chatglm3", 2, "although there is path: chatglm3. If it is of another, give chatglm_"),
        ("THUDM/chatglm3-6b", "my-chatglm2", 3, "although there is path: my-chatglm2."),
        ("THUDM/chatglm-6b", "model", 3, "although there is config.json: _name_or_path = THUDM/chatglm-6b"),
    ],
)  # fmt: skip
def test_contradicting_names(
    inside: str, folder: str, version: int, words: str, tmp_path: Path, said: list[str]
) -> None:
    path = nameless(tmp_path / folder, 2, _name_or_path=inside)
    assert generations(path) == {(version, version)}
    (line,) = said
    assert words in line


def test_a_copied_tokenizer_config_does_not_change_the_model(tmp_path: Path, said: list[str]) -> None:
    """ChatGLM3's file, with its tokens and template, in a folder of ChatGLM2."""
    folder = nameless(tmp_path / "model", 2, _name_or_path="THUDM/chatglm2-6b")
    before = ChatGLMTokenizer.from_pretrained(folder)
    edit(
        folder / "tokenizer_config.json", name_or_path="THUDM/chatglm3-6b", chat_template="{{ '<|user|>' }}",
        additional_special_tokens=["<|user|>", "<|observation|>"],
    )  # fmt: skip
    assert generations(folder) == {(2, 2)}
    (line,) = said
    assert "(config.json: _name_or_path = THUDM/chatglm2-6b), although there is tokenizer_config.json: name_" in line
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    assert tokenizer("你好") == before("你好")


def test_names_count_more_than_code_and_templates(tmp_path: Path, said: list[str]) -> None:
    folder = nameless(tmp_path / "model", 3, _name_or_path="THUDM/chatglm3-6b")
    (folder / "tokenization_chatglm.py").write_text(CODE_OF_2, encoding="utf-8")
    assert generations(folder) == {(3, 3)}
    (line,) = said
    assert "although there is tokenization_chatglm.py: [Round {}]" in line


def test_weights_and_config_of_two_networks(tmp_path: Path, said: list[str]) -> None:
    folder, other = nameless(tmp_path / "model", 2), make_folder(tmp_path / "other", 1)
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(OSError, match="lack tensors of the model"):
        AutoModel.from_pretrained(folder)
    assert "although there is model.safetensors: " in said[0]


def test_the_tokenizers_file_of_another_generation(tmp_path: Path, said: list[str]) -> None:
    """Stated twice: config.json counts, and the tokenizer is loaded as the model's."""
    folder = make_folder(tmp_path / "model", 2)
    edit(folder / "tokenizer_config.json", chatglm_version=3)
    assert generations(folder) == {(2, 2)}
    assert "although there is tokenizer_config.json: chatglm_version = 3" in said[0] and len(said) == 1


def test_a_stated_generation_settles_what_names_say(tmp_path: Path, said: list[str]) -> None:
    folder = make_folder(tmp_path / "chatglm3-6b", 2)
    edit(folder / "config.json", _name_or_path="THUDM/chatglm3-6b")
    assert generations(folder) == {(2, 2)}
    assert said == []


def test_a_config_without_a_folder(said: list[str]) -> None:
    values = {name: value for name, value in original_config("chatglm2-6b").items() if name not in NAMES}
    assert ChatGLMConfig.from_dict(values).chatglm_version == 3
    assert said[0].startswith("this config: taken for a ChatGLM of generation 3")


# ------------------------------------------------------------------------------------------------- what overrides


@pytest.mark.parametrize("version", [2, 3])
def test_the_argument_overrides_everything(version: int, tmp_path: Path, said: list[str]) -> None:
    other = 5 - version
    folder = make_folder(tmp_path / f"chatglm{other}-6b", other)
    edit(folder / "config.json", _name_or_path=f"THUDM/chatglm{other}-6b")
    edit(folder / "tokenizer_config.json", name_or_path=f"THUDM/chatglm{other}-6b")
    assert generations(folder, chatglm_version=version) == {(version, version)}
    assert AutoConfig.from_pretrained(folder, chatglm_version=version).chatglm_version == version
    model = utils.load_model_on_gpus(folder, device_map="cpu", chatglm_version=version)
    assert type(model).__name__ == f"ChatGLM{version}ForConditionalGeneration"
    assert said == []
    load(folder, chatglm_version=version)[0].save_pretrained(tmp_path / "saved")
    load(folder, chatglm_version=version)[1].save_pretrained(tmp_path / "saved")
    assert generations(tmp_path / "saved") == {(version, version)}


@pytest.mark.parametrize("given", [5, 0, "two", True, 2.5])
def test_a_generation_that_does_not_exist(given: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", 2)
    for call in (load, AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match="chatglm_version must be 1, 2, 3 or 4, or 11 for VisualGLM-6B, not"):
            call(folder, chatglm_version=given)


def test_the_front_doors_take_it(tmp_path: Path) -> None:
    folder = nameless(tmp_path / "model", 2)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    command = ["--model", str(folder), "--device", "cpu", "--chatglm-version"]
    model, tokenizer = load_from_arguments(parser.parse_args([*command, "2"]))
    assert model.config.chatglm_version == tokenizer.chatglm_version == 2
    with pytest.raises(ValueError, match="chatglm_version must be 1, 2, 3 or 4, or 11 for VisualGLM-6B, not 5"):
        load_from_arguments(parser.parse_args([*command, "5"]))


def test_a_class_is_a_statement_too(tmp_path: Path, said: list[str]) -> None:
    """A generation's own class gives a model of this generation."""
    folder = nameless(tmp_path / "model", 2)
    assert ChatGLM2ForConditionalGeneration.from_pretrained(folder).config.chatglm_version == 2
    assert said == []


# ------------------------------------------------------------------------------------------------------- details


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("THUDM/chatglm2-6b", 2), ("ChatGLM3", 3), ("chatglm-3", 3), ("chatglm_2_lora", 2), ("chatglm26b", 2),
        ("ChatGLM-v2", 2), ("chatglm-6b-int4", 1), ("ChatGLM_6B", 1), ("visualglm-6b", 11), ("codegeex2-6b", 2),
        ("chatglm-2bit", None), ("chatglm-20b", None), ("chatglm", None), ("codegeex4-all-9b", 4), ("glm-4-9b", 4),
        ("glm4", 4), ("chatglm-4bit", None), ("glm-4v-9b", None), ("LongWriter-glm4-9b", 4),
        ("chatglm32", None), ("my-model", None),
    ],
)  # fmt: skip
def test_names(name: str, generation: int | None) -> None:
    assert clues.generation_in(name) == generation


def test_a_verdict_lists_its_evidence(tmp_path: Path) -> None:
    verdict: Verdict = weigh(make_folder(tmp_path / "chatglm2-tuned", 2))
    found = [clue.text for clue in verdict.clues]
    assert found[0] == "config.json: chatglm_version = 2" and verdict.decisive is verdict.clues[0]
    assert "path: tokenizer.model" in found and "path: chatglm2-tuned" in found
    assert any(text.startswith("model.safetensors: transformer.") for text in found)
