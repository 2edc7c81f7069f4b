"""Tensor parallelism over processes, on one machine or several, with quantised weights and for every generation.

The first process runs the network with its caches; every process holds a share of the rows of each matrix. Where a
matrix is multiplied, the first process sends the input to the others, and all multiply their rows. So each row is
computed as in one process, and the results are equal.
"""

from __future__ import annotations

from .group import Group, ParallelError
from .loading import load_parallel, work

__all__ = ["Group", "ParallelError", "load_parallel", "work"]
