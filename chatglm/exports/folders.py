"""Exports a checkpoint as a folder of `GlmForCausalLM`, which vLLM, transformers and OpenVINO run, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..chat import model_class
from ..checkpoints import file_names
from ..checkpoints.adapters import Adapter, Lora
from ..checkpoints.atomic import whole_folder
from ..checkpoints.files import check_folder, find_weights, read_json, refuse_missing
from ..configuration_chatglm import ChatGLMConfig
from ..loading.reading import read_config, read_tokenizer
from ..tokenization_chatglm import ChatGLMTokenizer
from .glm_network import config_from_glm, glm_config, glm_names, refuse_unfit, sources_in_glm, to_glm
from .glm_readme import readme
from .glm_tokenizer import RENAMED, fast_tokenizer
from .shards import write_shards
from .source import LoraDeltas, Tensors, renamer

GENERATION_CONFIG = "generation_config.json"
#: Called with the name of each tensor, its number from 1 on, and how many there are.
Progress = Callable[[str, int, int], None]


def export_glm(
    folder: Path,
    out: Path,
    adapter: Adapter | None = None,
    chatglm_version: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes the model of a ChatGLM2 or ChatGLM3 folder as a `GlmForCausalLM`, in the dtype of its files.

    Args:
        adapter: a LoRA adapter to merge.
        chatglm_version: the generation, if the folder does not tell it.

    Raises:
        ValueError: the model, its vocabulary or the adapter has no place there; the message says why.
        ModelLoadError: files of the folder are missing or broken.
        OSError: `out` exists or cannot be written.
    """
    check_folder(folder)
    config: Any = read_config(folder, chatglm_version)
    refuse_unfit(config)
    deltas = lora_deltas(adapter)
    tokenizer = read_tokenizer(folder, chatglm_version)
    stops = stop_ids(config, tokenizer)
    tensors = Tensors(folder, renamer(model_class(config).other_names))
    if deltas is not None:
        deltas.refuse_unknown(tensors)
    expected = set(glm_names(config))
    with whole_folder(out) as aside:
        written = set()

        def converted() -> Iterator[tuple[str, torch.Tensor]]:
            for number, name in enumerate(tensors, 1):
                tensor = tensors[name] if deltas is None else deltas.add_to(name, tensors[name])
                for new, part in to_glm(name, tensor, config):
                    if new in expected:  # a tied head, which some programs save beside the embeddings, is not
                        written.add(new)
                        yield new, part
                if progress is not None:
                    progress(name, number, len(tensors))

        write_shards(aside, converted())
        refuse_missing(folder, expected - written, ())
        _write_json(aside / file_names.CONFIG, glm_config(config, stops, find_weights(folder).dtype))
        _write_json(aside / GENERATION_CONFIG, _generation_config(folder, config, stops))
        fast_tokenizer(tokenizer).save(str(aside / "tokenizer.json"))
        _write_json(aside / file_names.TOKENIZER_CONFIG, _tokenizer_config(config, tokenizer))
        shutil.copyfile(folder / file_names.VOCABULARIES[config.chatglm_version], aside / "tokenizer.model")
        name = tokenizer.chat_format.model_name
        (aside / "README.md").write_text(readme(name, config.seq_length), encoding="utf-8")


def export_chatglm(folder: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes the model of a `GlmForCausalLM` folder, as `export_glm` makes them, as a ChatGLM2 or ChatGLM3 again.

    Raises:
        ValueError: it is no such folder, or its tensors do not fit its config.
        ModelLoadError: files of the folder are missing or broken.
        OSError: `out` exists or cannot be written.
    """
    values = read_json(folder / file_names.CONFIG) if (folder / file_names.CONFIG).is_file() else {}
    if values.get("model_type") != "glm":
        raise ValueError(f"{folder} is not a GlmForCausalLM: --to chatglm reads folders that --to glm has written")
    config = config_from_glm(values)
    vocabulary = folder / file_names.VOCABULARIES[int(config.chatglm_version or 0)]
    if not vocabulary.is_file():
        raise ValueError(f"{folder} has no {vocabulary.name}: copy that of the original model into it")
    tensors = Tensors(folder, rename=str)
    sources = list(sources_in_glm(config))
    wanted = {name for _, names in sources for name in names}
    refuse_missing(folder, wanted - set(tensors), set(tensors) - wanted)
    with whole_folder(out) as aside:

        def converted() -> Iterator[tuple[str, torch.Tensor]]:
            for number, (name, names) in enumerate(sources, 1):
                yield name, torch.cat([tensors[other] for other in names]) if len(names) > 1 else tensors[names[0]]
                if progress is not None:
                    progress(name, number, len(sources))

        write_shards(aside, converted())
        config.save_pretrained(aside)
        if (folder / GENERATION_CONFIG).is_file():
            shutil.copyfile(folder / GENERATION_CONFIG, aside / GENERATION_CONFIG)
        kind: Any = ChatGLMTokenizer.classes[int(config.chatglm_version or 0)]
        kind(str(vocabulary), chatglm_version=config.chatglm_version).save_pretrained(aside)


def lora_deltas(adapter: Adapter | None) -> LoraDeltas | None:
    """What an adapter adds to the weights. Raises ValueError for a prefix."""
    if adapter is None:
        return None
    if not isinstance(adapter, Lora):
        raise ValueError(
            f"{adapter.path} is a P-tuning prefix, which other engines do not have: serve it with api.py, or tune with "
            "LoRA"
        )
    return LoraDeltas(adapter)


def _generation_config(folder: Path, config: ChatGLMConfig, stops: list[int]) -> dict[str, Any]:
    """The folder's own settings, or those of `chat`, with every token that ends an answer."""
    path = folder / GENERATION_CONFIG
    own = read_json(path) if path.is_file() else {}
    defaults = {"do_sample": True, **model_class(config).sampling_defaults}
    ours = {"eos_token_id": stops, "pad_token_id": config.pad_token_id}
    return {**defaults, **own, **ours}


def stop_ids(config: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer; for a model without training on chats, the one that ends a text."""
    if config.is_base_model:
        return [tokenizer.get_command(tokenizer.answer_end)]
    return tokenizer.chat_format.stop_token_ids(tokenizer)


def template_for_others(config: Any, tokenizer: Any) -> str | None:
    """The chat template with the control tokens as exports name them; None for a model without training on chats."""
    if config.is_base_model:
        return None
    return tokenizer.chat_format.template.replace("[gMASK]sop", f"[gMASK]{RENAMED['sop']}")


def _tokenizer_config(config: Any, tokenizer: Any) -> dict[str, Any]:
    """With the class that transformers 4 and 5 both know."""
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = template_for_others(config, tokenizer)
    if template is not None:
        values["chat_template"] = template
    return values | {
        "clean_up_tokenization_spaces": False,
        "eos_token": str(tokenizer.eos_token),
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.seq_length,
        "pad_token": str(tokenizer.pad_token),
        "padding_side": "left",
        **({} if tokenizer.unk_token is None else {"unk_token": str(tokenizer.unk_token)}),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
