"""Random tiny networks of all generations, prompts for them, and how their results are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import Cache

from chatglm.configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLM3Config
from goldens import causal_lm

VERSIONS = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of the largest logit
BOS, EOS, MASK, GMASK, PAD = 116, 117, 112, 113, 3  # of the tiny generation 1

V1 = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "inner_hidden_size": 64,
    "vocab_size": 120,
    "max_sequence_length": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": PAD,
}
V2 = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 48,
    "padded_vocab_size": 120,
    "seq_length": 64,
}


def tiny_config(version: int, **overrides: Any) -> Any:
    if version == 1:
        return ChatGLM1Config(**{**V1, **overrides})
    return (ChatGLM2Config if version == 2 else ChatGLM3Config)(**{**V2, **overrides})


def tiny_model(version: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **overrides: Any) -> Any:
    """A random model whose weights are large enough that a wrong mask or position shows."""
    config = tiny_config(version, **overrides)
    config._attn_implementation = attention
    model = causal_lm(version)(config)
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(
                    0, 0.4 if "embedding" in name else 1.5 / parameter.shape[1] ** 0.5, generator=generator
                )
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model.to(dtype).eval()


def prompt(version: int, length: int, seed: int = 0) -> list[int]:
    """A prompt of `length` tokens; generation 1's ends in [gMASK] <sop>."""
    tokens = torch.randint(10, 110, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*tokens[:-2], GMASK, BOS] if version == 1 else tokens


def text(version: int, length: int, answer: int, seed: int = 0) -> torch.Tensor:
    """A prompt and an answer, [1, length + answer]."""
    tail = torch.randint(10, 110, (answer,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return torch.tensor([prompt(version, length, seed) + tail])


def assert_same(ours: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None) -> None:
    assert ours.shape == reference.shape
    limit = (TOLERANCE[reference.dtype] if tolerance is None else tolerance) * reference.abs().max().item()
    difference = (ours.float() - reference.float()).abs().max().item()
    assert difference <= limit, f"differs by {difference:.3g}, allowed {limit:.3g}"


def static_cache(model: Any, length: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=length)


every_model = pytest.mark.parametrize("version", VERSIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
with_and_without_prefix = pytest.mark.parametrize(
    "prefix",
    [{}, {"pre_seq_len": 5}, {"pre_seq_len": 5, "prefix_projection": True}],
    ids=["plain", "prefix", "projected"],
)
