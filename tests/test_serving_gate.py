"""Bodies without their type, paths with a slash, JSON that is none, and what reaches the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from live_server import Live, Parrot, serve

BODY = b'{"prompt": "x", "max_length": 60, "temperature": 0}'
FORM, PLAIN = "application/x-www-form-urlencoded", "text/plain"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = Parrot(3)
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.mark.parametrize("path", ["/", "/stream", "/v1/completions"])
@pytest.mark.parametrize("kind", [None, FORM, PLAIN, "application/octet-stream", "application/json; charset=utf-8"])
def test_a_program_need_not_name_the_type(live: Live, path: str, kind: str | None) -> None:
    body = BODY.replace(b'"max_length": 60', b'"max_tokens": 2') if path.startswith("/v1") else BODY
    answer = live.http.post(path, content=body, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "of_browser", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Referer": "http://x/"}]
)
@pytest.mark.parametrize(
    "kind", [None, FORM, PLAIN, "multipart/form-data; boundary=x", "text/json", "x/application/json"]
)
def test_a_page_of_another_site_must(live: Live, of_browser: dict[str, str], kind: str | None) -> None:
    headers = of_browser | ({"Content-Type": kind} if kind else {})
    for path, status in (("/", 422), ("/v1/completions", 400)):
        before = live.engine.statistics.requests
        answer = live.http.post(path, content=BODY, headers=headers)
        assert answer.status_code == status
        assert "Content-Type: application/json" in answer.json()["error"]["message"]
        assert live.engine.statistics.requests == before
    allowed = live.http.post("/", content=BODY, headers=of_browser | {"Content-Type": "application/json"})
    assert allowed.status_code == 200  # a browser asks first whether it may send this type


def test_a_key_is_proof_enough() -> None:
    with serve(Parrot(3), api_key="k") as live:
        headers = {"Content-Type": FORM, "Origin": "https://evil.example"}
        assert live.http.post("/", content=BODY, headers=headers).status_code == 200
        assert live.http.post("/", content=BODY, headers=headers | {"Authorization": ""}).status_code == 401


def test_a_slash_at_the_end_changes_nothing(live: Live) -> None:
    for path in ("/v1/models/", "/health/", "/health//"):
        assert live.http.get(path, headers={"Host": "evil.example"}).status_code == 200
    assert live.http.post("/stream/", content=BODY).status_code == 200
    missing = live.http.get("/nowhere/", headers={"Host": "evil.example"})
    assert missing.status_code == 404 and "location" not in missing.headers and "evil" not in missing.text


@pytest.mark.parametrize(("path", "status"), [("/", 422), ("/v1/chat/completions", 400), ("/v1/embeddings", 400)])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "x",}', "the body is not JSON: .*line 1 column"),
        (b"prompt=x", "the body is not JSON"),
        (b"\xff", "the body is not UTF-8"),
        (b"[" * 200 + b"]" * 200, "inside each other"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
    ],
)
def test_errors_of_json_name_no_field(live: Live, path: str, status: int, body: bytes, reason: str) -> None:
    answer = live.http.post(path, content=body)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] is None and error["type"] == "invalid_request_error"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(error["message"])


def test_errors_of_fields_name_the_field(live: Live) -> None:
    long = "长 " * 2000
    for path, body, param in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/embeddings", {"input": long}, "input"),
        ("/", {"prompt": "x", "top_p": 2}, "top_p"),
    ):
        assert live.http.post(path, json=body).json()["error"]["param"] == param


def test_what_no_model_of_the_family_reads_is_named_in_a_sentence(live: Live) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}}
    text = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    body = {"messages": [{"role": "user", "content": [text, image]}], "max_tokens": 2}
    error = live.http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["message"] == "this model reads text only: a message holds a part of the type 'image_url'"
    assert error["param"] == "messages"
    tool = {"type": "function", "function": {"name": "f", "strict": None}, "cache_control": {"type": "ephemeral"}}
    body = {"messages": [{"role": "user", "content": [text]}], "tools": [tool], "max_tokens": 2}
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200


def test_lists_are_bounded_before_anything_else(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a text was encoded")

    message = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": "f"}}
    monkeypatch.setattr(type(live.engine.tokenizer), "encode_text", fail)
    monkeypatch.setattr(type(live.engine.tokenizer), "__call__", fail)
    for path, body in (
        ("/v1/chat/completions", {"messages": [message] * 5000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 2000}]}),
        ("/v1/chat/completions", {"messages": [message], "tools": [tool] * 200}),
        ("/v1/chat/completions", {"messages": [message], "functions": {f"f{i}": {} for i in range(200)}}),
        ("/v1/chat/completions", {"messages": [message], "stop": "x" * 2000}),
        ("/v1/completions", {"prompt": ["x"] * 1000}),
        ("/v1/completions", {"prompt": ["x"] * 81}),
        ("/v1/completions", {"prompt": ["x"] * 6, "n": 16}),
        ("/v1/embeddings", {"input": ["x"] * 3000}),
        ("/", {"prompt": "x", "history": [["a", "b"]] * 5000}),
    ):
        answer = live.http.post(path, json=body)
        assert answer.status_code in (400, 422) and len(answer.text) < 1500, (str(body)[:80], answer.text)


def test_the_first_of_many_errors_ends_the_work(live: Live) -> None:
    for messages in ([1] * 4000, [{"role": "user", "content": "x"}] * 5 + [{}] * 4000):
        message = live.http.post("/v1/chat/completions", json={"messages": messages}).json()["error"]["message"]
        assert message.count("messages.") == 1


def test_the_log_shows_no_control_characters(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="chatglm.serving"):
        live.http.get("/%1b%5b31m%0a%e2%80%ae%c2%85%e4%bd%a0")
        live.http.get("/health")  # a line is written after its answer
    (line,) = [record.getMessage() for record in caplog.records if '"status": 404' in record.getMessage()]
    assert line.isprintable() and json.loads(line)["path"] == "/\x1b[31m\n\u202e\x85你" and "你" in line
