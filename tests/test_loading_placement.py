"""Where blocks go: evenly as in the originals, else by the memory of each device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chatglm
import utils
from chatglm.loading import NotEnoughMemoryError
from chatglm.loading.placement import Placement, Sizes, even_split, place, sizes_of, skeleton, to_bytes
from deviations import DEVIATIONS
from tiny_folders import names_of

VERSIONS = (1, 2, 3)
#: Numbers of GPUs of which the originals leave none idle -> blocks (of 28) on each.
ORIGINALS = {
    1: [28], 2: [13, 15], 3: [8, 10, 10], 4: [6, 8, 8, 6], 5: [4, 6, 6, 6, 6], 6: [3, 5, 5, 5, 5, 5],
    8: [2, 4, 4, 4, 4, 4, 4, 2], 10: [1] + [3] * 9, 15: [0] + [2] * 14,
}  # fmt: skip


@pytest.mark.parametrize("gpus", range(1, 33))
def test_blocks_as_the_originals_split_them(gpus: int) -> None:
    """Theirs: the embeddings and the head count as two blocks on GPU 0, and the next one begins at 30 / gpus."""
    theirs, used = [0], 2
    for _ in range(28):
        if used >= 30 / gpus:
            theirs, used = [*theirs, 0], 0
        theirs[-1] += 1
        used += 1
    assert (len(theirs) == gpus) == (gpus in ORIGINALS)
    if gpus in ORIGINALS:
        assert even_split(28, gpus) == theirs == ORIGINALS[gpus]
    else:
        assert DEVIATIONS["no_gpu_is_left_idle"] and len(even_split(28, gpus)) == gpus


@pytest.mark.parametrize("blocks", [1, 4, 28, 40])
@pytest.mark.parametrize("gpus", range(1, 33))
def test_any_number_of_gpus(gpus: int, blocks: int) -> None:
    counts = even_split(blocks, gpus)
    assert len(counts) == gpus
    assert sum(counts) == blocks
    assert min(counts) >= 0
    share = (blocks + 2) / gpus  # embeddings and head count as a block each
    used = [counts[0] + 2, *counts[1:]]
    assert all(units < share + 1 for units in used[1:])
    assert used[0] < max(share + 1, 2.001)
    if gpus <= blocks:
        assert all(used)


@pytest.mark.parametrize("gpus", range(1, 33))
@pytest.mark.parametrize("version", VERSIONS)
def test_every_block_once_and_in_order(gpus: int, version: int) -> None:
    made = utils.auto_configure_device_map(gpus, version)
    names = names_of(version)
    assert list(made) == [*names.meeting, *(f"{names.blocks}.{index}" for index in range(28))]
    assert {made[name] for name in names.meeting} == {0}
    devices = [made[f"{names.blocks}.{index}"] for index in range(28)]
    assert devices == sorted(devices)
    assert set(devices) | {0} == set(range(min(gpus, 29)))


def test_the_keys_of_the_originals() -> None:
    assert {"transformer.word_embeddings", "transformer.final_layernorm", "lm_head", "transformer.layers.27"} <= set(
        utils.auto_configure_device_map(2, 1)
    )
    for version in (2, 3):
        assert {
            "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer",
            "transformer.rotary_pos_emb", "lm_head", "transformer.prefix_encoder", "transformer.encoder.layers.27",
        } <= set(utils.auto_configure_device_map(2, version))  # fmt: skip
    assert utils.auto_configure_device_map(2) == utils.auto_configure_device_map(num_gpus=2, model=3)


SIZES = Sizes(meeting=30, block=10, blocks=28)


@pytest.mark.parametrize(
    ("room", "meeting", "shares"),
    [
        ({0: 160, 1: 150}, 0, {0: 13, 1: 15}),  # even fits: as the originals
        ({0: 100, 1: 400}, 0, {0: 3, 1: 25}),  # in proportion: 60 of 100 and 250 of 400
        ({0: 400, 1: 100}, 0, {0: 22, 1: 6}),
        ({0: 20, 1: 300, 2: 300}, 1, {0: 1, 1: 12, 2: 15}),  # the first GPU holds no embeddings
        ({0: 0, 1: 400, 2: 400}, 1, {0: 0, 1: 13, 2: 15}),
        ({0: 100, 1: 100, "cpu": 1000}, 0, {0: 6, 1: 10, "cpu": 12}),  # a block less on GPU 0: room for guests
        ({0: 100, 1: 100, "cpu": 50, "disk": float("inf")}, 0, {0: 6, 1: 10, "cpu": 5, "disk": 7}),
    ],
)
def test_memory_decides_where_even_does_not_fit(
    room: dict[int | str, float], meeting: int, shares: dict[int | str, int]
) -> None:
    placed = place(SIZES, room)
    counts = {device: count for device, count in placed.shares if count or device in shares}
    assert (placed.meeting, counts) == (meeting, shares)
    for device, limit in room.items():
        assert counts.get(device, 0) * 10 + (30 if device == meeting else 0) <= limit


@pytest.mark.parametrize("room", [{0: 100, 1: 100}, {0: 20, 1: 20}, {0: 100, "cpu": 100}, {0: 0}])
def test_what_does_not_fit_is_said_with_numbers(room: dict[int | str, float]) -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"the weights take .* GPU 0 .* quantize=4"):
        place(Sizes(30 << 20, 10 << 20, 28), {device: size * 2**20 for device, size in room.items()})


def test_sizes_of_the_published_models() -> None:
    first = chatglm.ChatGLM1Config(
        vocab_size=130528, hidden_size=4096, num_layers=28, num_attention_heads=32, inner_hidden_size=16384
    )
    third = chatglm.ChatGLM3Config()
    for config, parameters in ((first, 6173286400), (third, 6243584000)):
        model = skeleton(config)
        sizes = sizes_of(model, torch.float16)
        tables = sum(tensor.nbytes for tensor in model.buffers())
        assert sizes.total == 2 * parameters + tables
    quarter = skeleton(third, chatglm.ChatGLMQuantizationConfig(4))
    assert sizes_of(quarter, torch.float16).block < 0.26 * sizes.block
    made = utils.auto_configure_device_map(2, third, {0: "4GiB", 1: "10GiB"})
    devices = [made[f"transformer.encoder.layers.{index}"] for index in range(28)]
    assert 4 < devices.count(0) < devices.count(1)
    assert "lm_head" not in made
    assert "transformer.prefix_encoder" not in made
    assert third.quantization_bit == 0
    tuned = chatglm.ChatGLM3Config(pre_seq_len=128)
    assert utils.auto_configure_device_map(2, tuned)["transformer.prefix_encoder"] == 0


@pytest.mark.parametrize(
    ("text", "size"), [(5, 5), ("5B", 5), ("10GiB", 10 << 30), ("1.5 GB", 1500000000), ("20mb", 20000000), ("0MB", 0)]
)
def test_limits_as_transformers_takes_them(text: int | str, size: int) -> None:
    assert to_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_gpus is 0"),
        ((2.5,), "num_gpus is 2.5"),
        ((2, 5), "no generation 5"),
        ((2, 3, {0: "1GiB"}), "give the config"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {5: "1GiB"}), "max_memory names 5: use 0, 1, 'cpu' and 'disk'"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {0: "much"}), "'much' is not a size"),
        ((2, chatglm.ChatGLM3Config(num_layers=2), {0: -1}), "-1 is not a size"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        utils.auto_configure_device_map(*arguments)


def test_a_plan_names_its_devices() -> None:
    assert place(SIZES, {0: 310}) == Placement(0, [(0, 28)])
