"""The processes of a model: how they find each other, and the one thing that they do together."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

#: Seconds in which all processes must have joined.
JOIN_SECONDS = 600
#: Seconds in which another process must have taken what it is sent, or given a product. Gloo notices most closed
#: connections at once, but not one that closes just when something is being sent.
ANSWER_SECONDS = 60
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NEVER = timedelta(days=3650)  # others wait for the first process, and an idle server sends nothing
_END = -1


class ParallelError(ConnectionError):
    """Another process of the model has ended or does not answer; the message is one line."""


class Group:
    """The processes that share a model; made by `start` in the first one and by `join` in the others.

    Args:
        rank: of this process, from 0.
        size: how many processes there are.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, children: Sequence[subprocess.Popen[bytes]] = ()
    ) -> None:
        self.rank, self.size = rank, size
        self._lock, self._children, self._open = threading.Lock(), list(children), True
        self._failure: str | None = None
        timeout = _NEVER if rank else timedelta(seconds=ANSWER_SECONDS)
        with _one_line():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        # In every process: an interpreter that ends beside gloo's threads may end in an abort.
        atexit.register(self.close)

    @classmethod
    def start(cls, size: int, address: str | None = None, arguments: Sequence[str] = ()) -> Group:
        """Makes the group in its first process.

        Args:
            address: HOST:PORT of this machine at which the other processes, started by hand with
                `python -m chatglm.parallel`, join; None starts them on this machine.
            arguments: of `python -m chatglm.parallel`, by which the others find the model.

        Raises:
            ParallelError: not all have joined within JOIN_SECONDS, or one has ended.
            ValueError: there are fewer than two processes, or the address is none.
        """
        if size < 2:
            raise ValueError(f"tensor parallelism needs two processes or more, not {size}")
        host, port = ("127.0.0.1", 0) if address is None else parse_address(address)
        with _one_line():
            store = dist.TCPStore(host, port, size, is_master=True, wait_for_workers=False)
        children = []
        if address is None:
            cores = max(1, (os.cpu_count() or 1) // size)
            torch.set_num_threads(min(torch.get_num_threads(), cores))
            environment = {"OMP_NUM_THREADS": str(cores)} | os.environ
            for rank in range(1, size):
                place = ["--rank", str(rank), "--processes", str(size), "--at", f"{host}:{store.port}"]
                command = [sys.executable, "-m", "chatglm.parallel", *place, *arguments]
                # Ctrl-C is for the first process: it may still finish its answers, with the others' help.
                children.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
                )
        for rank in range(1, size):
            _await(store, rank, children)
        return cls(store, 0, size, children)

    @classmethod
    def join(cls, rank: int, size: int, address: str) -> Group:
        """Makes the group in another process. Raises as `start`."""
        host, port = parse_address(address)
        with _one_line():
            store = dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
            store.set(_joined(rank), "1")
        return cls(store, rank, size)

    def bounds(self, rows: int, rank: int | None = None) -> tuple[int, int]:
        """The rows [first, last) of a matrix that a process, by default this one, holds."""
        rank = self.rank if rank is None else rank
        first, last = (rows * index // self.size for index in (rank, rank + 1))
        return first, last

    def wait(self) -> None:
        """Returns once all processes have come here. Raises ParallelError if one has ended."""
        options = dist.BarrierOptions()
        options.timeout = _NEVER  # they may be loading
        world = dist.group.WORLD
        assert world is not None  # made by __init__
        with self._lasting(), _one_line():
            world.barrier(options).wait()

    def multiply(self, index: int, states: torch.Tensor, own: nn.Module, out_features: int) -> torch.Tensor:
        """In the first process: the product of a matrix whose rows all processes share.

        Args:
            index: of the matrix, as the others count them.
            states: (rows, in_features)
            own: the layer with the rows of this process.

        Returns:
            (rows, out_features)
        """
        with self._lock, self._lasting():
            states = states.contiguous()
            with _one_line():
                dist.broadcast(torch.tensor([index, len(states), _DTYPES.index(states.dtype)]), 0)
                dist.broadcast(_bytes(states), 0)
            parts = [own(states)]
            with _one_line():
                for rank in range(1, self.size):
                    first, last = self.bounds(out_features, rank)
                    part = torch.empty(len(states), last - first, dtype=parts[0].dtype)
                    dist.recv(_bytes(part), rank)
                    parts.append(part)
        return torch.cat(parts, dim=-1)

    def serve(self, layers: Sequence[Any]) -> None:
        """In the other processes: multiplies, until the first process ends or releases them.

        Args:
            layers: with the rows of this process, in the order of their indices.
        """
        header = torch.empty(3, dtype=torch.long)
        with torch.inference_mode():
            while True:
                try:
                    dist.broadcast(header, 0)
                    index, rows, kind = header.tolist()
                    if index == _END:
                        return
                    states = torch.empty(rows, layers[index].in_features, dtype=_DTYPES[kind])
                    dist.broadcast(_bytes(states), 0)
                    product = layers[index](states)
                    dist.send(_bytes(product.contiguous()), 0)
                except RuntimeError as error:
                    if "onnection" in str(error):  # the first process has gone without a word
                        return
                    raise

    def release(self) -> None:
        """In the first process: the others return from `serve`. Raises ParallelError if one has ended."""
        with self._lock, self._lasting(), _one_line():
            dist.broadcast(torch.tensor([_END, 0, 0]), 0)

    @contextlib.contextmanager
    def _lasting(self) -> Iterator[None]:
        """After a failure within, all later calls fail for the same reason: connections are closed, or what others sent
        for this call would be taken for the answer to the next."""
        if self._failure is not None:
            raise ParallelError(self._failure)
        try:
            yield
        except BaseException as error:
            interrupted = f"the processes are out of step, since one was interrupted ({type(error).__name__})"
            self._failure = str(error) if isinstance(error, ParallelError) else f"{interrupted}: restart them all"
            raise

    def close(self) -> None:
        """Leaves the group; in the first process, also ends the others. Once is enough, twice does no harm."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        if self.rank == 0:
            with contextlib.suppress(ParallelError):  # one has gone already; the others notice closed connections
                self.release()
        dist.destroy_process_group()
        for child in self._children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} is no address: write HOST:PORT, such as 192.168.0.10:29500")
    return host, int(port)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo does not know every dtype."""
    return tensor.view(torch.uint8)


def _joined(rank: int) -> str:
    return f"joined {rank}"


def _await(store: dist.Store, rank: int, children: Sequence[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < end:
        if store.check([_joined(rank)]):
            return
        if any(child.poll() is not None for child in children):
            raise ParallelError("a process of the tensor parallelism has ended: see its message above")
        time.sleep(0.1)
    raise ParallelError(f"process {rank} of the tensor parallelism has not joined within {JOIN_SECONDS} s")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise ParallelError(
                f"another process of the tensor parallelism has not answered for {ANSWER_SECONDS} s: restart them all"
            ) from error
        raise ParallelError("another process of the tensor parallelism has ended: its message says why") from error
