"""Attention of prompts in the CPU kernels: against float64, and inside quantised networks against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.decode_6b import make
from chatglm import kernels
from chatglm.cpu_path.prompt_attention import attention
from chatglm.generation import ChatCache
from chatglm.kernels import cpu
from kernel_variants import POSSIBLE, load_or_skip

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# heads, key heads, tokens, keys, head_dim: tiles of 32 keys and runs of 252 queries, six at a time, are left ragged
SHAPES = [(4, 2, 7, 7, 32), (6, 3, 70, 101, 64), (2, 2, 300, 300, 128), (4, 1, 2, 65, 96)]
SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
WIDTHS: dict[int, dict[str, Any]] = {
    1: {"inner_hidden_size": 256, "vocab_size": 2048, "bos_token_id": 2, "gmask_token_id": 1, "mask_token_id": 0},
    2: {"ffn_hidden_size": 256, "kv_channels": 32, "padded_vocab_size": 2048},
}


@pytest.fixture(autouse=True, params=POSSIBLE)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each variant of the kernels that this machine has; the number of tokens of every call."""
    backend = load_or_skip(request.param)
    found: list[int] = []
    run = cpu.CPUBackend.attention

    def counting(self: cpu.CPUBackend, query: torch.Tensor, *args: Any) -> torch.Tensor:
        found.append(query.shape[1])
        return run(self, query, *args)

    monkeypatch.setattr(cpu.CPUBackend, "attention", counting)
    monkeypatch.setattr(kernels, "backend_for", lambda device: backend)
    return found


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor, scaling: float
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(groups, 1) for part in (key, value))
    weights = (query.double() @ key.transpose(2, 3) * scaling + added.double()).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["causal", "additive", "boolean"])
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, kind: str, calls: list[int]) -> None:
    heads, kv_heads, tokens, keys, size = shape
    torch.manual_seed(0)
    query = torch.randn(1, tokens, heads, size).to(dtype).transpose(1, 2)
    room = torch.randn(2, 1, kv_heads, keys + 9, size).to(dtype)
    key, value = room[0, :, :, :keys] * 3, room[1, :, :, :keys]
    visible = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    if kind != "causal":
        visible = torch.rand(tokens, keys) < 0.6
        visible[:, -1] = True
    hidden = torch.zeros(tokens, keys, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    mask = {"causal": None, "additive": hidden, "boolean": visible}[kind]
    found = attention(query, key, value, None if mask is None else mask[None, None], size**-0.5, causal=True)
    assert found is not None
    assert found.dtype == dtype
    wanted = exact(query, key, value, hidden, size**-0.5)
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < BOUNDS[dtype]
    assert calls == [tokens]


@torch.no_grad()
def test_numbers_that_are_not_finite_stay_so() -> None:
    query, key, value = (torch.randn(1, 2, 40, 32) for _ in range(3))
    key[0, 0, 20, 3] = float("nan")
    found = attention(query, key, value, None, 0.2, causal=True)
    assert found is not None
    finite = torch.isfinite(found).view(40, 2, 32).all(-1)
    assert finite[:20].all()
    assert not finite[20:, 0].any()
    assert finite[:, 1].all()


@pytest.mark.parametrize("generation", [1, 2])
def test_networks(generation: int, calls: list[int]) -> None:
    """A prompt, a second one behind it, and one with padding, as with attention in plain torch."""
    torch.manual_seed(0)
    model = make(generation, 8, None, torch.float32, "exact", **SIZES, **WIDTHS[generation])
    ids = 1000 + torch.arange(50).unsqueeze(0)
    if generation == 1:
        ids[0, 28], ids[0, 29] = model.config.gmask_token_id, model.config.bos_token_id
    padding = torch.ones(1, 50, dtype=torch.long)
    padding[0, :5] = 0
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = ChatCache()
        with torch.no_grad():
            places = [model.positions_from(ids, start)[..., :end] for start, end in ((0, 30), (30, 20))]
            parts = [
                model(input_ids=ids[:, :30], position_ids=places[0], past_key_values=cache, use_cache=True),
                model(input_ids=ids[:, 30:], position_ids=places[1], past_key_values=cache, use_cache=True),
                model(input_ids=ids, attention_mask=padding),
            ]
        found[implementation] = torch.cat([part.logits[:, 5:] for part in parts], dim=1)
        assert bool(calls) == (implementation == "sdpa")
    assert calls == [30, 30, 20, 20, 50, 50]
    difference = (found["sdpa"] - found["eager"]).abs().max() / found["eager"].abs().max()
    assert float(difference) < 2e-5


@pytest.mark.parametrize("generation", [1, 2])
@torch.no_grad()
def test_only_quantised_projections_take_the_kernels(generation: int, calls: list[int]) -> None:
    """Networks ask a single predicate, which says no to float weights and to a wrapped projection."""
    torch.manual_seed(0)
    model = make(generation, 8, None, torch.float32, "exact", **SIZES, **WIDTHS[generation])
    ids = 1000 + torch.arange(20).unsqueeze(0)
    if generation == 1:
        ids[0, 18], ids[0, 19] = model.config.gmask_token_id, model.config.bos_token_id
    wanted = model(input_ids=ids).logits
    assert calls == [20, 20]
    first = next(module for module in model.modules() if hasattr(module, "query_key_value"))
    quantised = first.query_key_value
    dense = torch.nn.Linear(quantised.in_features, quantised.out_features)
    dense.weight, dense.bias = torch.nn.Parameter(quantised.dequantize()), quantised.bias
    for projection in (dense, torch.nn.Sequential(quantised)):
        calls.clear()
        first.query_key_value = projection
        found = model(input_ids=ids).logits
        assert calls == [20], "one layer less"
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_gradients_and_batches_are_left_to_torch(calls: list[int]) -> None:
    query, key, value = (torch.randn(1, 2, 40, 32, requires_grad=True) for _ in range(3))
    assert attention(query, key, value, None, 0.2, causal=True) is None
    with torch.no_grad():
        assert attention(query.expand(2, -1, -1, -1), key, value, None, 0.2, causal=True) is None
        assert attention(query[..., :30], key[..., :30], value[..., :30], None, 0.2, causal=True) is None
        assert attention(query, key, value, None, 0.2, causal=False) is None
    assert not calls
