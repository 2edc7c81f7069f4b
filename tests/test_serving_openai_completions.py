"""/v1/completions: echoed prompts with their log probabilities, and prompts that are only read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from live_server import NAME, Live, Parrot, serve
from tiny_chat import pair


@pytest.fixture(scope="module", params=[2, 3])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    engine = Parrot(request.param, max_batch=4, max_queue=4)
    with serve(engine) as live:
        yield live
    engine.close()


def complete(live: Live, prompt: Any, **fields: Any) -> Any:
    response = live.http.post("/v1/completions", json={"model": NAME, "prompt": prompt, "temperature": 0} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def logprobs_of(live: Live, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return live.engine.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_an_echoed_prompt_has_its_log_probabilities(live: Live) -> None:
    ids = live.engine.tokenizer("你好, world")["input_ids"]
    for prompt in ("你好, world", ids):
        choice = complete(live, prompt, echo=True, logprobs=2, max_tokens=0)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("你好, world", "length")
        told = choice["logprobs"]
        assert {len(values) for values in told.values()} == {len(ids)}
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        right = logprobs_of(live, ids)
        for index in range(1, len(ids)):
            assert told["token_logprobs"][index] == pytest.approx(float(right[index - 1, ids[index]]), abs=1e-3)
            best = float(right[index - 1].max())
            assert max(told["top_logprobs"][index].values()) == pytest.approx(best, abs=1e-3)
        text, starts = choice["text"], told["text_offset"][2:]
        for token, start, end in zip(told["tokens"][2:], starts, [*starts[1:], len(text)], strict=True):
            if "\ufffd" not in token:
                assert token.removeprefix(" ") == text[start:end].removeprefix(" ")


def test_the_answer_goes_on_behind_the_echo(live: Live) -> None:
    ids = live.engine.tokenizer("hello")["input_ids"]
    both = complete(live, "hello", echo=True, logprobs=1, max_tokens=4)
    alone = complete(live, "hello", logprobs=1, max_tokens=4)
    assert both["usage"]["total_tokens"] == alone["usage"]["total_tokens"]
    choice, plain = both["choices"][0], alone["choices"][0]
    assert choice["text"] == "hello" + plain["text"]
    count = both["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["tokens"]) == len(ids) + count
    assert choice["logprobs"]["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
    assert choice["logprobs"]["text_offset"][len(ids)] == len("hello")


def test_a_stop_token_is_counted_so_that_the_last_one_can_be_cut_off(live: Live) -> None:
    """lm-evaluation-harness asks for one token and cuts it off, whatever it was."""
    question = live.engine.say("")
    ids = live.engine.tokenizer(question)["input_ids"]
    choice = complete(live, question, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == question
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1


def test_a_stream_has_the_same(live: Live) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 3}
    wanted = complete(live, ["a b", "c"], **fields)["choices"]
    stream = live.client.completions.create(
        model=NAME, prompt=["a b", "c"], temperature=0, echo=True, logprobs=1, max_tokens=3, stream=True
    )
    text, tokens = ["", ""], [[], []]  # type: ignore[var-annotated]
    for chunk in stream:
        for choice in chunk.choices:
            text[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert text == [choice["text"] for choice in wanted]
    assert tokens == [choice["logprobs"]["tokens"] for choice in wanted]


def test_prompt_logprobs_as_in_vllm(live: Live) -> None:
    ids = live.engine.tokenizer("你好 world")["input_ids"]
    right = logprobs_of(live, ids)
    found = complete(live, "你好 world", prompt_logprobs=3, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for index, token in enumerate(found[1:], 1):
        own = token[str(ids[index])]
        assert own["logprob"] == pytest.approx(float(right[index - 1, ids[index]]), abs=1e-3)
        assert {one["rank"] for one in token.values()} >= {1, 2, 3} and len(token) in (3, 4)
        assert all(set(one) == {"logprob", "rank", "decoded_token"} for one in token.values())
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = live.http.post("/v1/chat/completions", json=chat).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert [len(token) for token in answer["prompt_logprobs"][1:]] == [1] * (len(answer["prompt_logprobs"]) - 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"max_tokens": 0}, "asks for no answer"),
        ({"prompt_logprobs": 1, "stream": True}, "not available in a stream"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": ["x"] * 9}, "9 answers at once are more than this server takes at most (8)"),
        ({"prompt": ["x"] * 3, "n": 3}, "9 answers at once"),
        ({"logit_bias": {"x": 1}}, "'x' is not the id of a token"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(10**8): 1}}, "the ids are from 0 to"),
    ],
)
def test_what_cannot_be_done_is_said(live: Live, fields: dict[str, Any], reason: str) -> None:
    response = live.http.post("/v1/completions", json={"prompt": "x"} | fields)
    assert response.status_code == 400 and reason in response.json()["error"]["message"], response.text


def test_a_bias_forces_and_forbids_tokens(live: Live) -> None:
    (word,) = live.engine.tokenizer.encode_text("好")[-1:]
    forced = complete(live, "x", logit_bias={str(word): 100}, max_tokens=3, logprobs=0)
    assert forced["choices"][0]["logprobs"]["tokens"] == ["好"] * 3
    plain = complete(live, "x", max_tokens=1, logprobs=1)["choices"][0]["logprobs"]["tokens"]
    ids = live.engine.tokenizer("x")["input_ids"]
    likeliest = int(logprobs_of(live, ids)[-1].argmax())
    other = complete(live, "x", max_tokens=1, logprobs=0, logit_bias={str(likeliest): -100})
    assert other["choices"][0]["logprobs"]["tokens"] != plain


def test_generation_1_says_that_its_prompts_cannot_be_scored() -> None:
    engine = Parrot(1)
    with serve(engine) as live:
        body = {"prompt": "你好", "echo": True, "logprobs": 1, "max_tokens": 1}
        response = live.http.post("/v1/completions", json=body)
        assert response.status_code == 400 and "in both directions" in response.json()["error"]["message"]
        tokenizer = pair(1)[1]
        context, answer = list(tokenizer("你好")["input_ids"]), tokenizer.encode_text("世界")
        choice = complete(live, context + answer, echo=True, logprobs=1, max_tokens=0)["choices"][0]
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[: len(context)] == [None] * len(context)
        assert all(score < 0 for score in scores[len(context) :]) and len(scores) == len(context) + len(answer)
    engine.close()


def test_the_options_of_the_program_hold_here_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    submit = type(live.engine).submit_all
    monkeypatch.setattr(
        type(live.engine), "submit_all",
        lambda self, requests, *more: asked.extend(options for _, options in requests) or submit(self, requests, *more),
    )  # fmt: skip
    plain = complete(live, "你好你好", max_tokens=8)["choices"][0]["text"]
    monkeypatch.setattr(live.engine.model, "default_options", {"prompt_lookup_num_tokens": 5})
    assert complete(live, "你好你好", max_tokens=8)["choices"][0]["text"] == plain
    body = {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200
    assert [options.prompt_lookup_num_tokens for options in asked] == [None, 5, 5]
