"""Questions about pictures over HTTP: OpenAI's image parts, and the original's `POST /` with base64."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from chatglm import ChatGLMTokenizer
from chatglm.checkpoints.clues import VISUAL
from chatglm.demo import FOLDERS
from chatglm.serving.chat_engine import ChatEngine
from live_server import Live, serve
from test_pictures_reading import BAD
from tiny_visualglm import picture_bytes, tiny_visualglm

RED, BLUE = picture_bytes(), picture_bytes((10, 20, 250))
OPTIONS: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    tokenizer = ChatGLMTokenizer.from_pretrained(FOLDERS[1], chatglm_version=VISUAL)
    with ChatEngine(tiny_visualglm(tokenizer), tokenizer, max_batch=2) as engine, serve(engine) as server:
        yield server


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def about(data: bytes, text: str = "这是什么？") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url(data), "detail": "auto"}}]


def expected(live: Live, picture: Any, history: Any = None, query: str = "这是什么？") -> str:
    model, tokenizer = live.engine.model, live.engine.tokenizer
    options = {"do_sample": False, "max_new_tokens": 6, "min_length": 1}
    *_, step = model.stream_steps(tokenizer, query, history, image=picture, **options)
    return str(step.text)


def test_an_openai_client(live: Live) -> None:
    answers = [live.chat([{"role": "user", "content": about(one)}], **OPTIONS).choices[0].message.content
               for one in (RED, BLUE, RED)]  # fmt: skip
    assert answers == [expected(live, one) for one in (RED, BLUE, RED)]
    follow = [
        {"role": "user", "content": about(RED)}, {"role": "assistant", "content": "红色。"},
        {"role": "user", "content": "有几个？"},
    ]  # fmt: skip
    said = live.chat(follow, **OPTIONS).choices[0].message.content
    assert said == expected(live, RED, [("这是什么？", "红色。")], "有几个？")
    parts = list(live.chat([{"role": "user", "content": about(BLUE)}], stream=True, **OPTIONS))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answers[1]
    assert live.chat("你好", **OPTIONS).choices[0].message.content == expected(live, None, query="你好")


@pytest.mark.parametrize("name", [name for name, data in BAD.items() if len(data) < 2**20])
def test_a_damaged_picture_is_one_line(live: Live, name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        live.chat([{"role": "user", "content": about(BAD[name])}], **OPTIONS)
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]


def test_what_is_refused(live: Live) -> None:
    two = [{"role": "user", "content": about(RED)}, {"role": "assistant", "content": "x"},
           {"role": "user", "content": about(BLUE)}]  # fmt: skip
    with pytest.raises(BadRequestError, match="a conversation is about one"):
        live.chat(two, **OPTIONS)
    for address in ("http://127.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": address}}
        with pytest.raises(BadRequestError, match="data URL"):
            live.chat([{"role": "user", "content": [part]}], **OPTIONS)


def test_the_original_route(live: Live) -> None:
    text = base64.b64encode(RED).decode()
    body = {"image": text, "text": "这是什么？", "history": [], "temperature": 0, "max_length": 70}
    said = live.http.post("/", json=body).json()
    assert set(said) == {"result", "history", "status", "time"} and said["status"] == 200
    assert said["history"] == [["这是什么？", said["result"]]]
    again = live.http.post("/", json={**body, "text": "再说", "history": said["history"]}).json()
    assert [pair[0] for pair in again["history"]] == ["这是什么？", "再说"]
    plain = live.http.post("/", json={"prompt": "这是什么？", "image": text, "temperature": 0, "max_length": 70}).json()
    assert plain["response"] == said["result"]
    bodies = ({"text": "x", "image": "***"}, 400), ({"text": "x", "prompt": "y"}, 400), ({"image": text}, 422)
    for bad, status in bodies:
        answer = live.http.post("/", json=bad)
        assert answer.status_code == status and "\n" not in answer.json()["error"]["message"]
