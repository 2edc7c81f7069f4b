"""Which row of the KV cache is whose: those that answer, those whose prompt is read, and idle conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..checkpoints import memory
from .request import Request
from .rows import BLOCK, RowCache

#: Share of the free memory that the KV caches may take.
MEMORY_SHARE = 0.5


@dataclass
class Row:
    """A row of the cache: which tokens it holds, computed with which adapter, and for whom.

    request: None: for whoever goes on from there.
    """

    ids: list[int] = field(default_factory=list)
    adapter: str | None = None
    request: Request | None = None
    used: int = 0


class Batch:
    """The rows of a cache: `answering` ones first, then at most one whose prompt is being read, then idle ones.

    Args:
        max_batch: busy rows.
        cache_tokens: tokens that all rows may hold together.
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
        """Takes a row out of the busy ones; what it holds is kept for a later turn unless it is damaged."""
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
        """An idle row, and of those the one whose conversation is the least loss: none at all if it can be."""
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
        """Sees to it that there are `rows` rows of `tokens` tokens, at the cost of idle ones where it has to be."""
        cache = self.cache
        if rows <= cache.rows and tokens <= cache.capacity:
            return True
        if rows * tokens > self._cache_tokens:
            return False
        capacity = max(cache.capacity, min(-(-tokens * 5 // (4 * BLOCK)) * BLOCK, self._context))  # a quarter to spare
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
        """A row for this request, behind the busy ones; gives how many of its tokens the row holds already."""
        source, common = self._best_prefix(request.ids, request.adapter)
        if source >= self.busy and 4 * common >= 3 * len(self.rows[source].ids):
            target = source  # its conversation goes on
        else:
            target = self._free_row()
        if common and source != target:
            self.cache.copy(source, target, common)
        row = self.rows[target]
        row.ids, row.adapter, row.request = request.ids[:common], request.adapter, request
        self.swap(target, self.busy)
        self.busy += 1
        return common

    def _best_prefix(self, ids: list[int], adapter: str | None) -> tuple[int, int]:
        """The row that has most in common with `ids`, and how many tokens that are (not the last: it has to be run)."""
        best, most = -1, 0
        for index, row in enumerate(self.rows):
            if row.adapter != adapter:
                continue
            common = min(len(row.ids), len(ids) - 1)
            if row.ids[:common] != ids[:common]:
                common = next(i for i in range(common) if row.ids[i] != ids[i])
            common = self._model.reusable_prefix(ids, common)
            if common > most:
                best, most = index, common
        return best, most

    def group(self) -> None:
        """Brings the answering rows of each adapter together."""
        place = 0
        while place < self.answering:
            adapter = self.rows[place].adapter
            place += 1
            for index in range(place, self.answering):
                if self.rows[index].adapter == adapter:
                    self.swap(place, index)
                    place += 1


def affordable_tokens(model: PreTrainedModel) -> int:
    """How many tokens of KV cache fit into the memory that is left beside the model."""
    config = model.config
    size = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    room = memory.available(model.device)
    return 2**40 // size if room is None else max(2 * BLOCK, int(room * MEMORY_SHARE) // size)
