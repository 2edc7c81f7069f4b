"""Embeddings of many texts: taken in one request, written in parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chatglm.serving.openai import embeddings
from live_server import NAME, Live, Parrot, serve


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engine = Parrot(3)
    with serve(engine) as live:
        yield live
    engine.close()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_more_texts_than_are_written_at_once(live: Live, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "WRITTEN_AT_ONCE", 7)
    texts = [f"text {number % 3}" for number in range(300)]
    body = {"input": texts, "encoding_format": encoding}
    answer = live.http.post("/v1/embeddings", json=body).json()
    assert answer["object"] == "list" and [one["index"] for one in answer["data"]] == list(range(300))
    vectors = [one["embedding"] for one in answer["data"]]
    assert vectors[:3] * 100 == vectors and vectors[0] != vectors[1]
    one = live.http.post("/v1/embeddings", json=body | {"input": "text 0"}).json()
    assert one["data"][0]["embedding"] == vectors[0]
    assert answer["usage"]["prompt_tokens"] > 300 * 2
    assert len(live.client.embeddings.create(model=NAME, input=texts).data) == 300


def test_more_than_openai_takes_is_refused(live: Live) -> None:
    answer = live.http.post("/v1/embeddings", json={"input": ["x"] * 2049})
    assert answer.status_code == 400 and "2048" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "input"


def test_all_texts_together_have_the_time_of_one_answer() -> None:
    with serve(Parrot(3), timeout=0.05) as live:
        answer = live.http.post("/v1/embeddings", json={"input": ["x " * 400] * 1000})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
