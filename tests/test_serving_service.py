"""The published names of a model's generation are other names of the served model; all others are unknown."""

from __future__ import annotations

import pytest

from chatglm.conversation import chat_format
from chatglm.serving.service import is_published_name
from live_server import NAME, Live, Parrot, serve

OWN = {1: "chatglm-6b", 2: "chatglm2-6b", 3: "chatglm3-6b"}


@pytest.mark.parametrize("version", OWN)
def test_published_names(version: int) -> None:
    own, others = OWN[version], [name for number, name in OWN.items() if number != version]
    for name in (own, own.replace("chatglm", "ChatGLM").replace("6b", "6B"), f"THUDM/{own}", f"zai-org/{own}-int4"):
        assert is_published_name(name, chat_format(version)), name
    for name in (*others, f"someone/{own}", f"{own}-mine", "chatglm", "gpt-9", "", f"/{own}", f"a/THUDM/{own}"):
        assert not is_published_name(name, chat_format(version)), name


@pytest.mark.parametrize("version", OWN)
def test_a_server_answers_to_them(version: int) -> None:
    def ask(live: Live, model: str) -> tuple[int, str | None]:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20000}
        answer = live.http.post("/v1/chat/completions", json=body | {"stop": ["e", "a", "i", "o", "。"]})
        return answer.status_code, answer.json().get("model")

    engine = Parrot(version)
    with serve(engine) as live:
        for name, own in OWN.items():
            assert ask(live, own) == ((200, own) if name == version else (404, None))
        assert ask(live, "gpt-9")[0] == 404
        assert live.http.get(f"/v1/models/THUDM/{OWN[version]}").status_code == 200
        assert [model["id"] for model in live.http.get("/v1/models").json()["data"]] == [NAME]
        assert live.http.post("/", json={"prompt": "x", "model": OWN[version], "max_length": 60}).status_code == 200
    engine.close()
