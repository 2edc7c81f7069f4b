"""Assigns the rows of the KV cache: to running answers, to the prompt that is being read, and to idle conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..cache import RowCache, reusable_tokens
from ..cache.int8 import SCALE_BYTES
from ..cache.rows import ROW_STEP
from ..checkpoints import memory
from .request import Request

#: The share of the free memory that the KV caches may take.
MEMORY_SHARE = 0.5
#: Tokens for which there is always room.
LEAST_CACHE = 256
#: Rows grow by at least one token in so many.
GROWTH = 16
#: Tokens that each answer gets room for when another one joins, or the next step would have to preempt a request again.
SPARE = 64
#: Fewer tokens are copied rather than shared: it would hardly save memory.
LEAST_SHARED = 64


@dataclass(eq=False)
class Row:
    """A row of the cache: the tokens that it holds, the adapter that computed them, the picture among them, and the
    request that uses it.

    An idle row has no request and is kept for one that continues its conversation. `used` says when it became idle.
    """

    ids: list[int] = field(default_factory=list)
    adapter: str | None = None
    picture: object = None
    request: Request | None = None
    used: int = 0


@dataclass(frozen=True)
class Plan:
    """What a request reuses: the first `common` tokens of the row `source`."""

    request: Request
    source: Row | None
    common: int


class Batch:
    """The rows of a cache: first the `answering` ones, then at most one whose prompt is being read, then idle ones.

    Conversations that begin with the same tokens, such as a system prompt, hold them once (see `RowCache.share`).

    Args:
        max_batch: how many rows may be busy.
        cache_tokens: how many tokens all rows may hold together.
    """

    def __init__(self, model: PreTrainedModel, max_batch: int, cache_tokens: int) -> None:
        self._model, self._max_batch, self._cache_tokens = model, max_batch, cache_tokens
        self._context: int = model.config.max_position_embeddings
        self.cache = RowCache(model.kv_cache_dtype)
        self.rows: list[Row] = []
        self.answering = 0
        self.busy = 0
        self._clock = 0
        self._plan: Plan | None = None

    def request(self, index: int) -> Request:
        request = self.rows[index].request
        if request is None:
            raise RuntimeError(f"row {index} of the cache is idle")
        return request

    def swap(self, first: int, second: int) -> None:
        if first != second:
            self.cache.swap(first, second, max(self._own(first), self._own(second)))
            self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    def release(self, index: int, damaged: bool = False) -> Request:
        """Makes a busy row idle and returns its request; a later turn may reuse its tokens unless it is damaged."""
        request = self.request(index)
        if index >= self.answering:  # a prompt that was not read to its end has not been seen to give no NaN
            damaged = damaged or not self.cache.is_finite(index, self._own(index))
        if damaged:
            self.cache.clear(index)
            self.rows[index].ids = []
        if index < self.answering:
            self.answering -= 1
            self.swap(index, self.answering)
            index = self.answering
        self.busy -= 1
        self.swap(index, self.busy)
        self._clock += 1
        self.rows[self.busy].request, self.rows[self.busy].used = None, self._clock
        return request

    def tokens(self, running: bool = False) -> int:
        """How many tokens all rows hold, or those of running requests; what several share is counted once. Any thread
        may ask."""
        rows = [pair for pair in zip(self.rows, self.cache.beginnings, strict=False) if pair[0].request or not running]
        shared = sum(one.tokens for one in {one for _, one in rows} if one is not None)
        return shared + sum(max(0, len(row.ids) - (one.tokens if one else 0)) for row, one in rows)

    def room(self, index: int) -> int:
        """How many more tokens a row can take."""
        return self.cache.capacity - self._own(index)

    def longest(self) -> int:
        """The most tokens that a busy row holds on its own."""
        return max((self._own(index) for index in range(self.busy)), default=0)

    def make_room(self, rows: int, tokens: int, kept: Row | None = None) -> bool:
        """Makes room for `rows` rows of `tokens` tokens each of its own, dropping idle rows (but not `kept`) if needed;
        False if it cannot."""
        cache = self.cache
        if rows <= cache.rows and tokens <= cache.capacity:
            return True
        using = [index for index, row in enumerate(self.rows) if index < self.busy or row is kept]
        left = self._cache_tokens - cache.shared_by(using)
        if rows * tokens > left:
            return False
        capacity = min(max(cache.capacity, self._rounded(tokens)), left // rows)
        wanted = cache.rows if rows <= cache.rows else min(max(rows, 2 * cache.rows), self._max_batch)
        self._resize(rows, wanted, capacity, kept)
        return True

    def make_room_for(self, request: Request) -> bool:
        """Makes room for a row of the request, and decides what of it others hold already; False if it cannot."""
        source, common = self._best_prefix(request)
        kept = self.rows[source] if common else None
        if kept is not None and not self._continues(source, common):
            self._share(request, kept, common)
        self._plan = Plan(request, kept, common)
        own = len(request.ids) - (0 if kept is None else self._reused(self.rows.index(kept), common))
        spare = SPARE if self.busy else 1
        needed = [own + min(spare, request.limit - len(request.ids))]
        for index in range(self.busy):
            other = self.request(index)
            needed.append(self._own(index) + min(spare, other.limit - len(other.ids)))
        return self.make_room(self.busy + 1, max(needed), kept)

    def place(self, request: Request) -> int:
        """Gives the request, for which there is room, a row after the busy ones; returns how many of its tokens the row
        already holds."""
        plan = self._plan
        if plan is None or plan.request is not request:
            raise RuntimeError("no room was made for this request")
        self._plan, common = None, plan.common
        if plan.source is None:
            target = source = self._free_row()
            self.cache.leave(target)
        else:
            source = self.rows.index(plan.source)
            target = source if self._continues(source, common) else self._free_row()
        if source != target or common < self.cache.shared(source):
            self.cache.copy(source, target, common)
        row = self.rows[target]
        row.ids, row.request = request.ids[:common], request
        row.adapter, row.picture = request.adapter, request.picture
        self.swap(target, self.busy)
        self.busy += 1
        return common

    def _own(self, index: int) -> int:
        """How many tokens a row holds that are not in a beginning."""
        return max(0, len(self.rows[index].ids) - self.cache.shared(index))

    def _rounded(self, tokens: int) -> int:
        """A capacity for so many tokens, and some more."""
        step = max(ROW_STEP, tokens // GROWTH)
        return min(-(-tokens // step) * step, self._context)

    def _resize(self, rows: int, wanted: int, capacity: int, kept: Row | None) -> None:
        """Makes `wanted` rows, or fewer, but at least `rows`; drops idle rows if they do not fit."""
        while True:
            left = self._cache_tokens - self.cache.shared_by(range(len(self.rows)))
            count = max(rows, min(wanted, left // capacity))
            droppable = [index for index in range(self.busy, len(self.rows)) if self.rows[index] is not kept]
            if not droppable or (len(self.rows) <= count and count * capacity <= left):
                break
            self.swap(min(droppable, key=lambda index: self.rows[index].used), len(self.rows) - 1)
            self.cache.leave(len(self.rows) - 1)
            del self.rows[-1]
        self.cache.resize(count, capacity)
        for index, row in enumerate(self.rows):
            del row.ids[self.cache.shared(index) + capacity :]
        self.rows += [Row() for _ in range(count - len(self.rows))]

    def _free_row(self) -> int:
        """Returns an idle row: an empty one if there is one or room for one, else the one that was idle longest."""
        for index in range(self.busy, len(self.rows)):
            if not self.rows[index].ids:
                return index
        left = self._cache_tokens - self.cache.shared_by(range(len(self.rows)))
        count = min(2 * len(self.rows), self._max_batch, left // self.cache.capacity)
        if count <= len(self.rows):
            return min(range(self.busy, len(self.rows)), key=lambda index: self.rows[index].used)
        self.cache.resize(count, self.cache.capacity)
        self.rows += [Row() for _ in range(count - len(self.rows))]
        return count - 1

    def _continues(self, source: int, common: int) -> bool:
        """Whether a request that has so many tokens in common with a row continues its conversation, in its row."""
        length = len(self.rows[source].ids)
        return source >= self.busy and 4 * common >= 3 * length and length - common < LEAST_SHARED

    def _reused(self, source: int, common: int) -> int:
        """How many tokens a request with so many in common with a row does not have to hold on its own."""
        shared = self.cache.shared(source)
        return shared if common >= shared else 0

    def _share(self, request: Request, source: Row, common: int) -> None:
        """Makes what the request has in common with a row a beginning of all rows that start with it, if these then
        hold fewer tokens than with a copy."""
        cache, ids, index = self.cache, request.ids, self.rows.index(source)
        if common < LEAST_SHARED or cache.shared(index) == common:
            return
        same = {
            index: len(row.ids)
            for index, row in enumerate(self.rows)
            if (row.adapter, row.picture) == (request.adapter, request.picture) and row.ids[:common] == ids[:common]
        }
        others = [index for index, row in enumerate(self.rows) if row.ids and index not in same]
        copied = [len(ids) - self._reused(index, common), *map(self._own, [*others, *same])]
        kept = [*(length - common for length in same.values()), *map(self._own, others)]
        shared, shared_before = cache.shared_by(others) + common, cache.shared_by([*others, *same])
        if sum(kept) + len(ids) - common + shared >= sum(copied) + shared_before:
            return
        # All rows are as long as the longest one: what the beginning takes has to be free, or become free.
        wanted = len(copied) * max(*kept, len(ids) - common) + shared
        if wanted > max(self._cache_tokens, len(copied) * max(copied) + shared_before):
            return
        if len(kept) * max(kept) + shared > self._cache_tokens:
            return
        if max(kept) > cache.capacity:  # some of these rows had a longer beginning
            cache.resize(len(self.rows), max(kept))
        cache.share(same, common)
        using = [index for index, row in enumerate(self.rows) if index < self.busy or row is source]
        capacity = min(self._rounded(max(kept)), (self._cache_tokens - cache.shared_by(using)) // len(using))
        self._resize(len(using), len(self.rows), max(capacity, 1), source)

    def _best_prefix(self, request: Request) -> tuple[int, int]:
        """Returns the row with the longest common prefix with the request, and its length: at most all ids but the
        last, and what the request may reuse."""
        best, most, ids = -1, 0, request.ids
        for index, row in enumerate(self.rows):
            if (row.adapter, row.picture) != (request.adapter, request.picture):
                continue
            common = min(reusable_tokens(self._model, row.ids, ids), request.reusable)
            if common > most:
                best, most = index, common
        return best, most

    def group(self) -> None:
        """Moves the answering rows of each adapter next to each other."""
        place = 0
        while place < self.answering:
            adapter = self.rows[place].adapter
            place += 1
            for index in range(place, self.answering):
                if self.rows[index].adapter == adapter:
                    self.swap(place, index)
                    place += 1


def affordable_tokens(model: PreTrainedModel) -> int:
    """Returns how many tokens of KV cache fit into half of the memory that the model leaves free."""
    config = model.config
    width = config.head_dim * model.dtype.itemsize
    if model.kv_cache_dtype == "int8":
        width = config.head_dim + SCALE_BYTES
    size = 2 * config.num_layers * config.num_key_value_heads * width
    room = memory.available(model.device)
    return 2**40 // size if room is None else max(LEAST_CACHE, int(room * MEMORY_SHARE) // size)
