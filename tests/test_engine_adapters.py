"""The engine and the server with several adapters on one model: every request gets the answer it would get alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import openai
import pytest
import torch

from chatglm.adapters import add_lora, add_prefix, use_adapter
from chatglm.serving.chat_engine import ChatEngine
from live_server import NAME, serve
from scripted import SECONDS
from tiny_chat import pair

peft = pytest.importorskip("peft", reason="LoRA needs PEFT")
VERSIONS = (1, 2, 3)
ADAPTERS = (None, "prefix", "other", "lora")


@cache
def adapted(version: int) -> tuple[Any, Any]:
    """(model, tokenizer) with two prefixes and a LoRA, all of which change the answers; the LoRA is in use."""
    model, tokenizer = copy.deepcopy(pair(version))
    torch.manual_seed(5)
    add_prefix(model, 4, name="prefix")
    add_prefix(model, 7, name="other")
    add_lora(model, peft.LoraConfig(r=2, target_modules=["query_key_value", "dense"]), name="lora")
    with torch.no_grad():
        for name in ("prefix", "other"):
            use_adapter(model, name)
            model.transformer.prefix_encoder.embedding.weight.normal_(std=5.0)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    use_adapter(model, "lora")
    return model.eval(), tokenizer


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def alone(model: Any, tokenizer: Any, question: str, adapter: str | None, history: Any = None) -> Any:
    with model.adapter(adapter):
        model.clear_chat_cache()
        return said(model.stream_steps(tokenizer, question, history, **GREEDY))


def said(steps: Iterable[Any]) -> Any:
    """Tokens, text and history of an answer."""
    steps = list(steps)
    return [step.token_id for step in steps], steps[-1].text, steps[-1].history


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sizes", [{"max_batch": 8}, {"max_batch": 3, "cache_tokens": 400}], ids=["wide", "tight"])
def test_answers_in_company_are_those_given_alone(version: int, sizes: dict[str, int]) -> None:
    model, tokenizer = adapted(version)
    asked = [("你好" * (1 + number // 4), ADAPTERS[number % 4]) for number in range(12)]
    wanted = [alone(model, tokenizer, *one) for one in asked]
    assert len({str(tokens) for tokens, _, _ in wanted[:4]}) == 4
    with ChatEngine(model, tokenizer, **sizes) as engine:

        def ask(asked: list[Any], histories: list[Any]) -> list[Any]:
            answers = [
                engine.chat(question, history, adapter=adapter, **GREEDY)
                for (question, adapter), history in zip(asked, histories, strict=True)
            ]
            return [said(answer) for answer in answers]

        first = ask(asked, [None] * len(asked))
        assert first == wanted
        # What was computed with one adapter is of no use to another one.
        turned = [(question, ADAPTERS[(number + 1) % 4]) for number, (question, _) in enumerate(asked)]
        histories = [history for _, _, history in first]
        second = ask(turned, histories)
    wanted = [alone(model, tokenizer, *one, history) for one, history in zip(turned, histories, strict=True)]
    assert second == wanted
    assert model.current_adapter == "lora"


def test_a_later_turn_reuses_only_what_its_own_adapter_computed() -> None:
    model, tokenizer = adapted(3)
    settings = {"do_sample": False, "max_new_tokens": 5}
    with ChatEngine(model, tokenizer) as engine:
        first = list(engine.chat("你好", adapter="prefix", **settings))[-1]
        assert list(engine.chat("你好", adapter=None, **settings))[-1].cached_tokens == 0
        assert list(engine.chat("你好", **settings))[-1].cached_tokens == 0  # the LoRA, which was in use
        again = list(engine.chat("what?", first.history, adapter="prefix", **settings))[-1]
        assert again.cached_tokens >= first.prompt_tokens
        with pytest.raises(ValueError, match=r"no adapter 'nobody', only prefix, other, lora"):
            engine.chat("x", adapter="nobody")
        current = engine.call(lambda: model.current_adapter, adapter="other")
        assert current.result(SECONDS) == "other"


def test_the_model_of_a_request_chooses_the_adapter() -> None:
    model, tokenizer = adapted(2)
    wanted = {name: alone(model, tokenizer, "你好", name)[1] for name in ADAPTERS}
    engine = ChatEngine(model, tokenizer)
    with serve(engine, adapters=["lora", "prefix", "other"]) as live:
        listed = [one.id for one in live.client.models.list()]
        assert listed == ["lora", "prefix", "other", NAME]
        assert live.client.models.retrieve("prefix").id == "prefix"
        for name in listed:
            adapter = None if name == NAME else name
            messages: list[Any] = [{"role": "user", "content": "你好"}]
            answer = live.client.chat.completions.create(
                model=name, messages=messages, temperature=0, max_completion_tokens=12
            )
            assert (answer.model, answer.choices[0].message.content) == (name, wanted[adapter])
            body = {"prompt": "你好", "temperature": 0, "model": name, "max_length": answer.usage.total_tokens}
            assert live.http.post("/", json=body).json()["response"] == wanted[adapter]
        # Without a name the first adapter answers, as in the other programs.
        body = {"messages": messages, "temperature": 0, "max_tokens": 12}
        answer = live.http.post("/v1/chat/completions", json=body).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("lora", wanted["lora"])
        length = answer["usage"]["total_tokens"]
        body = {"prompt": "你好", "temperature": 0, "max_length": length}
        assert live.http.post("/", json=body).json()["response"] == wanted["lora"]
        completions = [
            live.client.completions.create(model=name, prompt="你好", temperature=0, max_tokens=8).choices[0].text
            for name in listed
        ]
        embeddings = [live.client.embeddings.create(model=name, input="你好").data[0].embedding for name in listed]
        assert len(set(completions)) == 4 and len(set(map(tuple, embeddings))) == 4
        for path, body in (
            ("/", {"prompt": "x"}),
            ("/stream", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/embeddings", {"input": "x"}),
        ):
            response = live.http.post(path, json=body | {"model": "nobody"})
            assert response.status_code == 404
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError, match="only lora, prefix, other, tiny-chatglm"):
            live.client.models.retrieve("nobody")
