"""Compares programs in turns of a few tokens: `python -m benchmarks.turns "COMMAND" "COMMAND" ...`.

The memory bandwidth of a shared machine changes within seconds, so two consecutive runs compare the machine with
itself. Here all programs start first and then take turns. Each has to print `ready` once and then, for every line that
it reads, a line with the milliseconds of its tokens, as `decode_6b` and `llama_cpp_6b` do with `--turns`. Prints the
median time of each, and the ratio of each to the first (minimum / median / maximum over the turns). A line may
also have, behind a `|`, the milliseconds of a loop that only reads the weights.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess


class Program:
    """A program that takes turns."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.turns: list[float] = []
        self.shares: list[float] = []  # of the read loop
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def wait(self) -> None:
        while self._read() != "ready":
            pass

    def turn(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        tokens, _, reading = self._read().partition("|")
        self.turns.append(statistics.median(map(float, tokens.split())))
        self.shares += [float(one) / self.turns[-1] for one in reading.split()]

    def end(self) -> None:
        with self._process:  # closes its pipes and waits
            pass

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command} ended: run it alone to see why")
        return line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="+")
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    programs = [Program(command) for command in args.command]
    try:
        for program in programs:
            program.wait()
        for _ in range(args.turns):
            for program in programs:
                program.turn()
    finally:
        for program in programs:
            program.end()
    for program in programs:
        middle = statistics.median(program.turns)
        ratios = sorted(one / first for one, first in zip(program.turns, programs[0].turns, strict=True))
        print(
            f"{1e3 / middle:5.1f} tokens/s ({middle:.1f} ms); time / first: {ratios[0]:.2f} / "
            f"{statistics.median(ratios):.2f} / {ratios[-1]:.2f}  {program.command}"
        )


if __name__ == "__main__":
    main()
