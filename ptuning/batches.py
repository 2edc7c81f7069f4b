"""The order of the rows, and how the rows of an optimizer step are divided among several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import Dataset, Sampler

from .encoding import IGNORED


class WithFillers(Dataset[Any]):
    """A data set whose indices beyond the end give its rows again, with nothing to learn."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.data[index % len(self.data)]
        return row if index < len(self.data) else row | {"labels": [IGNORED] * len(row["labels"])}


class EvenBatches:
    """Batches of a sampler's rows, equally many per process; at the end of an epoch they share the remaining rows.

    If fewer rows remain than there are processes, the others get a filler of `WithFillers`: all have to take part.
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

    Accelerate by itself fills the last step of an epoch with rows of the first.
    """
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and not shard.split_batches and not shard.drop_last:
        shard.batch_sampler = EvenBatches(shard.batch_sampler.sampler, shard.batch_size, shard.num_processes)
        shard.batch_size = None  # not always the same


class StepSampler(Sampler[int]):
    """The order of the rows in every epoch; the same for any number of processes, and after resuming.

    With `lengths`, the rows of an optimizer step have similar lengths, to save padding. Steps come in random order.
    """

    def __init__(self, rows: int, step: int, lengths: Sequence[int] | None, seed: int) -> None:
        self.rows, self.step, self.lengths, self.seed = rows, step, lengths, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        lengths, window = self.lengths, 50 * self.step
        steps: list[list[int]] = []
        for start in range(0, self.rows, window):
            chunk = sorted(order[start : start + window], key=lambda row: lengths[row])
            steps += [chunk[place : place + self.step] for place in range(0, len(chunk), self.step)]
        full = [rows for rows in steps if len(rows) == self.step]
        rest = [row for rows in steps if len(rows) < self.step for row in rows]  # of the last window only
        shuffled = torch.randperm(len(full), generator=generator).tolist()
        return iter([row for place in shuffled for row in full[place]] + rest)
