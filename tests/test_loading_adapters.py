"""`chatglm.load` with adapters, from Python and from the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tiny_chat
from chatglm import load
from chatglm.front.arguments import add_model_arguments, load_from_arguments
from tiny_adapters import error_of, every_version, logits, trained


@every_version
def test_load_takes_them_all(version: int, tmp_path: Path) -> None:
    paths = trained(version)
    model, tokenizer = tiny_chat.pair(version)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    several = load(tmp_path, adapter={"first": paths["lora"], "second": paths["table"]}, quantize=4)[0]
    assert (sorted(several.adapter_names), several.current_adapter) == (["first", "second"], "first")
    assert load(tmp_path, adapter=str(paths["table"]))[0].adapter_names == ["table"]
    with several.adapter("second"):
        with_quantised = logits(several)
    alone = load(tmp_path, adapter=paths["table"], quantize=4)[0]
    assert torch.equal(logits(alone), with_quantised)
    # A checkpoint with a prefix of its own, and one more.
    alone = load(tmp_path, adapter=paths["table"])[0]
    alone.save_pretrained(tmp_path)
    both = load(tmp_path, adapter=paths["projected"])[0]
    assert (both.adapter_names, both.current_adapter) == (["default", "projected"], "projected")
    with both.prefix("default"):
        assert torch.equal(logits(both), logits(alone))


@every_version
def test_the_command_line_arguments(version: int, tmp_path: Path) -> None:
    paths = trained(version)
    model, tokenizer = tiny_chat.pair(version)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)

    def names(*given: str) -> tuple[list[str], str | None]:
        arguments = [word for text in given for word in ("--adapter", text)]
        loaded = load_from_arguments(parser.parse_args(["--model", str(tmp_path), *arguments]))[0]
        return loaded.adapter_names, loaded.current_adapter

    assert names() == ([], None)
    assert names(str(paths["lora"])) == (["lora"], "lora")
    assert names(f"adverts={paths['table']}", str(paths["lora"])) == (["adverts", "lora"], "adverts")
    odd = tmp_path / "rank=3.final"
    odd.symlink_to(paths["lora"])
    assert names(str(odd))[0] == ["lora"]
    two = error_of(lambda: names(str(paths["lora"]), f"lora={paths['table']}"), ValueError)
    assert "two adapters are called 'lora'" in two and "--adapter NAME=" in two
