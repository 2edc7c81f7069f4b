"""API keys with names, a fair share for each client, and times to come back that are true."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import api
from chatglm.serving import clients
from chatglm.serving.app import create_app
from chatglm.serving.clients import Clients, address_of, read_keys
from chatglm.serving.errors import ApiError
from live_server import NAME, Live, Parrot, serve
from scripted import SECONDS

# ---------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("key", ["", " ", "a\tb", "key\n"])
def test_a_key_that_protects_nothing_is_refused(key: str) -> None:
    for options in ({"api_key": key}, {"api_keys": {"anna": key}}):
        with pytest.raises(ValueError, match="API key"):
            create_app(lambda: None, ["x"], **options)  # type: ignore[arg-type, return-value]


def test_an_empty_key_ends_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert api.main(["--api-key", ""]) == 1
    assert "the API key is empty" in capsys.readouterr().err
    monkeypatch.setenv("CHATGLM_API_KEY", "")
    assert api.main([]) == 1
    assert "the API key is empty" in capsys.readouterr().err


def test_a_file_of_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nanna  key-of-anna#1\n\nböse key\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 4: give a name"):
        read_keys(file)
    file.write_text("# ours\nanna  key-of-anna#1\nbert\tkey-of-bert=\n")
    assert read_keys(file) == {"anna": "key-of-anna#1", "bert": "key-of-bert="}
    for text, reason in (
        ("anna", "line 1"),
        ("a x\na y", "line 2: the name a stands there twice"),
        ("#", "no API key"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_keys(file)
    file.write_text("a same\nb same")
    assert api.main(["--api-key-file", str(file)]) == 1
    assert "two API keys are equal" in capsys.readouterr().err
    assert api.main(["--api-key-file", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err


def test_clients_are_called_by_their_key_or_address(caplog: pytest.LogCaptureFixture) -> None:
    keys = Clients({"anna": "1", "": "2"})
    assert keys.name_of(b"Bearer 1", "10.0.0.1") == "anna" and keys.name_of(b"bearer  2", "10.0.0.1") == "10.0.0.1"
    for wrong in (b"Bearer 3", b"Basic 1", b"", b"1", b"Bearer"):
        with pytest.raises(ApiError, match="give the API key"):
            keys.name_of(wrong, "10.0.0.1")
    assert Clients(None).name_of(b"", "10.0.0.1") == "10.0.0.1"
    assert address_of(("2001:db8:1:2:3:4:5:6", 1)) == address_of(("2001:db8:1:2::9", 2)) == "2001:db8:1:2::/64"
    assert (address_of(("::1", 1)), address_of(("1.2.3.4", 1)), address_of(None)) == ("::1", "1.2.3.4", "local")
    caplog.set_level(logging.INFO, logger="chatglm.serving")
    with serve(Parrot(3), api_keys={"anna": "first", "bert": "second"}) as live:
        for key, status in (("first", 200), ("second", 200), ("third", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert live.http.get("/v1/models", headers=headers).status_code == status
    entries = [json.loads(record.getMessage()) for record in caplog.records if record.name == "chatglm.serving"]
    assert [one["client"] for one in entries if one["path"] == "/v1/models"] == ["anna", "bert", "127.0.0.1"]


# ---------------------------------------------------------------------------------------------------- shares


def test_five_requests_with_sixteen_choices_leave_room_for_others() -> None:
    keys = {"greedy": "g", "modest": "m"}
    with serve(Parrot(3, max_batch=16, max_queue=64), api_keys=keys) as live:
        question, hold = live.engine.hold()
        greedy, modest = (live.client.with_options(api_key=key) for key in ("g", "m"))

        def ask(client: openai.OpenAI, n: int, text: str) -> Any:
            messages: Any = [{"role": "user", "content": text}]
            return client.chat.completions.create(model=NAME, messages=messages, n=n, max_tokens=30, temperature=0)

        threads = [threading.Thread(target=ask, args=(greedy, 16, question)) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert hold.begun.wait(SECONDS)
        while live.engine.waiting + live.engine.running < 80:
            assert live.http.get("/health").status_code == 200
        with pytest.raises(openai.RateLimitError):
            ask(greedy, 1, "x")
        second_question, second_hold = live.engine.hold()
        threads.append(threading.Thread(target=ask, args=(modest, 1, second_question)))
        threads[-1].start()
        while live.engine.waiting + live.engine.running < 81:
            assert live.http.get("/health").status_code == 200
        hold.go_on.set()
        assert second_hold.begun.wait(SECONDS)  # its first token is chosen: the others' answers stand still
        assert live.engine.statistics.finished.get("length", 0) + live.engine.statistics.finished.get("stop", 0) < 70
        second_hold.go_on.set()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


def test_bodies_in_memory_are_counted_for_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MOST_BYTES", 100_000)
    keys = {"greedy": "g", "modest": "m"}
    with serve(Parrot(3, max_batch=1), api_keys=keys) as live:
        question, hold = live.engine.hold()
        body = {"prompt": question, "other": "x" * 60_000, "max_length": 200}
        results: list[httpx.Response] = []

        def ask(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            results.append(httpx.post(live.url, json=body, headers=headers, timeout=SECONDS, trust_env=False))
            return results[-1]

        threads = [threading.Thread(target=ask, args=("g",))]
        threads[0].start()
        assert hold.begun.wait(SECONDS)
        refused = ask("g")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_much_at_once"
        assert int(refused.headers["retry-after"]) >= 1
        threads.append(threading.Thread(target=ask, args=("m",)))
        threads[1].start()
        while live.engine.waiting < 1:
            assert live.http.get("/health").status_code == 200
        hold.go_on.set()
        for thread in threads:
            thread.join(SECONDS)
        assert [one.status_code for one in results] == [429, 200, 200]
        assert ask("g").status_code == 200  # the account is empty again


def test_grammars_count_as_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(clients, "MOST_BYTES", 100_000)
    with serve(Parrot(3)) as live:
        for length, status in ((10, 200), (2000, 429), (10, 200)):
            schema = {"description": "x" * length, "type": "null"}
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
            wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            answer = live.http.post("/v1/chat/completions", json=body | {"response_format": wanted})
            assert answer.status_code == status, answer.text


# ---------------------------------------------------------------------------------------------------- a crowd


CROWD = 300


def crowd_times(live: Live) -> list[float]:
    """Seconds that each of many clients waits for its answer, with the retries of the openai package.

    Raises CalledProcessError if a client is refused to the end.
    """
    script = Path(__file__).with_name("crowd.py")
    command = [sys.executable, str(script), f"{live.url}/v1", NAME, str(CROWD)]
    times: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return times


def test_a_crowd_with_the_default_retries_is_answered() -> None:
    engine = Parrot(3, max_batch=16, max_queue=64)
    with serve(engine) as live:
        assert len(crowd_times(live)) == CROWD
    assert engine.statistics.refused > 100


@pytest.mark.slow  # a time: test_engine_pace.py has the same without a clock
def test_a_crowd_with_the_default_retries_is_answered_in_twice_the_time_that_the_work_takes() -> None:
    with serve(Parrot(3, max_batch=16, max_queue=CROWD)) as live:
        work = max(crowd_times(live))
    engine = Parrot(3, max_batch=16, max_queue=64)
    with serve(engine) as live:
        slowest = max(crowd_times(live))
    assert engine.statistics.refused > 100
    assert slowest < 2 * work
