"""The measures of ptuning/metrics.py against numbers worked out by hand."""

from __future__ import annotations

import builtins
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptuning import metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _packages() -> None:
    for name in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(name, reason="the metrics' packages are not installed", exc_type=ImportError)


def bleu(matches: list[tuple[int, int]], shorter: float = 1.0) -> float:
    """BLEU x 100 of (matching n-grams, n-grams) for n = 1, 2, 3, 4; zeros as smoothing method 3 fills them."""
    halvings, product = 0, 1.0
    for found, of in matches:
        if found == 0:
            halvings += 1
        product *= (found or 1 / 2**halvings) / max(of, 1)
    return round(100 * shorter * product**0.25, 4)


def test_the_same_text_scores_full_marks() -> None:
    text = "这件衣服很好看，颜色也很漂亮。"
    found = metrics.score([text], [text])
    assert list(found)[:5] == list(metrics.MEASURES)
    assert all(found[name] == pytest.approx(100, abs=1e-4) for name in metrics.MEASURES)
    assert found["empty_predictions"] == found["empty_references"] == 0


def test_character_bleu() -> None:
    # 天气很好 against 天气不好: three of four characters, one of three pairs, none of two triples and one quadruple.
    found = metrics.score(["天气很好"], ["天气不好"])
    assert found["bleu-4"] == pytest.approx(bleu([(3, 4), (1, 3), (0, 2), (0, 1)]))
    # Three characters too few: the brevity penalty.
    found = metrics.score(["天气很好吗"], ["天气很好吗不知道"])
    assert found["bleu-4"] == pytest.approx(bleu([(5, 5), (4, 4), (3, 3), (2, 2)], shorter=math.exp(1 - 8 / 5)))


def test_rouge_is_on_words() -> None:
    # jieba: 我 喜欢 苹果 / 我 喜欢 香蕉: two of three words, one of two pairs, the longest common part has two words.
    found = metrics.score(["我喜欢苹果"], ["我喜欢香蕉"])
    assert found["rouge-1"] == pytest.approx(66.6667, abs=1e-4)
    assert found["rouge-2"] == pytest.approx(50, abs=1e-4)
    assert found["rouge-l"] == pytest.approx(66.6667, abs=1e-4)
    assert found["bleu-4-words"] == pytest.approx(bleu([(2, 3), (1, 2), (0, 1), (0, 0)]))


def test_rows_are_averaged() -> None:
    one, two = metrics.score(["我喜欢苹果"], ["我喜欢香蕉"]), metrics.score(["你好"], ["你好吗"])
    both = metrics.score(["我喜欢苹果", "你好"], ["我喜欢香蕉", "你好吗"])
    assert both == pytest.approx({name: (one[name] + two[name]) / 2 for name in one})


@pytest.mark.parametrize("empty", ["", "  ", "\n\n", "　"])
def test_an_empty_text_scores_zero_and_is_counted(empty: str) -> None:
    full = metrics.score(["你好"], ["你好"])
    found = metrics.score(["你好", empty, "你好", empty], ["你好", "你好", empty, empty])
    assert {name: found[name] for name in metrics.MEASURES} == pytest.approx(
        {name: full[name] / 4 for name in metrics.MEASURES}
    )
    assert found["empty_predictions"] == found["empty_references"] == 2


@pytest.mark.parametrize("text", ["。", "a", "？？\n", "。”", "……", "​", " a "])
def test_odd_texts_do_not_crash(text: str) -> None:
    for prediction, reference in ((text, "你好"), ("你好", text), (text, text)):
        found = metrics.score([prediction], [reference])
        assert all(0 <= found[name] <= 100.0001 for name in metrics.MEASURES)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metrics.score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.score([], [])
    with pytest.raises(TypeError, match="into a list"):
        metrics.score("a", "a")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rouge_chinese":
            raise ModuleNotFoundError("No module named 'rouge_chinese'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(metrics.MetricsUnavailableError, match=r"rouge_chinese.*pip install -r ptuning/requirements"):
        metrics.load()


def test_nothing_is_printed() -> None:
    code = "from ptuning import metrics; metrics.score(['你好'], ['你好'])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
