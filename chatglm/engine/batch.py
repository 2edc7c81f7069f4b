"""Assigns the rows of the KV cache: to running answers, to the prompt that is being read, and to idle conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..cache import RowCache
from ..cache.rows import ROW_STEP
from ..checkpoints import memory
from .request import Request

#: The share of the free memory that the KV caches may take.
MEMORY_SHARE = 0.5


@dataclass
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


class Batch:
    """The rows of a cache: first the `answering` ones, then at most one whose prompt is being read, then idle ones.

    Args:
        max_batch: how many rows may be busy.
        cache_tokens: how many tokens all rows may hold together.
    """

    def __init__(self, model: PreTrainedModel, max_batch: int, cache_tokens: int) -> None:
        self._model, self._max_batch, self._cache_tokens = model, max_batch, cache_tokens
        self._context: int = model.config.max_position_embeddings
        self.cache = RowCache()
        self.rows: list[Row] = []
        self.answering = 0
        self.busy = 0
        self._clock = 0

    def request(self, index: int) -> Request:
        request = self.rows[index].request
        if request is None:
            raise RuntimeError(f"row {index} of the cache is idle")
        return request

    def swap(self, first: int, second: int) -> None:
        if first != second:
            self.cache.swap(first, second, max(len(self.rows[first].ids), len(self.rows[second].ids)))
            self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    def release(self, index: int, damaged: bool = False) -> Request:
        """Makes a busy row idle and returns its request; a later turn may reuse its tokens unless it is damaged."""
        request = self.request(index)
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

    def _oldest_idle(self) -> int:
        return min(range(self.busy, len(self.rows)), key=lambda index: self.rows[index].used)

    def _free_row(self) -> int:
        """Returns an idle row: an empty one if there is one or room for one, else the one that was idle longest."""
        for index in range(self.busy, len(self.rows)):
            if not self.rows[index].ids:
                return index
        count = min(2 * len(self.rows), self._max_batch, self._cache_tokens // self.cache.capacity)
        if count <= len(self.rows):
            return self._oldest_idle()
        self.cache.resize(count, self.cache.capacity)
        self.rows += [Row() for _ in range(count - len(self.rows))]
        return count - 1

    def make_room(self, rows: int, tokens: int) -> bool:
        """Makes room for `rows` rows of `tokens` tokens, dropping idle rows if needed; False if it cannot."""
        cache = self.cache
        if rows <= cache.rows and tokens <= cache.capacity:
            return True
        if rows * tokens > self._cache_tokens:
            return False
        a_quarter_more = -(-tokens * 5 // (4 * ROW_STEP)) * ROW_STEP
        capacity = max(cache.capacity, min(a_quarter_more, self._context))
        capacity = min(capacity, self._cache_tokens // rows)
        wanted = cache.rows if rows <= cache.rows else min(2 * rows, self._max_batch)  # to keep idle conversations
        wanted = max(rows, min(wanted, self._cache_tokens // capacity))
        while len(self.rows) > wanted:
            self.swap(self._oldest_idle(), len(self.rows) - 1)
            del self.rows[-1]
        cache.resize(wanted, capacity)
        for row in self.rows:
            del row.ids[capacity:]
        self.rows += [Row() for _ in range(wanted - len(self.rows))]
        return True

    def longest(self) -> int:
        return max((len(row.ids) for row in self.rows[: self.busy]), default=0)

    def place(self, request: Request) -> int:
        """Gives the request a row after the busy ones; returns how many of its tokens the row already holds."""
        source, common = self._best_prefix(request)
        if source >= self.busy and 4 * common >= 3 * len(self.rows[source].ids):
            target = source  # the request continues its conversation
        else:
            target = self._free_row()
        if common and source != target:
            self.cache.copy(source, target, common)
        row = self.rows[target]
        row.ids, row.request = request.ids[:common], request
        row.adapter, row.picture = request.adapter, request.picture
        self.swap(target, self.busy)
        self.busy += 1
        return common

    def _best_prefix(self, request: Request) -> tuple[int, int]:
        """Returns the row with the longest common prefix with the request, and its length: at most all ids but the
        last, and what the request may reuse."""
        best, most, ids = -1, 0, request.ids
        for index, row in enumerate(self.rows):
            if (row.adapter, row.picture) != (request.adapter, request.picture):
                continue
            common = min(len(row.ids), len(ids) - 1, request.reusable)
            if row.ids[:common] != ids[:common]:
                common = next(i for i in range(common) if row.ids[i] != ids[i])
            common = self._model.reusable_prefix(ids, common)
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
    size = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    room = memory.available(model.device)
    return 2**40 // size if room is None else max(2 * ROW_STEP, int(room * MEMORY_SHARE) // size)
