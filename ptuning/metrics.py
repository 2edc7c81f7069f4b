"""Scores answers against their references, by the metrics that the originals report.

`rouge-1`, `rouge-2`, `rouge-l`: f-scores of `rouge_chinese` on the words that jieba finds. `bleu-4`: NLTK's sentence
BLEU with smoothing method 3, on characters, as ChatGLM-6B and ChatGLM2-6B define it; `bleu-4-words` is the same on
words, as ChatGLM3 has it. All times 100, rounded to four decimals per row, and averaged over the rows.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence

#: The measures of one row, in the order of the originals' result files.
MEASURES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-words")

RowScore = Callable[[str, str], dict[str, float]]


class MetricsUnavailableError(ImportError):
    """A package that the metrics need is not installed."""


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean of every measure over all rows, from 0 to 100, and how many rows could not be measured.

    A row whose prediction or reference is empty, or only white space, scores 0 and is counted in `empty_predictions` or
    `empty_references`.

    Args:
        predictions: the answers of the model.
        references: the expected answers, one for each prediction.

    Returns:
        `rouge-1`, `rouge-2`, `rouge-l`, `bleu-4`, `bleu-4-words`, `empty_predictions`, `empty_references`.

    Raises:
        ValueError: there are no rows, or not as many predictions as references.
        TypeError: a text was given instead of a list of texts.
        MetricsUnavailableError: jieba, rouge-chinese or nltk is missing.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("score() compares lists of texts: put a single text into a list")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: there is one for each row")
    if not predictions:
        raise ValueError("there is nothing to score: no predictions were given")
    score_row = load()
    sums = dict.fromkeys(MEASURES, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        if prediction.strip() and reference.strip():
            for name, value in score_row(prediction, reference).items():
                sums[name] += value
    means: dict[str, float] = {name: total / len(predictions) for name, total in sums.items()}
    means["empty_predictions"] = sum(not text.strip() for text in predictions)
    means["empty_references"] = sum(not text.strip() for text in references)
    return means


def load() -> RowScore:
    """Returns the function that scores two non-empty texts. Call it before a long run to detect missing packages.

    Raises:
        MetricsUnavailableError: jieba, rouge-chinese or nltk is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in rouge_chinese, pkg_resources in jieba
            import jieba
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
            from rouge_chinese import Rouge
    except ImportError as error:
        raise MetricsUnavailableError(
            f"the metrics need jieba, rouge-chinese and nltk ({error}): pip install -r ptuning/requirements.txt"
        ) from error
    jieba.setLogLevel(logging.WARNING)  # else it logs the loading of its dictionary
    rouge, smoothing = Rouge(), SmoothingFunction().method3

    def bleu(prediction: list[str], reference: list[str]) -> float:
        return float(sentence_bleu([reference], prediction, smoothing_function=smoothing))

    def score_row(prediction: str, reference: str) -> dict[str, float]:
        words, wanted = list(jieba.cut(prediction)), list(jieba.cut(reference))
        values = {name: found["f"] for name, found in rouge.get_scores(" ".join(words), " ".join(wanted))[0].items()}
        values["bleu-4"] = bleu(list(prediction), list(reference))
        values["bleu-4-words"] = bleu(words, wanted)
        return {name: round(values[name] * 100, 4) for name in MEASURES}

    return score_row
