"""The rows of an optimizer step, divided among several processes without a row being learnt twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Dataset

IGNORED = -100  # the label of what is not learnt


class WithFillers(Dataset[Any]):
    """A data set; from its end on, its rows come once more with nothing to learn."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.data[index % len(self.data)]
        return row if index < len(self.data) else row | {"labels": [IGNORED] * len(row["labels"])}


class EvenBatches:
    """The rows of a sampler in batches, as many for each process: at the end of an epoch they share what is left.

    Where fewer rows are left than there are processes, the others get one of `WithFillers`: all have to take part.
    """

    def __init__(self, sampler: Sequence[int], batch_size: int, processes: int) -> None:
        self.sampler, self.batch_size, self.processes = sampler, batch_size, processes

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.batch_size * self.processes)) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        order, count = list(self.sampler), self.processes
        for start in range(0, len(order), self.batch_size * count):
            rows = order[start : start + self.batch_size * count]
            rows += [len(order) + rows[0]] * (count - len(rows))
            for process in range(count):
                yield rows[len(rows) * process // count : len(rows) * (process + 1) // count]


def divide_evenly(loader: Any) -> None:
    """Makes accelerate's loader for several processes use `EvenBatches`; its data set has to be a `WithFillers`.

    Accelerate itself fills up the last step of an epoch with rows of the first.
    """
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and not shard.split_batches and not shard.drop_last:
        shard.batch_sampler = EvenBatches(shard.batch_sampler.sampler, shard.batch_size, shard.num_processes)
        shard.batch_size = None  # not always the same
