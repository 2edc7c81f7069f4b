"""The game in a terminal and in a pipe, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from game.puzzles import Deck, Puzzle, own_puzzles

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "CHATGLM_MODEL"} | {
    "PYTHONIOENCODING": "utf-8", "NO_PROXY": "127.0.0.1",
}  # fmt: skip


def play(lang: str, lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "game" / f"cli_demo_{lang}.py"), *arguments]
    return subprocess.run(
        command, input=lines, capture_output=True, text=True, encoding="utf-8", env=ENVIRONMENT, timeout=300
    )


def first(lang: str, seed: int) -> Puzzle:
    return Deck(own_puzzles(lang), seed).draw()


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_a_round_is_played_to_its_end_in_a_pipe(lang: str) -> None:
    puzzle = first(lang, 5)
    known = {one.verdict: one.text for one in puzzle.questions}
    lines = [known["irrelevant"], "", "  ", known["no"], "hint", *(key.words[0][0] for key in puzzle.keys), "stop"]
    played = play(lang, "\n".join(lines), "--seed", "5")
    assert played.returncode == 0
    said = played.stdout.splitlines()
    words = {"zh": ["无关", "否", "是"], "en": ["Irrelevant", "No", "Yes"]}[lang]
    assert said[:2] == words[:2]
    assert puzzle.hints[0] in said[2]
    assert said[3] == words[2] and puzzle.keys[0].fact in said[4]
    assert said[-1].endswith(puzzle.bottom)
    assert puzzle.bottom not in "\n".join(said[:-1])
    assert puzzle.surface in played.stderr and puzzle.bottom not in played.stderr
    assert {"zh": "关键词裁判", "en": "keyword referee"}[lang] in played.stderr  # said so
    assert "90" in played.stderr  # one hint


def test_the_words_of_the_game_are_alone_on_their_line() -> None:
    deck = Deck(own_puzzles("en"), 7)
    puzzle, following = deck.draw(), deck.draw()
    played = play(
        "en", "finish line?\nstop it\n FINISH \nReveal\nHINT\nanything?\n\tStop\nis it late?\n", "--seed", "7"
    )
    said = played.stdout.splitlines()
    assert said[:2] == ["Irrelevant (the host is not sure)"] * 2
    assert said[2:] == [f"The solution: {following.bottom}"]
    assert puzzle.bottom not in played.stdout
    assert "This round is over" in played.stderr and "no hints left" in played.stderr


def test_a_referee_that_is_not_there(tmp_path: Path) -> None:
    played = play("en", "is it?\nstop\n", "--api-base", "http://127.0.0.1:1/v1", "--api-model", "m")
    assert (played.returncode, played.stdout) == (1, "")
    assert "cannot be reached" in played.stderr and "Traceback" not in played.stderr
    file = tmp_path / "mine.csv"
    file.write_text("story,solution\ns,b\n", encoding="utf-8")
    for arguments, reason in (
        (["--api-base", "http://127.0.0.1:1/v1"], "--api-base needs --api-model"),
        (["--puzzles", str(file)], "need a model as referee"),
        (["--puzzles", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ):
        refused = play("en", "", *arguments)
        assert refused.returncode == 1 and reason in refused.stderr and "Traceback" not in refused.stderr, (
            refused.stderr
        )
        assert refused.stdout == ""


def test_a_terminal() -> None:
    pexpect = pytest.importorskip("pexpect", reason="needs a pseudo-terminal")
    puzzle = first("zh", 3)
    child = pexpect.spawn(
        sys.executable, [str(ROOT / "game" / "cli_demo_zh.py"), "--seed", "3"], env=ENVIRONMENT, encoding="utf-8",
        timeout=300,
    )  # fmt: skip
    child.expect_exact(puzzle.surface)
    child.expect_exact("提问：")
    child.sendintr()
    child.expect_exact("可以重新提问")
    child.sendline("提示")
    child.expect_exact(puzzle.hints[0])
    child.sendline("汤底")
    child.expect_exact(puzzle.bottom)
    child.expect_exact("得分 0")
    child.sendline("finish")
    child.expect_exact("\x1b[2J")
    child.sendeof()
    child.expect_exact("再见")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
