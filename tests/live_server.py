"""A real server on a free port of 127.0.0.1, with a tiny model whose answers a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
from openai import OpenAI

from chatglm.engine import AS_LOADED, AdapterName, Stream
from chatglm.serving.app import Server, create_app
from chatglm.serving.chat_engine import ChatEngine
from scripted import SECONDS, Hold, Say
from tiny_chat import pair

NAME = "tiny-chatglm"
CONTEXT = 1024


class Finished(dict[str, int]):
    """The statistics' counts of finished requests, with an event for each reason."""

    def __init__(self) -> None:
        super().__init__()
        self.events = {reason: threading.Event() for reason in ("stop", "length", "cancelled", "error")}

    def __setitem__(self, reason: str, count: int) -> None:
        super().__setitem__(reason, count)
        self.events[reason].set()


class Parrot(ChatEngine):
    """An engine that answers "say N please" with what `say` was given; "wait N please" waits for a test's event."""

    def __init__(self, version: int, **sizes: int) -> None:
        self.answers: list[str] = []
        self.holds: list[Hold] = []
        self._breaks: dict[int, Hold] = {}
        model, tokenizer = copy.deepcopy(pair(version))
        model.config.max_position_embeddings = CONTEXT  # room for tools, whose description is long
        super().__init__(model, tokenizer, **sizes)
        self.statistics.finished = finished = Finished()
        self.ended = finished.events

    def say(self, text: str, hold: Hold | None = None) -> str:
        """The question to ask for this answer; `hold` blocks the engine in the middle of it."""
        if hold is not None:
            self._breaks[len(self.answers)] = hold
        self.answers.append(text)
        return f"say {len(self.answers) - 1} please"

    def hold(self, after: int = 0) -> tuple[str, Hold]:
        """The question whose answer waits for a test's event, before its first token or `after` some."""
        self.holds.append(Hold(after))
        return f"wait {len(self.holds) - 1} please", self.holds[-1]

    def submit_all(
        self,
        requests: Sequence[Any],
        top_logprobs: int | None = None,
        adapter: AdapterName = AS_LOADED,
        prompt_logprobs: int | None = None,
        answers: bool = True,
    ) -> list[Stream]:
        for ids, options in requests:
            orders = re.findall(r"(say|wait) ?(\d+) please", self.tokenizer.decode(list(ids)))
            if orders and orders[-1][0] == "say":
                number = int(orders[-1][1])
                options.logits_processor.append(Say(self.tokenizer, self.answers[number]))
                if number in self._breaks:
                    options.logits_processor.append(self._breaks[number])
            elif orders:
                options.logits_processor.append(self.holds[int(orders[-1][1])])
        return super().submit_all(requests, top_logprobs, adapter, prompt_logprobs, answers)


class _Server(Server):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


class Live:
    """A running server, as a test sees it."""

    def __init__(self, server: _Server, engine: Any, key: str | None) -> None:
        self.server, self.engine = server, engine
        self.url = f"http://127.0.0.1:{server.port}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS, headers=headers, trust_env=False)
        self.client = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key or "none",
            max_retries=0,
            timeout=SECONDS,
            http_client=httpx.Client(trust_env=False),
        )

    def chat(self, content: str | list[Any], **options: Any) -> Any:
        """The client's answer to a message, or to a list of them."""
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return self.client.chat.completions.create(model=NAME, messages=messages, **options)  # type: ignore[call-overload]

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=SECONDS)


@contextlib.contextmanager
def serve(engine: Any, load: Callable[[], Any] | None = None, grace: float = 1.0, **options: Any) -> Iterator[Live]:
    """Serves `engine` until the block ends; with `load` it does not wait for the model."""
    app = create_app(load or (lambda: engine), [NAME], **options)
    server = _Server(app, "127.0.0.1", 0, grace)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert server.ready.wait(SECONDS)
    live = Live(server, engine, options.get("api_key"))
    try:
        while load is None and live.http.get("/health").status_code != 200:
            pass  # the model is handed over in a thread
        yield live
    finally:
        live.http.close()
        live.client.close()
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
