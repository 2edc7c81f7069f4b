"""Describes a folder without loading its weights: generation and why, size, the memory that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from ..checkpoints import memory
from ..checkpoints.adapters import PREFIX, Lora, read_adapter
from ..checkpoints.file_names import CONFIG, LORA_CONFIG, VOCABULARIES
from ..checkpoints.files import (
    ModelLoadError,
    Weights,
    check_folder,
    check_vocabulary,
    find_weights,
    read_contents,
    read_json,
)
from ..checkpoints.generation import Verdict, weigh
from ..configuration_chatglm import ChatGLMConfig
from ..conversation import chat_format
from ..kernels.__main__ import devices
from ..loading import memory_needed, model_class, read_config
from ..network.fitting import check_quantization, check_vocabulary_size
from ..quantization import settings_of
from ..tokenization_chatglm import ChatGLMTokenizer
from .findings import Finding, one_line
from .messages import say
from .weight_files import against_model, find, some

#: Known fields of config.json that the configuration classes lack: transformers' and those of our prefixes.
KNOWN_FIELDS = {
    "attn_implementation", "auto_map", "base_fingerprint", "base_model_name_or_path", "quantization_config",
    "torch_dtype", "transformers_version",
}  # fmt: skip
QUANTISATION = ("quantization_bit", "quantization_config", "quantization_embeddings")
ROUND_TRIP = "Hello, 你好 1+1=2"


def look(source: str, language: str, device: str = "auto") -> Iterator[Finding]:
    """Yields findings about a folder, the file of a prefix, or the files of a hub id that are on this machine.

    Args:
        device: the device whose memory is compared; "auto" is the one that `chatglm.load` uses.
    """
    path = Path(source).expanduser()
    if not path.exists():
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
        cached = _in_hub_cache(source) if is_id else None
        if cached is None:
            yield Finding("folder", "wrong", say("not_local" if is_id else "no_folder", language, path=source))
            return
        path = cached
        yield Finding("hub_cache", "ok", say("hub_cache", language, path=path))
    if path.is_file() or not (path / "config.json").is_file():
        yield from _adapter_or_nothing(path, language)
    else:
        yield from _checkpoint(path, language, device)


def _in_hub_cache(source: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _adapter_or_nothing(path: Path, language: str) -> Iterator[Finding]:
    """Describes a LoRA adapter or a prefix; otherwise reports the error of `chatglm.load`."""
    try:
        adapter = read_adapter(path)
    except ModelLoadError as error:
        yield Finding("folder", "wrong", str(error if (path / LORA_CONFIG).is_file() else _no_checkpoint(path)))
        return
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    base = adapter.config.get("base_model_name_or_path") or say("unknown", language)
    data = {"parameters": count, "base": adapter.config.get("base_model_name_or_path")}
    if isinstance(adapter, Lora):
        modules = adapter.config.get("target_modules") or ()
        whole = adapter.config.get("modules_to_save") or ()
        shown = ", ".join([*([modules] if isinstance(modules, str) else sorted(modules)), *sorted(whole)])
        text = say("a_lora", language, base=base, r=adapter.config.get("r"), modules=shown, count=count)
        yield Finding("adapter", "ok", text, data={"kind": "lora", "r": adapter.config.get("r"), **data})
    else:
        text = say("a_prefix", language, base=base, length=adapter.length, count=count)
        yield Finding("adapter", "ok", text, data={"kind": "prefix", "positions": adapter.length, **data})


def _no_checkpoint(path: Path) -> ModelLoadError:
    """Returns why neither a checkpoint nor an adapter is here."""
    try:
        if path.is_file():
            read_contents(path)
        check_folder(path)
    except ModelLoadError as error:
        return error
    raise AssertionError("check_folder accepted a folder without a config.json")


def _checkpoint(path: Path, language: str, device: str) -> Iterator[Finding]:
    """Describes a folder with a config.json."""
    try:
        check_folder(path)
        raw = read_json(path / "config.json")
    except ModelLoadError as error:
        yield Finding("config", "wrong", str(error))
        return
    found, findings = find(path, language)
    prefix = [name for name in found.tensors if PREFIX.match(name)]
    if prefix and len(prefix) == len(found.tensors):
        yield from _adapter_or_nothing(path, language)
        return
    try:
        verdict = weigh(path, raw)
        version = verdict.generation
        config = read_config(path, version)
        plain = {key: value for key, value in raw.items() if key not in QUANTISATION} | {"chatglm_version": version}
        is_quantised = settings_of(config) is not None
        with torch.device("meta"):
            full = _model(ChatGLMConfig.from_dict(plain))
            stored = _model(config) if is_quantised else full
    except Exception as error:  # whatever error a malformed config causes
        yield Finding("config", "wrong", f"config.json: {one_line(error)}")
        yield from findings
        return
    yield from _generation(verdict, str(raw.get("_name_or_path") or path.resolve().name), language)
    yield _size(config, full, language)
    yield from findings
    yield from _odd_fields(raw, config, language)
    foreign = None if is_quantised else getattr(config, "quantization_config", None)
    yield from _quantisation(config, foreign, language)
    yield from _prefix(config, bool(prefix), language)
    if not foreign:
        misfits = [*_fit(path, config), *against_model(stored, found, language)]
        yield from misfits
        if found.complete and not misfits and not any(one.status == "wrong" for one in findings):
            yield Finding("whole", "ok", say("whole", language))
    yield from _memory(path, config, stored, foreign, device, language)
    yield from _tokenizer(path, config, language)
    if (path / "generation_config.json").is_file():
        try:
            read_json(path / "generation_config.json")
        except ModelLoadError as error:
            yield Finding("generation_config", "wrong", str(error))


def _model(config: Any) -> Any:
    """Builds the network; on the meta device it takes no memory."""
    if any("SequenceClassification" in str(name) for name in config.architectures or ()):
        return AutoModelForSequenceClassification.from_config(config)
    return model_class(config)(config)


def _generation(verdict: Verdict, named: str, language: str) -> Iterator[Finding]:
    """The generation, and all that the folder says about it."""
    generation, decisive = verdict.generation, verdict.decisive
    if decisive is None or verdict.is_guess:
        between = "、" if language == "zh" else " or "
        possible = between.join(map(str, sorted(verdict.possible & VOCABULARIES.keys())))
        why = say("why_guess", language, possible=possible, file=CONFIG)
        why += "" if decisive is None else f" ({decisive.text})"
    else:
        why = decisive.text
    if verdict.against:
        others = some([clue.text for clue in verdict.against], language)
        why = say("why_though", language, why=why, others=others)
    text = say("is_generation", language, generation=generation, model=chat_format(generation).model_name, why=why)
    status = "note" if verdict.is_guess or verdict.against else "ok"
    name = None if decisive is None else decisive.name
    data = {"generation": generation, "evidence": name, "model_name": named}
    yield Finding("generation", status, text, data=data)
    listed = [(clue.text, sorted(clue.generations & VOCABULARIES.keys())) for clue in verdict.clues]
    shown = "; ".join(f"{text} ({', '.join(map(str, fitting))})" for text, fitting in listed)
    clues = [{"clue": text, "generations": fitting} for text, fitting in listed]
    yield Finding("evidence", "ok", say("evidence", language, clues=shown), data={"clues": clues})


def _fit(path: Path, config: Any) -> Iterator[Finding]:
    """What `chatglm.load` compares before it reads weights."""
    try:
        weights = find_weights(path)
    except ModelLoadError:  # reported with the files
        return
    for check in (check_vocabulary_size, check_quantization):
        try:
            check(path, config, weights)
        except ModelLoadError as error:
            yield Finding("fit", "wrong", str(error))


def _size(config: Any, model: Any, language: str) -> Finding:
    values = {
        "layers": config.num_layers, "width": config.hidden_size, "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
    }  # fmt: skip
    count = model.num_parameters()
    text = say("parameters", language, count=count, **values)
    if getattr(config, "is_base_model", False):
        text += "; " + say("base_model", language)
    return Finding("parameters", "ok", text, data={"parameters": count, **values})


def _odd_fields(raw: dict[str, Any], config: Any, language: str) -> Iterator[Finding]:
    known = type(config)()
    names = {*known.to_dict(), *vars(known), *type(config).attribute_map, *KNOWN_FIELDS}
    unknown = sorted(set(raw) - names)
    if unknown:
        text = say("unknown_fields", language, names=some(unknown, language, most=8))
        yield Finding("unknown_fields", "note", text, data={"fields": unknown})


def _quantisation(config: Any, foreign: Any, language: str) -> Iterator[Finding]:
    settings = settings_of(config)
    if settings is not None:
        key = "quantised_embeddings" if settings.quantize_embeddings else "quantised"
        yield Finding("quantisation", "ok", say(key, language, bits=settings.bits), data={"bits": settings.bits})
    elif foreign:
        values = foreign if isinstance(foreign, dict) else foreign.to_dict()
        method = values.get("quant_method")
        text = say("other_quantisation", language, method=method)
        yield Finding("quantisation", "wrong", text, data={"method": str(method)})


def _prefix(config: Any, inside: bool, language: str) -> Iterator[Finding]:
    if config.pre_seq_len:
        key, status = ("with_prefix", "ok") if inside else ("wants_prefix", "wrong")
        data = {"positions": config.pre_seq_len}
        yield Finding("prefix", status, say(key, language, length=config.pre_seq_len), data=data)


def _memory(path: Path, config: Any, stored: Any, foreign: Any, device: str, language: str) -> Iterator[Finding]:
    """Estimates from the files or, if some are missing, from the model that config.json describes."""
    try:
        weights = find_weights(path)
    except ModelLoadError:
        numbers = [one.numel() for one in stored.parameters() if one.is_floating_point()]
        integers = sum(one.nbytes for one in stored.parameters() if not one.is_floating_point())
        weights = Weights((), frozenset(), sum(numbers), integers, torch.float16)
    half = torch.float16
    kinds: list[tuple[str, torch.dtype, int | None]] = [("float32", torch.float32, None), ("float16", half, None)]
    if settings_of(config) is None and not foreign:
        kinds += [("INT8", half, 8), ("INT4", half, 4)]
    found = devices()
    target = found[min(1, len(found) - 1)] if device == "auto" else torch.device(device)
    room = memory.available(target)
    sizes = {name: memory_needed(weights, config, dtype, bits) for name, dtype, bits in kinds}
    texts = [
        say("fits" if room is None or size <= room else "too_large", language, kind=name, size=memory.readable(size))
        for name, size in sizes.items()
    ]
    cache = 1000 * 2 * 2 * config.num_layers * config.num_key_value_heads * config.head_dim
    shown = say("unknown", language) if room is None else memory.readable(room)
    text = say("memory", language, sizes=", ".join(texts), cache=memory.readable(cache), device=target, room=shown)
    data = {"memory": sizes, "cache_per_1000_tokens": cache, "device": str(target), "available": room}
    least = min(sizes.values())
    yield Finding("memory", "ok" if room is None or least <= room else "note", text, data=data)


def _tokenizer(path: Path, config: Any, language: str) -> Iterator[Finding]:
    version = config.chatglm_version
    try:
        check_vocabulary(path, version)
        tokenizer = ChatGLMTokenizer.from_pretrained(path, local_files_only=True, chatglm_version=version)
        count = len(tokenizer)
        came = tokenizer.decode(tokenizer.encode(ROUND_TRIP, add_special_tokens=False))
    except ModelLoadError as error:
        yield Finding("tokenizer", "wrong", str(error))
        return
    except Exception as error:  # whatever error a file that is not a vocabulary causes
        yield Finding("tokenizer", "wrong", f"{VOCABULARIES[version]}: {one_line(error)}")
        return
    if count > config.vocab_size:
        text = say("vocabulary_larger", language, theirs=count, ours=config.vocab_size)
        yield Finding("tokenizer", "wrong", text)
    elif came != ROUND_TRIP:
        yield Finding("tokenizer", "wrong", say("round_trip", language, text=repr(ROUND_TRIP), came=repr(came)))
    else:
        text = say("tokenizer_ok", language, file=VOCABULARIES[version], count=count)
        yield Finding("tokenizer", "ok", text, data={"vocabulary": count})
