"""Commands that messages show can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from ptuning.messages import command_line


@pytest.mark.skipif(os.name == "nt", reason="shlex reads a POSIX shell's words")
@pytest.mark.parametrize("folder", ["out/checkpoint-4", "my data/out", "it's $HOME", 'a "b" & c;d', "数据/输出 (2)"])
def test_a_command_has_the_words_that_it_was_given(folder: str) -> None:
    words = ["python", "cli_demo.py", "--model", folder, "--adapter", Path(folder) / "checkpoint-4"]
    assert shlex.split(command_line(words)) == [str(word) for word in words]


def test_plain_words_stay_as_they_are() -> None:
    assert command_line(["python", "cli_demo.py", "--model", "out"]) == "python cli_demo.py --model out"
