"""The streamlit page, as streamlit itself runs it, with the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

testing = pytest.importorskip("streamlit.testing.v1", reason="web_demo2.py needs streamlit, which is optional")

ROOT = Path(__file__).resolve().parents[1]


def visitor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr("sys.argv", ["web_demo2.py", *arguments])
    monkeypatch.delenv("CHATGLM_MODEL", raising=False)
    return testing.AppTest.from_file(str(ROOT / "web_demo2.py"), default_timeout=300).run()


def test_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    page = visitor(monkeypatch, "--device", "cpu", "--temperature", "0")
    assert not page.exception and not page.error
    assert page.title[0].value == "ChatGLM3" and "million" in page.caption[0].value
    page.chat_input[0].set_value("My name is Tom").run()
    page.chat_input[0].set_value("What is my name?").run()
    assert not page.exception
    said = [message.markdown[0].value for message in page.chat_message]
    assert said == ["My name is Tom", "Nice to meet you, Tom! I will remember your name.", "What is my name?",
                    "Your name is Tom."]  # fmt: skip
    other = visitor(monkeypatch, "--device", "cpu", "--temperature", "0")
    assert not other.chat_message  # a visitor sees no other's chat
    page.sidebar.slider[0].set_value(5).run()
    page.chat_input[0].set_value("What is my name?").run()
    assert "too long" in page.error[0].value
    page.button[0].click().run()
    assert not page.chat_message


def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unrecognized arguments: --no-such" in visitor(monkeypatch, "--no-such").error[0].value
    assert "/nowhere" in visitor(monkeypatch, "--model", "/nowhere").error[0].value
