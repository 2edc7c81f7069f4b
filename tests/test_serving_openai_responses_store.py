"""Responses are kept for a bounded time, up to a bounded number and size."""

from __future__ import annotations

from typing import Any

from chatglm.serving.openai.responses_store import ResponseStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def response(name: str, text: str = "") -> dict[str, Any]:
    return {"id": name, "text": text}


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    store = ResponseStore(most=2)
    for name in "abc":
        store.put("me", response(name), None, [])
    assert store.get("me", "a") is None and store.get("me", "b") and store.get("me", "c") and len(store) == 2


def test_they_go_after_their_time() -> None:
    clock = Clock()
    store = ResponseStore(seconds=10, clock=clock)
    store.put("me", response("a"), None, [])
    clock.now = 5
    store.put("me", response("b"), None, [])
    clock.now = 10
    assert store.get("me", "a") is None and store.get("me", "b") is not None
    clock.now = 15
    assert len(store) == 0


def test_they_go_when_they_are_too_large_together() -> None:
    store = ResponseStore(characters=1000)
    for name in "abc":
        store.put("me", response(name, "x" * 400), None, [])
    assert len(store) == 2 and store.get("me", "a") is None
    store.put("me", response("d", "x" * 2000), None, [])  # too large on its own: nothing stays
    assert len(store) == 0
    store.put("me", response("e"), None, [])
    assert store.get("me", "e") is not None


def test_a_continued_response_keeps_the_whole_conversation() -> None:
    store = ResponseStore()
    store.put("me", response("a"), None, [{"content": "1"}])
    store.put("me", response("b"), store.get("me", "a"), [{"content": "2"}])
    assert store.delete("me", "a") and not store.delete("me", "a")
    kept = store.get("me", "b")
    assert kept is not None and [message["content"] for message in kept.messages] == ["1", "2"]
    assert store.get("me", "a") is None and len(store) == 1


def test_nobody_else_reads_them() -> None:
    store = ResponseStore()
    store.put("me", response("a"), None, [])
    assert store.get("you", "a") is None and not store.delete("you", "a")
    assert store.get("me", "a") is not None
