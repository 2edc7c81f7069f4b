"""The files of P-tuning prefixes and LoRA adapters: finds, checks and reads them without a model, and writes them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from . import file_names
from .atomic import files_into
from .file_names import LORA_CONFIG, LORA_WEIGHTS
from .files import ModelLoadError, read_contents, read_json, weight_files
from .generation import weigh
from .state_dicts import load_torch_file
from .weight_names import unwrapped

#: How the names of a prefix's tensors start in a checkpoint; the rest is their name in the `PrefixEncoder`.
PREFIX = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model|model)\.)*(?:transformer\.)?prefix_encoder\.")
NAME = re.compile(r"[\w-]+")
NEEDS_PEFT = "LoRA needs PEFT, which is not installed: pip install peft"
UNUSABLE_PEFT = "LoRA needs PEFT 0.20 or later, and the installed one cannot be imported ({}): pip install -U peft"


@dataclass(frozen=True)
class Prefix:
    """A P-tuning prefix, read from its files."""

    path: Path
    tensors: dict[str, torch.Tensor]  # by their names in the encoder
    config: dict[str, Any] = field(default_factory=dict)  # config.json beside it, if there is one

    @property
    def length(self) -> int:
        return self.tensors["embedding.weight"].shape[0]

    @property
    def projection(self) -> bool:
        return any(name.startswith("trans.") for name in self.tensors)


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter as PEFT saves it."""

    path: Path
    tensors: dict[str, torch.Tensor]  # `base_model.model.<module>.lora_A.weight` and so on
    config: dict[str, Any]  # adapter_config.json


Adapter = Prefix | Lora


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter from a prefix file, the folder of one, or a LoRA folder.

    A prefix may be in a `pytorch_model.bin` of the originals' training, in our `model.safetensors`, or among all the
    weights of a whole checkpoint. Only tensors are unpickled.

    Raises:
        ModelLoadError: there is no adapter, a file is broken, or it holds NaN or infinite values.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / LORA_CONFIG).is_file():
        adapter: Adapter = _read_lora(path)
    elif path.is_file() and path.name in (LORA_CONFIG, *LORA_WEIGHTS):
        adapter = _read_lora(path.parent)
    else:
        adapter = _read_prefix(path)
    for name, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ModelLoadError(
                f"{path} holds NaN or infinite values (in {name}), so its training went wrong: take an earlier "
                "checkpoint, or train again with a lower learning rate"
            )
    return adapter


def _read_prefix(path: Path) -> Prefix:
    if path.is_dir():
        if not any(path.glob(f"{file_names.SAFETENSORS}*")) and not any(path.glob(f"{file_names.TORCH_WEIGHTS}*")):
            below = sorted(path.glob("checkpoint-*"), key=lambda one: (len(one.name), one.name))
            hint = f"; did you mean {below[-1]}?" if below else ""
            raise ModelLoadError(
                f"{path} holds no prefix ({file_names.SAFETENSORS} or {file_names.TORCH_WEIGHTS}) and no LoRA "
                f"({LORA_CONFIG}){hint}"
            )
        files, folder = weight_files(path), path
    elif path.is_file():
        files, folder = (path,), path.parent
    else:
        raise ModelLoadError(f"there is no prefix checkpoint or LoRA adapter {path}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= {PREFIX.sub("", name): tensor for name, tensor in _tensors(file, PREFIX).items()}
    if "embedding.weight" not in tensors or tensors["embedding.weight"].dim() != 2:
        raise ModelLoadError(f"{path} holds no tensors of transformer.prefix_encoder: it is not a P-tuning checkpoint")
    config = read_json(folder / file_names.CONFIG) if (folder / file_names.CONFIG).is_file() else {}
    return Prefix(path, tensors, config)


def _read_lora(path: Path) -> Lora:
    import_peft()
    config = read_json(path / LORA_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(
            f"{path} is a PEFT adapter of type {kind!r}, and adapters here are LoRA or P-tuning prefixes: use PEFT "
            f"itself (peft.PeftModel.from_pretrained(model, {str(path)!r}), then generate)"
        )
    if config.get("trainable_token_indices"):
        raise ModelLoadError(
            f"the LoRA adapter {path} also replaces rows of the embeddings (trainable_token_indices): merge it into "
            "its base with PEFT (merge_and_unload) and load the result"
        )
    files = [path / name for name in LORA_WEIGHTS if (path / name).is_file()]
    if not files:
        raise ModelLoadError(f"{path} has no {' or '.join(LORA_WEIGHTS)}: copy the weights of the adapter into it")
    tensors = {}
    for name, tensor in _tensors(files[0], re.compile("")).items():
        plain = _lora_name(name)
        if plain in tensors:
            raise ModelLoadError(f"{files[0]} holds several adapters ({plain}): save the one to load with PEFT alone")
        tensors[plain] = tensor
    return Lora(path, tensors, config)


def _lora_name(name: str) -> str:
    """The name under which PEFT saves a tensor, from its name in a model, which has the adapter's (`default`)."""
    name = re.sub(r"(\.lora_[AB])\.[^.]+(\.weight)$", r"\1\2", name)
    name = re.sub(r"(\.lora_embedding_[AB])\.[^.]+$", r"\1", name)
    return f"base_model.model.{unwrapped(name)}"


def _tensors(path: Path, wanted: re.Pattern[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names match `wanted` at their start; nothing else is read into memory."""
    contents = read_contents(path)  # for its errors
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in contents if wanted.match(name)}
    return {name: tensor.clone() for name, tensor in load_torch_file(path).items() if wanted.match(name)}


def default_name(path: str | os.PathLike[str]) -> str:
    """The default name of an adapter: that of its folder, with `-` for characters that are not allowed."""
    path = Path(path).expanduser()
    if path.is_file() or path.suffix in (".bin", ".safetensors"):
        path = path.parent
    return re.sub(r"[^\w-]+", "-", path.resolve().name).strip("-") or "default"


def generation_of(values: Mapping[str, Any], *sources: Any) -> int | None:
    """The generation that the config of a model or an adapter states for certain; None if it states none.

    Args:
        sources: folders or hub ids to look at next, such as the base model that the config names.
    """
    with contextlib.suppress(ValueError):  # a generation that is unknown here
        verdict = weigh(None, values)
        if not verdict.is_guess:
            return verdict.generation
        for name in sources:
            if isinstance(name, str) and name and not (verdict := weigh(name)).is_guess:
                return verdict.generation
    return None


def describe(config: Mapping[str, Any]) -> str:
    """Generation and size of the model of a config, for messages."""
    version = generation_of(config, config.get("_name_or_path"))
    size = f"{config.get('num_layers', 28)} layers of width {config.get('hidden_size', 4096)}"
    return f"ChatGLM of generation {version}, {size}" if version else f"a ChatGLM with {size}"


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """`files_into` for an adapter's files; raises OSError also if safetensors cannot write them."""
    try:
        with files_into(folder) as aside:
            yield aside
    except SafetensorError as error:
        raise OSError(f"cannot write the adapter into {folder}: {error}") from error


def import_peft() -> Any:
    """Imports PEFT. Raises ModelLoadError if it is not installed, or too old for this release of transformers."""
    try:
        import peft
        import peft.functional
        import peft.tuners.tuners_utils
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise ModelLoadError(UNUSABLE_PEFT.format(error)) from error
        raise ModelLoadError(NEEDS_PEFT) from error
    except ImportError as error:
        raise ModelLoadError(UNUSABLE_PEFT.format(error)) from error
    return peft
