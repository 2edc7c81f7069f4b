"""What a visitor is told when there is no answer: in the visitor's language, and never a detail of the server."""

from __future__ import annotations

import logging
import re

import pytest

from chatglm.conversation.fitting import QuestionTooLongError
from chatglm.decoding.choosing import NonFiniteLogitsError
from chatglm.engine import EngineStoppedError, PromptTooLongError, QueueFullError
from chatglm.front.page import failures

VISITORS = [
    QuestionTooLongError(900, 512),
    PromptTooLongError("the prompt has 900 tokens"),
    QueueFullError(64, 7),
    EngineStoppedError("the server is shutting down"),
]
SERVERS = [NonFiniteLogitsError("layer 3 gave NaN"), RuntimeError("secret detail"), KeyError("secret")]


@pytest.mark.parametrize("error", [*VISITORS, *SERVERS], ids=lambda error: type(error).__name__)
def test_it_is_said_in_the_visitors_language(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    english, chinese = (failures.reason(error, language) for language in ("en", "zh"))
    assert not re.search(r"[\u4e00-\u9fff]", english) and re.search(r"[\u4e00-\u9fff]", chinese)
    assert not re.search(r"[a-z]{2}", chinese)
    for text in (english, chinese):
        assert "{" not in text and "secret" not in text and "layer" not in text
    logged = [record.exc_info[1] for record in caplog.records if record.levelno == logging.ERROR and record.exc_info]
    assert logged == ([error, error] if error in SERVERS else [])


def test_numbers_and_the_visitors_own_mistakes_are_named() -> None:
    assert {"900", "512"} <= set(re.findall(r"\d+", failures.reason(VISITORS[0], "zh")))
    assert "7" in failures.reason(QueueFullError(64, 7), "en")
    assert failures.reason(ValueError("the tools are no list"), "en") == "the tools are no list"
