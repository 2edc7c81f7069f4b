"""The rows of the engine's cache: every row is its own, whatever happens to the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatglm.cache import ChatGLMCache, RowCache

CPU = torch.device("cpu")


def states(tokens: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (rows, 2 heads, tokens, head_dim 3)."""
    return torch.randn(rows, 2, tokens, 3), torch.randn(rows, 2, tokens, 3)


def filled(lengths: list[int], capacity: int = 10) -> tuple[RowCache, list[torch.Tensor]]:
    """A cache of two layers whose rows have so many tokens, and the keys of its second layer."""
    torch.manual_seed(0)
    cache, keys = RowCache(), []
    cache.resize(len(lengths), capacity)
    for row, length in enumerate(lengths):
        cache.select_row(row, 0)
        cache.update(*states(length), 0)
        keys.append(cache.update(*states(length), 1)[0][0].clone())
    return cache, keys


def held(cache: RowCache, row: int, length: int) -> torch.Tensor:
    """The keys of a row in the second layer."""
    cache.select_row(row, length)
    room = cache.room_for_tokens()
    assert room is not None and list(room.lengths) == [length] and list(room.lines) == [row]
    return room.layers[1][0][row][:, :length]


def test_it_answers_the_questions_of_our_caches() -> None:
    assert isinstance(RowCache(), ChatGLMCache)


def test_rows_step_together_at_places_of_their_own() -> None:
    lengths = [4, 1, 7]
    cache, before = filled(lengths)
    cache.select_places(range(3), lengths, CPU)
    assert cache.mask is not None
    assert cache.mask.tolist() == [[int(place <= length) for place in range(8)] for length in lengths]
    new = states(1, rows=3)
    cache.update(*new, 0)
    keys, values = cache.update(*new, 1)
    assert keys.shape == values.shape == (3, 2, 8, 3)
    for row, length in enumerate(lengths):
        assert torch.equal(keys[row, :, :length], before[row])
        assert torch.equal(keys[row, :, length], new[0][row, :, 0])
        assert not keys[row, :, length + 1 :].any()
    assert cache.get_seq_length() == 7 and cache.get_mask_sizes(1) == (8, 0)


def test_rows_of_one_length_need_no_mask() -> None:
    cache, _ = filled([3, 3])
    cache.select_places([0, 1], [3, 3], CPU)
    assert cache.mask is None
    cache.select_places([0, 1], [3, 2], CPU)
    assert cache.mask is not None
    cache.select_row(1, 3)
    assert cache.mask is None


def test_tokens_that_follow_each_other_in_one_row_step_with_other_rows() -> None:
    cache, before = filled([4, 2, 5])
    new = states(1, rows=4)
    cache.select_places([2, 0, 0, 0], [5, 4, 5, 6], CPU)
    assert cache.mask is not None and cache.mask.sum(-1).tolist() == [6, 5, 6, 7]
    cache.update(*new, 0)
    keys, _ = cache.update(*new, 1)
    assert keys.shape == (4, 2, 7, 3)
    assert torch.equal(keys[0, :, :5], before[2]) and torch.equal(keys[0, :, 5], new[0][0, :, 0])
    for row in (1, 2, 3):
        assert torch.equal(keys[row, :, :4], before[0])
        assert torch.equal(keys[row, :, 4:7], new[0][1:, :, 0].transpose(0, 1))
    room = cache.room_for_tokens()
    assert (list(room.lines), list(room.lengths)) == ([2, 0, 0, 0], [5, 4, 5, 6])
    assert torch.equal(held(cache, 1, 2), before[1])


def test_a_prompt_is_read_in_pieces() -> None:
    cache, (before,) = filled([4])
    new = states(3)
    cache.select_row(0, 4)
    cache.update(*new, 0)
    keys, _ = cache.update(*new, 1)
    assert torch.equal(keys[0], torch.cat((before, new[0][0]), dim=1))


@pytest.mark.parametrize(("rows", "capacity"), [(5, 20), (3, 7), (2, 20), (3, 10)])
def test_a_new_size_keeps_what_fits(rows: int, capacity: int) -> None:
    lengths = [4, 1, 7]
    cache, before = filled(lengths)
    size = cache.size
    cache.resize(rows, capacity)
    assert (cache.rows, cache.capacity) == (rows, capacity)
    assert cache.size * 30 == size * rows * capacity
    for row in range(min(rows, 3)):
        assert torch.equal(held(cache, row, lengths[row]), before[row])


def test_copies_and_swaps() -> None:
    cache, before = filled([4, 1, 7])
    cache.swap(0, 2, 7)
    assert torch.equal(held(cache, 0, 7), before[2]) and torch.equal(held(cache, 2, 4), before[0])
    cache.copy(0, 1, 5)
    assert torch.equal(held(cache, 1, 5), before[2][:, :5])
    assert torch.equal(held(cache, 0, 7), before[2])


def test_a_row_that_may_hold_nan_is_cleared() -> None:
    cache, before = filled([4, 4])
    cache.select_row(0, 4)
    broken: Any = [torch.full((1, 2, 1, 3), float("nan"))] * 2
    cache.update(*broken, 0)
    cache.update(*broken, 1)
    cache.clear(0)
    assert not held(cache, 0, 10).any()
    assert torch.equal(held(cache, 1, 4), before[1])


def whole(cache: RowCache, row: int, length: int) -> torch.Tensor:
    """The keys of a row in the second layer, with its beginning."""
    cache.select_row(row, length)
    cache.update(*states(1), 0)
    return cache.update(*states(1), 1)[0][0][:, :length]


def test_rows_share_their_first_tokens() -> None:
    cache, before = filled([6, 6, 4])
    cache.copy(0, 1, 5)  # now the first five are the same
    own = held(cache, 1, 6)[:, 5].clone()
    size = cache.size
    cache.share({0: 6, 1: 6}, 5)
    assert [cache.shared(row) for row in range(3)] == [5, 5, 0] and cache.shared_by(range(3)) == 5
    assert cache.size == size + 5 * size // 30  # until the rows are made shorter
    cache.resize(3, 5)
    assert cache.size == (3 * 5 + 5) * size // 30
    assert torch.equal(whole(cache, 0, 6), before[0]) and torch.equal(whole(cache, 2, 4), before[2])
    assert torch.equal(whole(cache, 1, 6), torch.cat((before[0][:, :5], own.unsqueeze(1)), dim=1))
    # They step together, with and without the third, which shares nothing.
    for lengths in ([6, 6], [6, 6, 4]):
        new = states(1, rows=len(lengths))
        cache.select_places(range(len(lengths)), lengths, CPU)
        room = cache.room_for_tokens()
        assert [len(layers) for layers in room.shared] == [2, 2, 0][: len(lengths)]
        assert list(room.lengths) == [1, 1, 4][: len(lengths)]
        cache.update(*new, 0)
        keys, _ = cache.update(*new, 1)
        assert keys.shape == (len(lengths), 2, 7, 3)
        for row, length in enumerate(lengths):
            assert torch.equal(keys[row, :, length], new[0][row, :, 0])
        assert torch.equal(keys[0, :, :6], before[0]) and torch.equal(keys[1, :, :5], before[0][:, :5])
        assert (cache.mask is None) == (len(lengths) == 2)


def test_what_is_shared_is_told_to_one_call_decoding() -> None:
    cache, before = filled([6, 6])
    cache.copy(0, 1, 6)
    cache.share({0: 6, 1: 6}, 4)
    cache.select_places([0, 1], [6, 6], CPU)
    room = cache.room_for_tokens()
    assert list(room.lengths) == [2, 2] and room.shared[0] is room.shared[1]
    assert torch.equal(room.shared[0][1][0], before[0][:, :4])
    assert torch.equal(room.layers[1][0][1][:, :2], before[0][:, 4:])


def test_shared_tokens_are_copied_swapped_and_left() -> None:
    cache, before = filled([6, 6, 4])
    cache.share({0: 6}, 4)
    cache.copy(0, 1, 5)  # takes part
    assert cache.shared(1) == 4 and torch.equal(whole(cache, 1, 5), before[0][:, :5])
    cache.copy(0, 2, 3)  # too few: a copy
    assert cache.shared(2) == 0 and torch.equal(whole(cache, 2, 3), before[0][:, :3])
    cache.swap(0, 2, 3)
    assert [cache.shared(row) for row in range(3)] == [0, 4, 4] and torch.equal(whole(cache, 2, 6), before[0])
    cache.share({1: 5, 2: 6}, 2)  # a shorter beginning
    assert cache.shared_by(range(3)) == 2 and torch.equal(whole(cache, 2, 6), before[0])
    cache.copy(2, 2, 1)
    assert cache.shared(2) == 0 and torch.equal(whole(cache, 2, 1), before[0][:, :1])
    cache.clear(1)
    assert cache.shared_by(range(3)) == 0
