"""Decoding tokens in one call of the CPU kernels: equal to the modules, and not used if anything else is requested."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.decode_6b import make
from chatglm import kernels
from chatglm.adapters import add_prefix
from chatglm.cache import GrowingLayer, RowCache
from chatglm.generation import ChatCache
from chatglm.kernels import cpu
from chatglm.serving.chat_engine import ChatEngine as Engine
from kernel_variants import POSSIBLE, load_or_skip
from tiny_chat import pair

SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 192, "num_attention_heads": 6}
WIDTHS: dict[int, dict[str, Any]] = {
    1: {
        "inner_hidden_size": 300, "vocab_size": 2048, "bos_token_id": 2, "gmask_token_id": 1, "mask_token_id": 0,
    },
    2: {"ffn_hidden_size": 300, "kv_channels": 32, "padded_vocab_size": 2048},
    3: {"ffn_hidden_size": 300, "kv_channels": 32, "padded_vocab_size": 2048},
}
#: generation -> configurations of its network
NETWORKS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"position_encoding_2d": False}),
    (2, {}),
    (2, {"multi_query_attention": False}),
    (3, {"rmsnorm": False, "apply_residual_connection_post_layernorm": True, "add_bias_linear": True}),
    (3, {"fp32_residual_connection": True, "multi_query_group_num": 3}),
    (3, {"num_attention_heads": 10}),
    (3, {"num_attention_heads": 40, "multi_query_group_num": 2, "kv_channels": 20}),  # more heads to a key than lanes
]
START, END = 12, 30


def network(generation: int, bits: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    precision = options.pop("precision", "exact")
    model = make(generation, bits, None, dtype, precision, **{**SIZES, **WIDTHS[generation], **options})
    for name, parameter in model.named_parameters():  # norms and biases with an effect
        if parameter.ndim == 1 and not name.endswith("weight_scale"):
            parameter += torch.randn_like(parameter) * 0.1
        if "prefix_encoder.embedding" in name:
            parameter *= 50
    return model


@pytest.fixture(autouse=True, params=POSSIBLE)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Each variant of the kernels that this machine has; the numbers of blocks that it was called with."""
    backend = load_or_skip(request.param)
    found: list[int] = []
    run = cpu.CPUBackend.run_blocks

    def counting(self: cpu.CPUBackend, tokens: cpu.Tokens, blocks: Any) -> None:
        found.append(len(blocks))
        run(self, tokens, blocks)

    monkeypatch.setattr(cpu.CPUBackend, "run_blocks", counting)
    monkeypatch.setattr(kernels, "backend_for", lambda device: backend)
    monkeypatch.setattr(kernels, "ready_backend_for", lambda device: backend)
    yield found


def decode(model: Any, cache: Any) -> torch.Tensor:
    """Logits (tokens, vocabulary) of START tokens at once and of the others one by one."""
    ids = 1000 + torch.arange(END).unsqueeze(0) * 7 % 900
    places = {}
    if model.config.chatglm_version == 1:
        ids[0, START - 2], ids[0, START - 1] = model.config.gmask_token_id, model.config.bos_token_id
        places = {"position_ids": model.transformer.get_position_ids(ids)}
    found = []
    bounds = [0, *range(START, END + 1)]
    with torch.no_grad():
        for first, last in itertools.pairwise(bounds):
            here = {name: value[..., first:last] for name, value in places.items()}
            if isinstance(cache, RowCache):
                cache.select_row(1, first)
            out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, **here)
            found.append(out.logits[0, -1].float())
    return torch.stack(found)


@contextlib.contextmanager
def modules_alone(model: Any) -> Iterator[list[int]]:
    """With a hook inside a block, which only the modules call; an item for each of its calls."""
    inner = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    seen: list[int] = []
    with inner.register_forward_hook(lambda *args: seen.append(1)):
        yield seen


def through_modules(model: Any, cache: Any) -> torch.Tensor:
    with modules_alone(model) as seen:
        found = decode(model, cache)
    assert len(seen) == END - START + 1
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def decoded_both_ways(model: Any, calls: list[int]) -> tuple[torch.Tensor, ChatCache, ChatCache]:
    """The logits, and the caches after the modules and after one call a token: both have to give the same logits."""
    slow, fast = ChatCache(), ChatCache()
    wanted = through_modules(model, slow)
    assert not calls
    found = decode(model, fast)
    assert calls == [3] * (END - START)
    assert difference(found, wanted) < 2e-5
    return wanted, slow, fast


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("generation", "options"), NETWORKS, ids=str)
def test_equals_the_modules(calls: list[int], generation: int, options: dict[str, Any], bits: int) -> None:
    model = network(generation, bits, **options)
    _, slow, fast = decoded_both_ways(model, calls)
    assert fast.get_seq_length() == slow.get_seq_length() == END
    for layer, other in zip(fast.layers, slow.layers, strict=True):
        assert difference(layer.keys, other.keys) < 2e-5
        assert difference(layer.values, other.values) < 2e-5


@pytest.mark.parametrize(  # each two of a dtype, a cache and a prefix meet: none knows of the others
    ("dtype", "bound", "cache", "length"),
    [(torch.bfloat16, 2e-2, ChatCache, 37), (torch.bfloat16, 2e-2, DynamicCache, None),
     (torch.float16, 4e-3, ChatCache, None), (torch.float16, 4e-3, DynamicCache, 37)],
)  # fmt: skip
@pytest.mark.parametrize("generation", [1, 2])
def test_half_precision(
    calls: list[int], generation: int, dtype: torch.dtype, bound: float, cache: Any, length: int | None
) -> None:
    model = network(generation, dtype=dtype, pre_seq_len=length)
    wanted = through_modules(copy.deepcopy(model).float(), cache())
    model.quantize(4, precision="default")
    slow = through_modules(model, cache())
    calls.clear()
    found = decode(model, cache())
    assert calls
    assert difference(found, wanted) < bound
    assert difference(found, wanted) < 1.5 * difference(slow, wanted)  # how torch rounds depends on its release


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("generation", [1, 2])
def test_half_precision_weights(calls: list[int], generation: int, dtype: torch.dtype, bound: float) -> None:
    model = network(generation, bits=16, dtype=dtype, num_attention_heads=12, hidden_size=768)
    wanted = through_modules(copy.deepcopy(model).float(), ChatCache())
    slow = through_modules(model, ChatCache())
    calls.clear()
    found = decode(model, ChatCache())
    assert calls
    assert difference(found, wanted) < bound
    assert difference(found, wanted) < 1.5 * difference(slow, wanted)


def test_kinds_of_tensors_of_other_libraries_are_left_alone(calls: list[int]) -> None:
    class Foreign(torch.Tensor):
        pass

    model = network(2, bits=16)
    layer = model.transformer.encoder.layers[1].mlp.dense_4h_to_h
    whole = decode(model, ChatCache())
    assert calls
    calls.clear()
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Foreign), requires_grad=False)
    assert difference(decode(model, ChatCache()), whole) < 2e-5
    assert not calls


@pytest.mark.parametrize("length", [5, 37])
@pytest.mark.parametrize(("generation", "options"), NETWORKS, ids=str)
def test_a_prefix_equals_the_modules(calls: list[int], generation: int, options: dict[str, Any], length: int) -> None:
    model = network(generation, pre_seq_len=length, prefix_projection=length == 5, **options)
    wanted, slow, fast = decoded_both_ways(model, calls)
    assert fast.get_seq_length() == END, "the prefix is not in the cache"
    assert difference(fast.layers[-1].keys, slow.layers[-1].keys) < 2e-5
    model.base_model.prefix_encoder = None
    assert difference(decode(model, ChatCache()), wanted) > 1e-3


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_adapters_change_from_token_to_token(calls: list[int], generation: int) -> None:
    """One conversation, each token with another prefix, or with none."""
    model = network(generation)
    for name, length in (("first", 5), ("second", 21)):
        add_prefix(model, length, name=name).requires_grad_(False).eval().embedding.weight.normal_()
    names = ["first", None, "second", "second", "first", None, "first"]
    ids = torch.arange(1000, 1000 + START + len(names)).unsqueeze(0)
    places = {}
    if generation == 1:
        ids[0, START - 2], ids[0, START - 1] = model.config.gmask_token_id, model.config.bos_token_id
        places = {"position_ids": model.transformer.get_position_ids(ids)}

    def scores(change: bool) -> torch.Tensor:
        cache, found = ChatCache(), []
        with torch.no_grad():
            for first, last in itertools.pairwise([0, *range(START, ids.shape[1] + 1)]):
                here = {name: value[..., first:last] for name, value in places.items()}
                with model.adapter(names[first - START] if first and change else None):
                    out = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, **here)
                found.append(out.logits[0, -1])
        return torch.stack(found)

    found = scores(True)
    assert calls == [3] * len(names)
    with modules_alone(model):
        wanted = scores(True)
    assert calls == [3] * len(names)
    assert difference(found, wanted) < 2e-5
    assert difference(scores(False), wanted) > 1e-3


def test_a_prefix_changed_in_place_is_seen(calls: list[int]) -> None:
    model = network(3, pre_seq_len=5)
    before = decode(model, ChatCache())
    table = model.transformer.prefix_encoder.embedding.weight
    table.mul_(-2)
    found = decode(model, ChatCache())
    assert difference(found, before) > 1e-2
    assert difference(found, through_modules(model, ChatCache())) < 2e-5
    assert len(calls) == 2 * (END - START)


def decode_rows(model: Any, lengths: list[int], together: bool) -> tuple[torch.Tensor, RowCache]:
    """Logits (steps, rows, vocabulary) of rows 1, 2, ... of a cache, which have `lengths` tokens before."""
    steps, cache, answers = 5, RowCache(), []
    cache.resize(len(lengths) + 2, max(lengths) + steps + 3)
    ids = 1000 + torch.arange(len(lengths) * 50).view(-1, 50) * 7 % 900
    with torch.no_grad():
        positions = []
        for row, length in enumerate(lengths):
            if model.config.chatglm_version == 1:
                ids[row, length - 2], ids[row, length - 1] = model.config.gmask_token_id, model.config.bos_token_id
            positions.append(model.positions_from(ids[row : row + 1], 0))
            cache.select_row(row + 1, 0)
            model(
                input_ids=ids[row : row + 1, :length],
                position_ids=positions[row][..., :length],
                past_key_values=cache,
                use_cache=True,
            )
        for step in range(steps):
            places = [length + step for length in lengths]
            groups = [range(len(lengths))] if together else [[row] for row in range(len(lengths))]
            found = []
            for group in groups:
                if together:
                    cache.select_places(range(1, len(lengths) + 1), places, torch.device("cpu"))
                else:
                    cache.select_row(group[0] + 1, places[group[0]])
                out = model(
                    input_ids=torch.stack([ids[row, places[row]] for row in group]).unsqueeze(1),
                    position_ids=torch.cat([positions[row][..., places[row] : places[row] + 1] for row in group]),
                    attention_mask=cache.mask,
                    past_key_values=cache,
                    use_cache=True,
                )
                found.append(out.logits[:, -1].float())
            answers.append(torch.cat(found))
    return torch.stack(answers), cache


def rows_through_modules(model: Any, lengths: list[int]) -> tuple[torch.Tensor, RowCache]:
    with modules_alone(model):
        return decode_rows(model, lengths, together=True)


@pytest.mark.parametrize("lengths", [[20, 20], [40, 9, 12, 33, 21, 21, 8]], ids=str)
@pytest.mark.parametrize(("generation", "options"), NETWORKS, ids=str)
def test_rows_equal_the_modules(calls: list[int], generation: int, options: dict[str, Any], lengths: list[int]) -> None:
    model = network(generation, pre_seq_len=None if len(lengths) == 2 else 19, **options)
    wanted, slow = rows_through_modules(model, lengths)
    assert not calls
    found, fast = decode_rows(model, lengths, together=True)
    assert calls == [3] * 5
    assert difference(found, wanted) < 2e-5
    for cache in (fast, slow):
        cache.select_places(range(len(lengths) + 2), [1] * (len(lengths) + 2), torch.device("cpu"))
    for ours, theirs in zip(fast.room_for_tokens().layers, slow.room_for_tokens().layers, strict=True):
        assert difference(ours[0], theirs[0]) < 2e-5
        assert difference(ours[1], theirs[1]) < 2e-5
        assert not ours[0][0].any() and not ours[0][-1].any(), "somebody else's row"


@pytest.mark.parametrize(("shared", "kept_as", "bound"), [(0, "auto", 2e-5), (6, "auto", 2e-5), (6, "int8", 3e-2)])
@pytest.mark.parametrize(("generation", "options"), NETWORKS, ids=str)
def test_tokens_of_any_places_equal_the_modules(
    calls: list[int], generation: int, options: dict[str, Any], shared: int, kept_as: str, bound: float
) -> None:
    """One token of two answers and a piece of a prompt, in one forward: as the modules compute them one row after the
    other, and as they compute them together."""
    model = network(generation, pre_seq_len=5, **options)
    cpu_device, lengths, piece = torch.device("cpu"), (20, 11), range(9, 14)
    ids = 1000 + torch.arange(75).view(3, 25) * 7 % 900
    if generation == 1:
        ids[:, 4], ids[:, 5] = model.config.gmask_token_id, model.config.bos_token_id
    ids[:, :6] = ids[0, :6]
    positions = model.positions_from(ids, 0)
    if len(positions) == 1:
        positions = positions.expand(3, -1)

    def run(cache: RowCache, rows: list[int], places: list[int]) -> torch.Tensor:
        cache.select_places(rows, places, cpu_device)
        pairs = zip(rows, places, strict=True)
        at = torch.cat([positions[row - 1 : row, ..., place : place + 1] for row, place in pairs])
        tokens = ids[[row - 1 for row in rows], places].unsqueeze(1)
        out = model(input_ids=tokens, position_ids=at, attention_mask=cache.mask, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].float()

    def caches() -> RowCache:
        cache = RowCache(kept_as)
        cache.resize(5, 30)
        for row, length in ((1, lengths[0]), (2, lengths[1]), (3, piece[0])):
            cache.select_row(row, 0)
            first = {"input_ids": ids[row - 1 : row, :length], "position_ids": positions[row - 1 : row, ..., :length]}
            model(**first, past_key_values=cache, use_cache=True)
        if shared:
            cache.share({1: lengths[0], 3: piece[0]}, shared)
        return cache

    rows, places = [1, 2, *[3] * len(piece)], [*lengths, *piece]
    with torch.no_grad():
        with modules_alone(model):
            slow, apart = caches(), caches()
            wanted = run(slow, rows, places)
            each = torch.cat([run(apart, [row], [place]) for row, place in zip(rows, places, strict=True)])
        assert not calls
        fast = caches()
        found = run(fast, rows, places)
    assert calls == [3]
    assert difference(wanted, each) < bound and difference(found, wanted) < bound
    for ours, theirs in zip(fast.room_for_tokens().layers, slow.room_for_tokens().layers, strict=True):
        if kept_as == "auto":
            assert difference(ours[0], theirs[0]) < bound and difference(ours[1], theirs[1]) < bound
        assert not ours[0][0].any() and not ours[0][-1].any(), "somebody else's row"


@pytest.mark.parametrize("precision", ["exact", "default", "int8"])
@pytest.mark.parametrize("rows", [2, 3, 5, 15])
def test_rows_equal_one_at_a_time(calls: list[int], rows: int, precision: str) -> None:
    """With every family of products: for few rows, for many, in passes."""
    model = network(3, pre_seq_len=6, precision=precision)
    lengths = [8 + 5 * row % 23 for row in range(rows)]
    alone, _ = decode_rows(model, lengths, together=False)
    assert calls == [3] * 5 * rows
    found, _ = decode_rows(model, lengths, together=True)
    assert calls == [3] * 5 * (rows + 1)
    # int8: a sum in another order can move a number over the edge of a level
    assert difference(found, alone) < {"exact": 2e-5, "default": 1e-4, "int8": 3e-2}[precision]


def test_float32_rows_of_a_server_take_the_one_call_where_it_is_faster(calls: list[int]) -> None:
    backend: Any = kernels.backend_for(torch.device("cpu"))
    model = network(3, bits=16)
    lengths = [9, 30, 17, 8, 21, 12, 25, 10]
    wanted, _ = rows_through_modules(model, lengths)
    found, _ = decode_rows(model, lengths, together=True)
    assert calls == ([3] * 5 if backend.variant == "avx512" else [])
    assert difference(found, wanted) < 2e-5


def test_prompts_in_float32_keep_torchs_numbers(calls: list[int]) -> None:
    model, ids = network(3, bits=16), 1000 + torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        for cache in (ChatCache(), DynamicCache()):
            model(input_ids=ids, use_cache=True, past_key_values=cache)
    assert not calls


def test_float32_tokens_behind_a_cache_take_the_one_call_where_it_is_faster(calls: list[int]) -> None:
    model, ids = network(3, bits=16), 1000 + torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[:, 4:]
        cache = model(input_ids=ids[:, :4], use_cache=True, past_key_values=ChatCache()).past_key_values
        found = model(input_ids=ids[:, 4:], use_cache=True, past_key_values=cache).logits
    backend: Any = kernels.backend_for(torch.device("cpu"))
    assert calls == ([3] if backend.variant == "avx512" else [])
    assert difference(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_the_head_of_several_answers_takes_the_product_that_is_faster(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backend = network(3, bits=bits, dtype=dtype), kernels.backend_for(torch.device("cpu"))
    rows: list[int] = []
    dense = cpu.CPUBackend.dense
    monkeypatch.setattr(cpu.CPUBackend, "dense", lambda self, x, w: (rows.append(len(x)), dense(self, x, w))[1])
    assert isinstance(backend, cpu.CPUBackend)
    for count in (5, 16, 20):
        for answers in (True, False):
            rows.clear()
            cache, ids = RowCache(), 1000 + torch.arange(count).view(-1, 1)
            cache.resize(count, 4)
            with torch.no_grad():
                for start in range(2):
                    cache.select_places(range(count), [start] * count, torch.device("cpu"))
                    out = model(input_ids=ids, position_ids=torch.full_like(ids, start), past_key_values=cache)
                    if not (start or answers):
                        break
            assert (count in rows) == (count <= backend.dense_rows(dtype, answers))
            hidden = out.logits
            assert hidden.shape == (count, 1, 2048)


def test_rows_in_half_precision(calls: list[int]) -> None:
    lengths = [9, 30, 17]
    model = network(3, dtype=torch.bfloat16, precision="default")
    wanted, _ = rows_through_modules(copy.deepcopy(model).float(), lengths)
    slow, _ = rows_through_modules(model, lengths)
    found, _ = decode_rows(model, lengths, together=True)
    assert calls == [3] * 5
    assert difference(found, wanted) < min(2e-2, 1.2 * difference(slow, wanted))


def test_threads_do_not_change_rows(calls: list[int]) -> None:
    model = network(2, pre_seq_len=3)
    lengths, before = [9, 30, 17], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted, _ = decode_rows(model, lengths, together=True)
        torch.set_num_threads(3)
        found, _ = decode_rows(model, lengths, together=True)
    finally:
        torch.set_num_threads(before)
    assert difference(found, wanted) < 1e-6


def test_more_rows_than_the_kernels_are_for(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.CPUBackend, "block_rows", 2)
    model = network(3)
    decode_rows(model, [9, 8], together=True)
    assert len(calls) == 5
    decode_rows(model, [9, 8, 7], together=True)
    assert len(calls) == 5


@pytest.mark.parametrize(("generation", "options"), NETWORKS, ids=str)
def test_a_row_of_the_server_equals_the_modules(calls: list[int], generation: int, options: dict[str, Any]) -> None:
    model = network(generation, **options)
    slow, fast = RowCache(), RowCache()
    for cache in (slow, fast):
        cache.resize(3, END + 5)
    wanted = through_modules(model, slow)
    assert not calls
    found = decode(model, fast)
    assert calls == [3] * (END - START)
    assert difference(found, wanted) < 2e-5
    for ours, theirs in zip(fast.room_for_tokens().layers, slow.room_for_tokens().layers, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert difference(mine[1], other[1]) < 2e-5
            assert not mine[0].any() and not mine[2].any(), "somebody else's row"


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_one_request_of_the_server_takes_the_one_call(calls: list[int], generation: int) -> None:
    model, tokenizer = pair(generation)
    model = copy.deepcopy(model).quantize(8, precision="exact")
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    wanted = [step.text for step in model.stream_steps(tokenizer, "hello", **settings)]
    assert len(calls) == 11
    calls.clear()
    with Engine(model, tokenizer, max_batch=4) as engine:
        assert [step.text for step in engine.chat("hello", **settings)] == wanted
        assert len(calls) == 11
        calls.clear()
        answers = [engine.chat(question, **settings) for question in ("hello", "你好")]
        assert [step.text for step in answers[0]] == wanted
        list(answers[1])
        assert len(calls) >= engine.statistics.steps - 11, "a step of several rows went through the modules"


@pytest.mark.parametrize("heads", [6, 12])
def test_long_contexts_are_right(calls: list[int], heads: int) -> None:
    """More tokens than the cache has room for at first, in several spans."""
    model = network(2, num_attention_heads=heads)
    ids = 1000 + torch.arange(2 * GrowingLayer.STEP + 3).unsqueeze(0) % 900
    cache = ChatCache()
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits[0]
        model(input_ids=ids[:, : GrowingLayer.STEP - 3], past_key_values=cache, use_cache=True)
        for i in range(GrowingLayer.STEP - 3, ids.shape[1]):
            found = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            assert i % 50 or difference(found, wanted[i]) < 2e-5
    assert len(calls) == ids.shape[1] - GrowingLayer.STEP + 3


@pytest.mark.parametrize("change", ["float", "precision", "copy", "pickle", "state"])
def test_a_changed_model_is_seen(calls: list[int], change: str) -> None:
    model = network(3, dtype=torch.bfloat16 if change == "float" else torch.float32)
    before = decode(model, ChatCache())
    if change == "float":
        model = model.float()
    elif change == "precision":
        model = model.quantize(4, precision="int8")
    elif change == "copy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    else:
        other = {name: value.roll(1, 0) for name, value in model.state_dict().items()}
        model.load_state_dict(other, assign=True)
    found = decode(model, ChatCache())
    assert len(calls) == 2 * (END - START)
    assert difference(found, through_modules(model, ChatCache())) < (2e-2 if change == "precision" else 2e-5)
    if change in ("copy", "pickle"):
        assert torch.equal(found, before)
    else:
        assert not torch.equal(found, before)


def test_what_is_not_plain_goes_through_the_modules(calls: list[int]) -> None:
    model = network(2)
    whole = decode(model, ChatCache())
    calls.clear()
    model.train()
    decode(model, ChatCache())
    assert not calls, "training"
    model.eval()
    model.set_attn_implementation("eager")
    assert difference(decode(model, ChatCache()), whole) < 2e-5
    assert not calls, "another attention"
    model.set_attn_implementation("sdpa")
    cache = ChatCache()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[1000, 1001]]), past_key_values=cache, use_cache=True)
        states = model(
            input_ids=torch.tensor([[1002]]), past_key_values=cache, use_cache=True, output_hidden_states=True
        )
    assert len(states.hidden_states) == 4
    assert not calls, "somebody wants what is in between"
    assert difference(decode(model, ChatCache()), whole) < 1e-6
    assert calls == [3] * (END - START), "transformers' recording hooks are still there, and have nothing to do"


def test_gradients_and_padding_go_through_the_modules(calls: list[int]) -> None:
    model = network(2)
    cache = DynamicCache()
    model(input_ids=torch.tensor([[1000, 1001]]), past_key_values=cache, use_cache=True)
    embeds = torch.randn(1, 1, 192, requires_grad=True)
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits.sum().backward()
    assert embeds.grad is not None
    cache, ids = ChatCache(), torch.tensor([[1000, 1001, 1002], [1003, 1004, 1005]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        model(input_ids=ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, 2:], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert not calls


@pytest.mark.parametrize("cache", [ChatCache, DynamicCache])
@pytest.mark.parametrize("generation", [2, 3])
def test_a_batch_equals_its_sequences(calls: list[int], generation: int, cache: Any) -> None:
    model = network(generation)
    ids = 1000 + torch.arange(60).view(3, 20) * 11 % 900
    with torch.no_grad():
        wanted, batch = model(input_ids=ids).logits, cache()
        model(input_ids=ids[:, :16], past_key_values=batch, use_cache=True)
        for i in range(16, 20):
            found = model(input_ids=ids[:, i : i + 1], past_key_values=batch, use_cache=True).logits[:, 0]
            assert difference(found, wanted[:, i]) < 2e-5
    assert calls == [3] * 4
    assert batch.get_seq_length() == 20


def test_a_growing_layer_is_a_dynamic_layer(calls: list[int]) -> None:
    torch.manual_seed(0)
    ours, theirs = ChatCache(), DynamicCache()

    def both(action: Any) -> None:
        action(ours), action(theirs)
        assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
        assert torch.equal(ours.layers[0].values, theirs.layers[0].values)
        assert ours.get_seq_length() == theirs.get_seq_length()

    def add(tokens: int, rows: int = 2) -> None:
        keys, values = torch.randn(rows, 3, tokens, 4), torch.randn(rows, 3, tokens, 4)
        both(lambda cache: cache.update(keys, values, 0))

    add(GrowingLayer.STEP - 2)
    add(1)
    add(1)
    add(5)
    both(lambda cache: cache.crop(-7))
    add(2)
    twin = copy.deepcopy(ours)
    kept = twin.layers[0].keys.clone()
    both(lambda cache: cache.batch_select_indices(torch.tensor([1])))
    add(3, rows=1)
    both(lambda cache: cache.batch_repeat_interleave(2))
    add(1)
    assert torch.equal(twin.layers[0].keys, kept)
    twin.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4), 0)
    assert torch.equal(twin.layers[0].keys[:, :, :-1], kept)
    with torch.inference_mode():
        cache = ChatCache()
        cache.update(torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0)
    with torch.no_grad():
        cache.update(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4), 0)
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [1, 1, 0, 0]
    ours.reset(), theirs.reset()  # the state after this depends on the release of transformers
    assert ours.get_seq_length() == theirs.get_seq_length()
    states = torch.randn(1, 3, 2, 4, requires_grad=True)
    keys, _ = ChatCache().update(states, states, 0)
    assert keys.requires_grad
