"""Original repository folders through the Auto classes: whatever the layout, our classes, quietly and offline."""

from __future__ import annotations

import copy
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import chatglm  # registers its classes with the Auto classes
from chatglm.configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLM3Config, ChatGLMConfig
from checkpoints import LAYOUTS, VERSION, original_config, original_names, original_state, write_checkpoint
from conftest import SHARED, needs_shared
from goldens import causal_lm, make_config
from tiny_folders import make_folder

pytestmark = needs_shared
NAMES = tuple(VERSION)
TRUST: tuple[dict[str, Any], ...] = ({}, {"trust_remote_code": False}, {"trust_remote_code": True})
TRUST_IDS = ("absent", "False", "True")
CLASS_NAME = {version: f"ChatGLM{version}ForConditionalGeneration" for version in (1, 2, 3)}
CONFIG = {1: ChatGLM1Config, 2: ChatGLM2Config, 3: ChatGLM3Config}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the network was asked for: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("builtins.input", refuse)


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is logged at warning level or printed: these folders need no action from users."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "accelerate", "chatglm")]
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    if shown:
        transformers.utils.logging.enable_progress_bar()
    assert [record.getMessage() for record in records] == []
    assert "".join(capfd.readouterr()) == ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of (name, layout), made once."""
    made: dict[tuple[str, str, bool], Path] = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str, layout: str = "safetensors", remote_code: bool = True) -> Path:
        key = (name, layout, remote_code)
        if key not in made:
            made[key] = write_checkpoint(root / f"{layout}-{remote_code}" / name, name, layout, remote_code=remote_code)
        return made[key]

    return folder


def prompt(version: int, vocabulary: int = 0) -> torch.Tensor:
    if version > 1:
        return torch.tensor([[64790, 64792, 790, 30951]])
    shift = 20000 if vocabulary == 150528 else 0
    return torch.tensor([[5, 74874, 130001, 130004]]) + torch.tensor([[shift]])


def check(model: Any, name: str) -> None:
    """The class, the weights under their published names, and finite logits."""
    version = VERSION[name]
    assert type(model).__name__ == CLASS_NAME[version]
    assert model.config.chatglm_version == version
    assert not model.training
    ours = model.state_dict()
    for tensor, value in original_state(name).items():
        if not tensor.endswith("inv_freq"):
            assert torch.equal(ours[tensor], value.to(ours[tensor].dtype)), tensor
    with torch.no_grad():
        logits = model(prompt(version, model.config.vocab_size)).logits
    assert torch.isfinite(logits).all()


# ---- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", TRUST, ids=TRUST_IDS)
@pytest.mark.parametrize("name", [*NAMES, "chatglm-6b-int4", "chatglm3-6b-32k-int4"])
def test_every_published_config(name: str, trust: dict[str, Any]) -> None:
    folder = SHARED / "checkpoints" / name
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(folder, **trust)
    version = VERSION.get(name, 1 if name == "chatglm-6b-int4" else 3)
    assert config.chatglm_version == version
    assert type(config) is CONFIG[version]
    for key, value in values.items():
        if key in ("auto_map", "torch_dtype", "_name_or_path", "transformers_version", "architectures"):
            continue
        assert getattr(config, key) == value, key
    assert config.dtype == torch.float16
    assert {"AutoConfig", "AutoModel"} <= config.auto_map.keys()
    assert config.auto_map.items() <= values["auto_map"].items()
    assert "auto_map" not in config.to_dict()
    assert config.num_hidden_layers == 28
    assert config.vocab_size == values.get("vocab_size", values.get("padded_vocab_size"))


def test_ids_that_version_1_0_does_not_name() -> None:
    config = AutoConfig.from_pretrained(SHARED / "checkpoints" / "chatglm-6b-v1.0")
    ids = (config.mask_token_id, config.gmask_token_id, config.bos_token_id, config.eos_token_id)
    assert ids == (150000, 150001, 150004, 150005)
    assert config.pad_token_id == 20003


@pytest.mark.parametrize(
    ("inside", "folder", "version"),
    [
        ("THUDM/chatglm2-6b", "model", 2),
        ("ZhipuAI/chatglm2-6b-32k", "model", 2),
        ("THUDM/chatglm3-6b", "model", 3),
        ("someone/ChatGLM3-6B-Base", "model", 3),
        ("", "chatglm2-6b-int4", 2),
        ("", "chatglm3-6b-128k", 3),
        (None, "my-chatglm2", 2),
        ("THUDM/chatglm2-6b", "chatglm2", 2),
    ],
)
def test_generations_2_and_3_are_told_apart(inside: str | None, folder: str, version: int, tmp_path: Path) -> None:
    values = original_config("chatglm2-6b")
    values.pop("_name_or_path")
    if inside is not None:
        values["_name_or_path"] = inside
    path = tmp_path / folder
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for loader in (AutoConfig, ChatGLMConfig):
        config = loader.from_pretrained(path)
        assert config.chatglm_version == version
        assert type(config) is CONFIG[version]
    AutoConfig.from_pretrained(path).save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").chatglm_version == version


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_published_ones(name: str) -> None:
    """What the published index lists is what the network has, rotary buffers aside."""
    state = original_state(name)
    ours = causal_lm(VERSION[name])(make_config(VERSION[name], original_config(name))).state_dict()
    assert {tensor for tensor in original_names(name) if not tensor.endswith("inv_freq")} == set(ours)
    assert all(ours[tensor].shape == value.shape for tensor, value in state.items() if tensor in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layout(name: str, layout: str, folders: Any) -> None:
    model, info = AutoModel.from_pretrained(folders(name, layout), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    check(model, name)


@pytest.mark.parametrize("remote_code", [True, False], ids=["with .py files", "without .py files"])
@pytest.mark.parametrize("trust", TRUST, ids=TRUST_IDS)
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_trust_remote_code_makes_no_difference(
    name: str, trust: dict[str, Any], remote_code: bool, folders: Any
) -> None:
    """Our classes whatever the caller passes; the folder's own code is never run and need not be there."""
    folder = folders(name, remote_code=remote_code)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(folder, **trust)
        assert type(model).__name__ == CLASS_NAME[VERSION[name]]
        assert type(model).__module__.startswith("chatglm.")
    half = model.half()
    with torch.no_grad():
        assert half(prompt(VERSION[name])).logits.dtype == torch.float16


@pytest.mark.parametrize("trust", TRUST, ids=TRUST_IDS)
@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_a_classifier_saved_and_loaded(name: str, trust: dict[str, Any], folders: Any, tmp_path: Path) -> None:
    """Saved as the originals' class does, with its head; loaded through the Auto class."""
    config = AutoConfig.from_pretrained(folders(name), num_labels=3)
    model = getattr(chatglm, f"ChatGLM{VERSION[name]}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32, **trust)
    ids = prompt(2)
    with torch.no_grad():
        assert again(ids).logits.shape == (1, 3)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str, folders: Any, tmp_path: Path) -> None:
    """What we save has no auto_map and no code, names its generation, and loads again as the same thing."""
    model = AutoModel.from_pretrained(folders(name), dtype=torch.float32, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in json.dumps(saved)
    assert saved["chatglm_version"] == VERSION[name]
    assert saved["model_type"] == "chatglm"
    assert saved["architectures"] == ["ChatGLMModel"]
    published = json.loads((SHARED / "checkpoints" / name / "config.json").read_text(encoding="utf-8"))
    assert saved.get("_name_or_path") == published.get("_name_or_path")
    assert not list((tmp_path / "saved").glob("*.py"))
    for trust in TRUST:
        again = AutoModel.from_pretrained(tmp_path / "saved", **trust)
        assert type(again) is type(model)
        assert again.config.chatglm_version == VERSION[name]
        ids = prompt(VERSION[name], model.config.vocab_size)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_default_dtype_and_device(name: str, folders: Any) -> None:
    """Without a dtype the file's own; the arguments that ChatGLM2's README shows are understood."""
    assert next(AutoModel.from_pretrained(folders(name)).parameters()).dtype == torch.float16
    model = AutoModel.from_pretrained(folders(name), dtype=torch.bfloat16, device="cpu", empty_init=False)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_head_of_its_own(folders: Any, tmp_path: Path) -> None:
    """Generation 1 is tied unless its config says otherwise."""
    folder = folders("chatglm-6b")
    tied = AutoModel.from_pretrained(folder)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    model = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projected"])
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_a_prefix_as_the_originals_load_it(name: str, projection: bool, folders: Any, tmp_path: Path) -> None:
    """The lines of the P-tuning README: a config with pre_seq_len, the base weights, the prefix from its own file."""
    folder = folders(name)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, pre_seq_len=4, prefix_projection=projection)
    donor = type(AutoModel.from_pretrained(folder, dtype=torch.float32))(config)
    file = tmp_path / "pytorch_model.bin"
    prefix = {key: value for key, value in donor.state_dict().items() if key.startswith("transformer.prefix_encoder.")}
    torch.save({key: torch.randn_like(value) for key, value in prefix.items()}, file)

    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
    start = "transformer.prefix_encoder."
    state = torch.load(file, weights_only=True)
    model.transformer.prefix_encoder.load_state_dict({key[len(start) :]: value for key, value in state.items()})
    model = model.half()
    model.transformer.prefix_encoder.float()
    ids = prompt(VERSION[name])
    with torch.no_grad():
        with_prefix = model.eval()(ids).logits
        without = AutoModel.from_pretrained(folder)(ids).logits
    assert torch.isfinite(with_prefix).all()
    assert (with_prefix - without).abs().max() > 1e-2
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == list(prefix)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm3-6b"])
def test_a_saved_prefix_model(name: str, folders: Any, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders(name), pre_seq_len=4)
    model = AutoModel.from_pretrained(folders(name), config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = prompt(VERSION[name])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


@needs_shared
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-v1.0", "chatglm2-6b", "chatglm3-6b"])
def test_the_lines_of_the_originals_readme(name: str, trust: dict[str, bool], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, name, "bin_shards", tokenizer=True, remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    model = AutoModel.from_pretrained(folder, **trust).half()
    model = model.eval()
    response, history = model.chat(tokenizer, "你好", history=[], max_new_tokens=4)
    again, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history, max_new_tokens=4)
    assert isinstance(response, str) and isinstance(again, str)
    assert len(history) == (4 if name == "chatglm3-6b" else 2)


def test_the_origin_survives_several_saves(tmp_path: Path) -> None:
    """The name inside the file, not the folder it was loaded from; a model of no published name gets none."""
    (tmp_path / "first").mkdir()
    for inside in ("THUDM/chatglm2-6b-32k", None):
        values = original_config("chatglm2-6b") | {"chatglm_version": 2, "_name_or_path": inside}
        (tmp_path / "first" / "config.json").write_text(json.dumps(values), encoding="utf-8")
        AutoConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        again = AutoConfig.from_pretrained(tmp_path / "second")
        ChatGLMConfig(**again.to_dict()).save_pretrained(tmp_path / "third")
        saved = json.loads((tmp_path / "third" / "config.json").read_text(encoding="utf-8"))
        assert saved.get("_name_or_path") == inside and "published_name" not in saved


@pytest.mark.parametrize("name", NAMES)
def test_a_config_of_the_values_of_its_file(name: str) -> None:
    values = original_config(name)
    config = ChatGLMConfig(**values)
    assert type(config) is CONFIG[VERSION[name]] is type(copy.deepcopy(config))
    assert config.to_dict() == ChatGLMConfig.from_dict(values).to_dict()


def test_a_config_of_a_base_model_by_its_values() -> None:
    values = original_config("chatglm3-6b")
    assert not ChatGLMConfig(**values).is_base_model
    assert ChatGLMConfig(**values | {"_name_or_path": "THUDM/chatglm3-6b-base"}).is_base_model
    assert type(ChatGLMConfig(**values | {"chatglm_version": 2})) is CONFIG[2]
    assert type(ChatGLMConfig()) is ChatGLMConfig


@pytest.mark.parametrize("version", [1, 2, 3])
def test_code_beside_the_weights_is_never_run(version: int, tmp_path: Path) -> None:
    """Not even with trust_remote_code, though the config keeps auto_map in memory."""
    folder = make_folder(tmp_path / "model", version)
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer")
    (folder / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')\n")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values["auto_map"] = dict.fromkeys(autos, "evil.Class") | {"AutoTokenizer": ["evil.Class", None]}
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert "AutoModel" in config.auto_map and "AutoTokenizer" not in config.auto_map
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        assert auto.from_pretrained(folder, trust_remote_code=True).config.chatglm_version == version
        auto.from_config(config, trust_remote_code=True)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_keywords_of_transformers_4(version: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", version)
    old: dict[str, Any] = {"resume_download": True, "use_auth_token": None}
    for auto in (AutoModel, AutoModelForCausalLM):
        for name, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
            assert not auto.from_pretrained(folder, **{name: False}, **old).quantized
            assert not auto.from_pretrained(folder, **{name: None}).quantized
            with pytest.raises(TypeError, match=rf"^{name} .*ChatGLMQuantizationConfig\(bits={bits}\)"):
                auto.from_pretrained(folder, device_map="auto", **{name: True})
    assert AutoTokenizer.from_pretrained(folder, **old | {"use_auth_token": "x"}).chatglm_version == version


@pytest.mark.parametrize("version", [1, 2, 3])
def test_keywords_that_are_gone_say_what_to_write(version: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", version)
    for name, today in (("use_flash_attention_2", "attn_implementation="), ("torchscript", "return_dict=False")):
        AutoModel.from_pretrained(folder, **{name: False})  # asks for nothing
        with pytest.raises(TypeError, match=f"'{name}': it is gone from transformers 5, write {today}"):
            AutoModel.from_pretrained(folder, **{name: True})
    with pytest.raises(TypeError, match="HF_ENDPOINT"):
        AutoTokenizer.from_pretrained(folder, mirror="tuna")
    tokenizer = AutoTokenizer.from_pretrained(folder, mirror=None)
    with pytest.raises(TypeError, match=r'write padding="max_length"'):
        tokenizer("你好", pad_to_max_length=True)
