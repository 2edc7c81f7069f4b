"""Configurations of the ChatGLM family, and every quirk of the published config.json files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from . import registries
from .checkpoints import file_names
from .checkpoints.generation import names_of, settle, weigh
from .network.compat import CACHE_NAMES, NoCodeToSave

ROPE_PRECISIONS = ("float32", "original")

#: Ids of generation 1's control tokens with the vocabulary of v1.1; v1.0 puts 20,000 image tokens in front of them.
_V1_CONTROL_IDS = {
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "pad_token_id": 3,
}
_V1_OLD_VOCAB_SIZE = 150528
_V1_NUM_IMAGE_TOKENS = 20000


def detect_version(config_dict: dict[str, Any], path: str | os.PathLike[str] | None = None) -> int:
    """The generation that a `config.json` belongs to: 1, 2, 3 or a registered one. See `checkpoints/generation.py`.

    Raises:
        ValueError: `chatglm_version` is present but names no known generation.
    """
    return settle(path, config_dict)


def _names_a_base_model(config_dict: dict[str, Any], path: str | os.PathLike[str] | None) -> bool:
    """Whether a checkpoint has had no chat training, such as chatglm3-6b-base: only its name shows that."""
    base = re.compile(r"chatglm[23].*-base\b|glm-4-9b$", re.IGNORECASE)
    return any(base.search(name) for name in names_of(config_dict, path))


def _values_of_types(config_class: type[ChatGLMConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Reads numbers and truth values that a program has written as strings, such as "28", "True" and "1e-5".

    Raises:
        ValueError: a string is no value of the field's type.
    """
    types = {field.name: set(re.findall(r"\w+", str(field.type))) for field in dataclasses.fields(config_class)}
    found = {
        name: _of_type(value, types.get(config_class.attribute_map.get(name, name), set()), name)
        for name, value in values.items()
    }
    quantisation = found.get("quantization_config")
    if isinstance(quantisation, dict) and quantisation.get("quant_method") == config_class.model_type:
        found["quantization_config"] = {
            name: _of_type(value, _QUANTISATION_TYPES.get(name, set()), name) for name, value in quantisation.items()
        }
    return found


_QUANTISATION_TYPES = {"bits": {"int"}, "quantize_embeddings": {"bool"}, "quantize_head": {"int", "None"}}


def _of_type(value: Any, types: set[str], name: str) -> Any:
    if isinstance(value, float) and value.is_integer() and "int" in types and "float" not in types:
        return int(value)
    if not isinstance(value, str) or "str" in types or not types & {"int", "float", "bool"}:
        return value
    text = value.strip().lower()
    if "None" in types and text in ("none", "null", ""):
        return None
    if "bool" in types and text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        if kind.__name__ in types:
            with contextlib.suppress(ValueError):
                return kind(text)
    raise ValueError(f"{name} in config.json is the text {value!r}: write a {' or '.join(sorted(types - {'None'}))}")


#: The classes of `auto_map` that a config keeps in memory, where converters look for them. For these, transformers
#: takes our code also under trust_remote_code=True; for any other it would run the checkpoint's.
_OWN_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def _public_name(architecture: str) -> str:
    """The name of one of our classes in the published files, which vLLM, SGLang, llama.cpp and ms-swift know."""
    kind = re.fullmatch(r"(?:ChatGLM\d+|VisualGLM)(\w+)", architecture)
    if kind is None:
        return architecture
    return f"ChatGLM{kind[1]}" if kind[1] == "ForSequenceClassification" else "ChatGLMModel"


class ChatGLMConfig(NoCodeToSave, PreTrainedConfig):
    """The base of all generations' configs. `ChatGLMConfig.from_pretrained` returns the right generation's class."""

    model_type = "chatglm"
    # Asked for instead of `cls is ChatGLMConfig`, which fails once a notebook has reloaded this module.
    _is_any_generation = True
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    tokenizer_class: ClassVar[str] = "ChatGLMTokenizer"  # AutoTokenizer's choice for a folder without its own
    sep_token_id: ClassVar[int | None] = None  # every config of transformers 4 has it; converters write it out

    chatglm_version: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    # "original" computes the rotary tables in the parameters' dtype, as the first code of generations 1 and 2 did.
    rope_precision: str = "float32"
    # P-tuning v2 (https://arxiv.org/abs/2110.07602): number of trained prefix positions, None for none.
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> ChatGLMConfig:
        """`ChatGLMConfig(**config_json)`, as programs for the originals make one, gives the right generation's class;
        without any values there is no generation to find."""
        if "_is_any_generation" in vars(cls) and kwargs:
            cls = CONFIGS[detect_version(kwargs)]
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        classes = kwargs.pop("auto_map", None) or {}
        self.auto_map = {name: classes[name] for name in _OWN_AUTO_CLASSES if name in classes}
        self.published_name = kwargs.pop("published_name", kwargs.get("_name_or_path"))
        if self.rope_precision not in ROPE_PRECISIONS:
            raise ValueError(f"rope_precision must be one of {ROPE_PRECISIONS}, not {self.rope_precision!r}")
        super().__post_init__(**kwargs)
        if self.quantization_bit and getattr(self, "quantization_config", None) is None:
            # Describes the published INT4 and INT8 folders in transformers' form, by which it finds the quantizer.
            self.quantization_config = {
                "quant_method": "chatglm",
                "bits": self.quantization_bit,
                "quantize_embeddings": bool(getattr(self, "quantization_embeddings", False)),
            }

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without `auto_map`: it names .py files that are not copied when the model is saved."""
        values = super().to_dict()
        values.pop("auto_map", None)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What a saved config.json holds: with the architecture under the name that other engines know, the dtype also
        under its name of transformers 4, and the name of the published model that this one comes from, by which
        llama.cpp's converter tells the generations apart."""
        values = super().to_diff_dict()
        values.pop("num_key_value_heads", None)  # follows from multi_query_group_num
        name = values.pop("published_name", None)
        if name:
            values["_name_or_path"] = name
        if values.get("dtype"):
            values["torch_dtype"] = values["dtype"]
        if values.get("architectures"):
            values["architectures"] = [_public_name(name) for name in values["architectures"]]
        return values

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == cls.model_type:
            own = next((generation for generation, config in CONFIGS.items() if config is cls), None)
            stated = CONFIGS.get(config_dict.get("chatglm_version"))
            if stated is not None and issubclass(stated, cls):  # the network of ChatGLM2 is that of its successors too
                own = None
            path = _place_of(pretrained_model_name_or_path, config_dict, kwargs)
            version = settle(path, config_dict, given=kwargs.get("chatglm_version") or own)
            config_dict = config_dict | {"chatglm_version": version}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ChatGLMConfig:
        """As in transformers; `chatglm_version=` says which generation it is, whatever the values say."""
        if "_is_any_generation" not in vars(cls):
            return super().from_dict(_values_of_types(cls, config_dict), **kwargs)
        path = _place_of(kwargs.get("name_or_path"), config_dict, kwargs)
        version = settle(path, config_dict, given=kwargs.pop("chatglm_version", None))
        chosen = CONFIGS[version]
        config_dict = config_dict | {"chatglm_version": version}
        if hasattr(chosen, "is_base_model") and "is_base_model" not in config_dict:
            config_dict["is_base_model"] = _names_a_base_model(config_dict, path)
        return chosen.from_dict(config_dict, **kwargs)


def _place_of(
    path: str | os.PathLike[str] | None, config_dict: dict[str, Any], kwargs: dict[str, Any]
) -> str | os.PathLike[str] | None:
    """Where the files of a config lie: the folder of a hub id in the cache, else `path` itself.

    If the config of a hub id tells too little of its generation, tokenizer_config.json is fetched as well.
    """
    if path is None or os.path.exists(path):
        return os.path.join(path, kwargs["subfolder"]) if path and kwargs.get("subfolder") else path
    names = ("cache_dir", "revision", "subfolder", "token", "proxies", "local_files_only")
    options = {name: kwargs[name] for name in names if kwargs.get(name)}
    place = path
    with contextlib.suppress(OSError, ValueError):
        file = cached_file(os.fspath(path), file_names.CONFIG, **options | {"local_files_only": True})
        place = path if file is None else Path(file).parent
        if weigh(place, config_dict, given=kwargs.get("chatglm_version")).is_guess:
            cached_file(os.fspath(path), file_names.TOKENIZER_CONFIG, **options)
    return place


class ChatGLM1Config(ChatGLMConfig):
    """ChatGLM-6B (v1.0 with a vocabulary of 150,528 and v1.1 with 130,528)."""

    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_sequence_length",
        "intermediate_size": "inner_hidden_size",
        "num_key_value_heads": "num_attention_heads",
    }
    base_model_tp_plan = {
        "layers.*.attention.query_key_value": "colwise",  # heads are contiguous rows: q, k, v of head 0, of head 1, ...
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    base_model_pp_plan = {
        "word_embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "final_layernorm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    quantization_embeddings: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.chatglm_version = 1
        # v1.0's config.json names no mask, gmask or pad id: they follow from the vocabulary.
        shift = _V1_NUM_IMAGE_TOKENS if self.vocab_size == _V1_OLD_VOCAB_SIZE else 0
        for name, token_id in _V1_CONTROL_IDS.items():
            if getattr(self, name) is None:
                setattr(self, name, token_id + shift)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class ChatGLM2Config(ChatGLMConfig):
    """ChatGLM2-6B and its long-context variant; the base of later generations' configs."""

    attribute_map = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "seq_length",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
        "head_dim": "kv_channels",
    }
    base_model_tp_plan = {
        # q, k and v (and the two halves of SwiGLU) have different meanings along the output, so they are gathered.
        "encoder.layers.*.self_attention.query_key_value": "colwise_gather_output",
        "encoder.layers.*.self_attention.dense": "rowwise_split_input",
        "encoder.layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
    }
    base_model_pp_plan = {
        "embedding": (["input_ids"], ["inputs_embeds"]),
        "encoder.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "encoder.final_layernorm": (["hidden_states"], ["hidden_states"]),
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    ffn_hidden_size: int = 13696
    seq_length: int = 8192
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    rmsnorm: bool = True
    layernorm_epsilon: float = 1e-5
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    rope_ratio: float = 1
    # True for a model without chat training (chatglm3-6b-base): chat() refuses, generate() completes texts.
    # By default, the name that config.json carries decides.
    is_base_model: bool | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    # The first public code read these; they have no effect with torch 2, and are kept so that saving loses no field.
    original_rope: bool = True
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.chatglm_version is None:
            self.chatglm_version = 2
        if not issubclass(CONFIGS.get(self.chatglm_version, ChatGLMConfig), ChatGLM2Config):
            raise ValueError(f"this config is for generations from 2 on, not {self.chatglm_version!r}")
        heads = kwargs.pop("num_key_value_heads", None)
        if heads not in (None, self.num_key_value_heads):
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, not {heads!r}: it follows from "
                "multi_query_attention and multi_query_group_num, so set those"
            )
        super().__post_init__(**kwargs)
        if self.is_base_model is None:
            self.is_base_model = _names_a_base_model({"_name_or_path": self.published_name}, None)

    @property
    def stretches_positions(self) -> bool:
        """Whether `rope_ratio` divides the positions, as in chatglm2-6b-32k; later generations multiply the base."""
        return self.chatglm_version == 2

    @property
    def num_key_value_heads(self) -> int:
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Also with `num_key_value_heads`: PEFT's prefix tuning finds the width of keys and values by it."""
        return super().to_dict() | {"num_key_value_heads": self.num_key_value_heads}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ChatGLMConfig:
        if "multi_query_group_num" in config_dict:  # what `to_dict` adds, perhaps with a changed number of groups
            config_dict = {name: value for name, value in config_dict.items() if name != "num_key_value_heads"}
        return super().from_dict(config_dict, **kwargs)


class ChatGLM3Config(ChatGLM2Config):
    """ChatGLM3-6B, with its -base and long-context variants: ChatGLM2-6B's network with another prompt format."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.chatglm_version = 3
        super().__post_init__(**kwargs)


class ChatGLM4Config(ChatGLM2Config):
    """GLM-4-9B and its relatives: ChatGLM3-6B's network, larger, with another vocabulary."""

    padded_vocab_size: int = 151552
    num_layers: int = 40
    seq_length: int = 131072
    layernorm_epsilon: float = 1.5625e-07
    rope_ratio: float = 500
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = 151329

    def __post_init__(self, **kwargs: Any) -> None:
        self.chatglm_version = 4
        if self.eos_token_id is None:
            self.eos_token_id = [151329, 151336, 151338]
        super().__post_init__(**kwargs)


#: The class of each generation.
CONFIGS: dict[int, type[ChatGLMConfig]] = registries.CONFIGS
CONFIGS.update({1: ChatGLM1Config, 2: ChatGLM2Config, 3: ChatGLM3Config, 4: ChatGLM4Config})
