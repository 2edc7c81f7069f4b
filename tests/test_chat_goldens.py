"""chat, stream_chat and stream_generate against the original code's answers, on tiny models of the full vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import chatglm
from chatglm.conversation import parse_response
from chatglm.generation import GenerationOptions, InvalidScoreLogitsProcessor
from conftest import SHARED, needs_shared
from deviations import DEVIATIONS
from goldens import golden_model, read_json, stream_model, weights_recipe
from tokenizer_goldens import golden as tokenizer_golden

pytestmark = needs_shared

FOLDERS = {"v1": "chatglm-6b", "v2": "chatglm2-6b", "v3": "chatglm3-6b"}
MODELS = {
    "v1": chatglm.ChatGLM1ForConditionalGeneration,
    "v2": chatglm.ChatGLM2ForConditionalGeneration,
    "v3": chatglm.ChatGLM3ForConditionalGeneration,
}
CASES = {version: {"chat": range(6), "stream_chat": range(14 if version == "v3" else 9)} for version in MODELS}
CASES["v1"]["stream_chat"] = range(6)

# (version, kind, index) -> the deviation that changes the answer.
DIFFERENT = {
    ("v1", "chat", 4): "a_prompt_without_room_is_an_error",
    ("v2", "chat", 4): "a_prompt_without_room_is_an_error",
    ("v2", "stream_chat", 2): "a_prompt_without_room_is_an_error",
    ("v3", "chat", 5): "a_prompt_without_room_is_an_error",
    ("v2", "stream_chat", 7): "a_cached_turn_equals_an_uncached_one",
    ("v2", "stream_chat", 8): "a_cached_turn_equals_an_uncached_one",
    ("v3", "stream_chat", 13): "a_cached_turn_equals_an_uncached_one",
    ("v1", "stream_chat", 0): "the_last_token_is_kept",
    ("v1", "stream_chat", 1): "the_last_token_is_kept",
    ("v1", "stream_chat", 2): "the_last_token_is_kept",
    ("v3", "chat", 0): "the_last_token_is_kept",
    ("v3", "chat", 3): "the_last_token_is_kept",
    ("v3", "stream_chat", 0): "the_last_token_is_kept",
    ("v3", "stream_chat", 1): "the_last_token_is_kept",
    ("v3", "stream_chat", 2): "the_last_token_is_kept",
    ("v3", "stream_chat", 8): "the_last_token_is_kept",
    ("v3", "stream_chat", 9): "a_message_boundary_is_a_line_break",
    ("v3", "stream_chat", 10): "a_streamed_call_is_text_until_it_is_whole",
    ("v3", "stream_chat", 11): "a_streamed_call_is_text_until_it_is_whole",
}


class Force(LogitsProcessor):
    """As when the goldens were made: token force[t] at step t, then the model's own scores."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.step < len(self.ids):
            scores = torch.full_like(scores, -100.0)
            scores[:, self.ids[self.step]] = 100.0
        self.step += 1
        return scores


@cache
def load(version: str) -> tuple[Any, Any]:
    model = stream_model(int(version[1]), model_class=MODELS[version])
    return model, chatglm.ChatGLMTokenizer.from_pretrained(SHARED / "checkpoints" / FOLDERS[version])


def arguments(case: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The golden arguments, and `answer_room=1`: keeps as much of a history that is too long as the originals do."""
    assert DEVIATIONS["old_turns_make_room_for_the_answer"]
    given = {"do_sample": False, "answer_room": 1} | case["kwargs"] | changes
    if case.get("force"):
        given["logits_processor"] = [Force(case["force"])]
    return given


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


@contextmanager
def fed_to(model: Any) -> Iterator[list[list[list[int]]]]:
    """The ids of every forward, without those that an earlier turn left in the cache."""
    fed: list[list[list[int]]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        fed.append((args[0] if args else kwargs["input_ids"]).tolist())

    model.clear_chat_cache()
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


def check_fed(fed: list[list[list[int]]], case: dict[str, Any]) -> None:
    """The prompt, and all that stood before the last token."""
    assert fed[0] == case["prompt_ids"]
    if len(fed[0]) == 1:  # what beams keep is compared through their answer
        ours, (theirs,) = [token for ids in fed for token in ids[0]], case["last_input_ids"]
        assert ours[: len(theirs)] == theirs
        assert len(ours) == len(theirs) or case.get("error") is not None  # it crashed before the end


def check_left_alone(history: Any, case: dict[str, Any]) -> None:
    """Generation 3's own chat appends the question to the list that it is given."""
    assert history == case["history"], "the caller's history was changed"
    if case.get("caller_history_after") is not None:
        assert DEVIATIONS["arguments_are_left_alone"]
        question = {"role": "user", "content": case["query"]}
        assert case["caller_history_after"] == [*case["history"], question]


def shown(yields: list[Any]) -> list[tuple[Any, Any]]:
    """The golden (text, history) pairs that ours gives too: those that are new, no blanks, no half characters."""
    assert {"half_characters_are_held_back", "blank_yields_are_left_out"} <= set(DEVIATIONS)
    distinct: list[tuple[Any, Any]] = []
    for response, history, *_ in yields:
        half = isinstance(response, str) and response.endswith("\ufffd")
        if response != "" and not half and distinct[-1:] != [(response, history)]:
            distinct.append((response, history))
    return distinct


def parameters(kind: str) -> list[Any]:
    return [(version, index) for version in MODELS for index in CASES[version][kind]]


@pytest.mark.parametrize("version", MODELS)
def test_no_case_is_forgotten(version: str) -> None:
    golden = read_json(f"stream/{version}.json")
    assert {kind: range(len(golden[kind])) for kind in ("chat", "stream_chat")} == CASES[version]


@pytest.mark.parametrize("version", MODELS)
def test_the_weights_are_those_of_the_originals(version: str) -> None:
    golden = read_json(f"stream/{version}.json")
    state = weights_recipe().stream_state_dict(golden)
    assert {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in state.items()} == {
        name: value for name, value in golden["weights_sha256"].items() if not name.endswith("inv_freq")
    }


@pytest.mark.parametrize(("version", "index"), parameters("chat"))
def test_chat(version: str, index: int) -> None:
    model, tokenizer = load(version)
    case = read_json(f"stream/{version}.json")["chat"][index]
    golden, deviation = case["result"]["ok"], DIFFERENT.get((version, "chat", index))
    assert deviation is None or deviation in DEVIATIONS
    history = plain(case["history"])
    if deviation == "a_prompt_without_room_is_an_error":
        assert case["kwargs"]["max_length"] <= len(case["prompt_ids"][0])
        with pytest.raises(ValueError, match=r"needs \d+ tokens, but only \d+"):
            model.chat(tokenizer, case["query"], history=history, **arguments(case))
        return
    with fed_to(model) as fed:
        answer = model.chat(tokenizer, case["query"], history=history, **arguments(case))
    check_fed(fed, case)
    check_left_alone(history, case)
    if deviation == "the_last_token_is_kept":  # with room for one token fewer, it is the original's answer
        kept, shorter = answer[0], arguments(case, max_length=case["kwargs"]["max_length"] - 1)
        answer = model.chat(tokenizer, case["query"], history=history, **shorter)
        assert kept.startswith(answer[0]) and len(kept) > len(answer[0])
    assert plain(answer) == [golden["response"], golden["new_history"]]


@pytest.mark.parametrize(("version", "index"), parameters("stream_chat"))
def test_stream_chat(version: str, index: int) -> None:
    model, tokenizer = load(version)
    case = read_json(f"stream/{version}.json")["stream_chat"][index]
    deviation = DIFFERENT.get((version, "stream_chat", index))
    assert deviation is None or deviation in DEVIATIONS
    history = plain(case["history"])
    assert (case["error"] is None) == ((version, index) != ("v3", 10))
    if deviation == "a_prompt_without_room_is_an_error":
        assert case["kwargs"]["max_length"] <= len(case["prompt_ids"][0])
        with pytest.raises(ValueError, match=r"needs \d+ tokens, but only \d+"):
            list(model.stream_chat(tokenizer, case["query"], history=history, **arguments(case)))
        return
    ours, lengths = [], []
    with fed_to(model) as fed:
        for response, new_history, *past in model.stream_chat(
            tokenizer, case["query"], history=history, **arguments(case)
        ):
            ours.append((response, plain(new_history)))
            lengths += [cache.get_seq_length() for cache in past]
    check_left_alone(history, case)
    kwargs = {name: value for name, value in case["kwargs"].items() if name != "return_past_key_values"}
    uncached = {**case, "kwargs": kwargs}
    whole = tuple(plain(model.chat(tokenizer, case["query"], history=history, **arguments(uncached))))
    assert ours[-1] == whole
    golden = shown(case["yields"])
    if deviation == "a_cached_turn_equals_an_uncached_one":
        again = model.stream_chat(tokenizer, case["query"], history=history, **arguments(uncached))
        assert ours == [(response, plain(new_history)) for response, new_history in again]
        return
    check_fed(fed, case)
    if deviation is None:
        # A stop token ends what was shown already: it comes again, as the last item. An empty answer has only that.
        stopped = len(case["prompt_ids"][0]) + len(fed) < case["kwargs"]["max_length"]
        assert ours == [*golden, *([whole] if stopped else [])]
        assert not golden or golden[-1] == whole
        assert lengths == [past_length for _, _, *rest in case["yields"] for past_length in rest]
    elif deviation == "the_last_token_is_kept":
        assert ours[:-1] == golden and whole[0].startswith(golden[-1][0] if golden else "")
    elif deviation == "a_message_boundary_is_a_line_break":
        assert ours[:2] == golden[:2] and ours[-1] == golden[-1]
        assert [response for response, _ in ours[2:-1]] == ["first part\n \nsecond"]
    else:
        words = [item for item in golden if isinstance(item[0], str)]
        assert words and ours[: len(words)] == words
        assert all(isinstance(response, str) for response, _ in ours[:-1])
        call = {"name": "get_weather", "parameters": {"city": "北京"}}  # the original crashed in the middle of it
        assert whole == golden[-1] if case["error"] is None else whole[0] == call


@pytest.mark.parametrize(("version", "index"), [key[::2] for key, why in DIFFERENT.items() if "cached_turn" in why])
def test_a_cached_turn_fed_as_the_originals_feed_it(version: str, index: int) -> None:
    """Their answer to all that went through the network in earlier turns, and the new round as they tokenize it."""
    model, tokenizer = load(version)
    cases = read_json(f"stream/{version}.json")["stream_chat"]
    first = {"v2": 6, "v3": 12}[version]
    before = [token for case in cases[first:index] for token in case["last_input_ids"][0]]
    case, (prompt,) = cases[index], cases[index]["prompt_ids"]
    limit = case["kwargs"]["max_length"] - len(prompt)
    whole = torch.tensor([before + prompt])
    steps = [step[0].tolist() for step in model.stream_generate(whole, do_sample=False, max_new_tokens=limit)]
    assert steps[-1][len(before) : -1] == case["last_input_ids"][0]
    if version == "v3":
        assert DEVIATIONS["the_last_token_is_kept"]
        steps = steps[:-1]
    texts = [parse_response(int(version[1]), tokenizer.decode(ids[whole.shape[1] :])).content for ids in steps]
    yielded = [text for text in texts if text and not text.endswith("\ufffd")]
    assert yielded == [text for text, _ in shown(case["yields"])]


@pytest.mark.parametrize("version", MODELS)
def test_stream_generate(version: str) -> None:
    model, _ = load(version)
    golden = read_json(f"stream/{version}.json")["stream_generate_ids"]
    prompt = torch.tensor([golden[0][:-1]])
    ours = [item[0].tolist() for item in model.stream_generate(prompt, do_sample=False, max_length=len(golden[-1]))]
    assert ours == golden
    # v1: the step that reaches max_length was never yielded.
    assert "the_last_token_is_kept" in DEVIATIONS


# ---- limits and stop tokens of stream_generate -----------------------------------------------------------------------

LIMITS: dict[str, Any] = {
    "max_length=n+6": lambda n, eos: {"max_length": n + 6},
    "max_length=n+1": lambda n, eos: {"max_length": n + 1},
    "max_length=n": lambda n, eos: {"max_length": n},
    "max_length=n-3": lambda n, eos: {"max_length": n - 3},
    "max_new_tokens=4": lambda n, eos: {"max_new_tokens": 4},
    "max_new_tokens=4,max_length=n+9": lambda n, eos: {"max_new_tokens": 4, "max_length": n + 9},
    "default_max_length": lambda n, eos: {},
    "eos_first": lambda n, eos: {"max_length": n + 8, "eos_token_id": eos["first"]},
    "eos_third": lambda n, eos: {"max_length": n + 8, "eos_token_id": eos["third"]},
    "eos_list_2_ids_third": lambda n, eos: {"max_length": n + 8, "eos_token_id": [eos["third"], 1]},
}


@cache
def small_model(version: str) -> Any:
    return golden_model(int(version[1]), model_class=MODELS[version])


def limits_of(version: str) -> dict[str, Any]:
    return read_json(f"{version}/generate.json")["stream_generate"]


def described(yields: list[list[list[int]]]) -> dict[str, Any]:
    """In the form of the goldens."""
    lengths = [len(item[0]) for item in yields]
    return {"n_yields": len(yields), "lengths": lengths, "last": yields[-1] if yields else None}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("version", MODELS)
def test_limits_of_stream_generate(version: str, name: str) -> None:
    golden, model = limits_of(version), small_model(version)
    prompt = torch.tensor([golden["prompt"]])
    given = LIMITS[name](prompt.shape[1], golden["eos_values"])
    ours = [item.tolist() for item in model.stream_generate(prompt, do_sample=False, **given)]
    if name == "default_max_length":
        assert DEVIATIONS["without_a_limit_the_context_is_the_limit"]
        assert len(ours[-1][0]) == model.config.max_position_embeddings
        ours = [item for item in ours if len(item[0]) <= 20]
    if name == "eos_list_2_ids_third" and version != "v3":
        assert DEVIATIONS["every_stop_token_of_a_list_stops"] and golden[name]["ok"]["n_yields"] > 3
        name = "eos_third"
    if version == "v1":  # in the original's stream, neither a stop token nor the token at the limit is there
        assert DEVIATIONS["the_last_token_is_kept"]
        ours = ours[:-1]
    assert described(ours) == golden[name]["ok"]


def test_no_limit_is_forgotten() -> None:
    others = {"prompt", "greedy12", "eos_values", "batch2_input", "return_past"}  # in the tests below and of generate()
    for version in MODELS:
        names = {name for name in limits_of(version) if not name.startswith(("generate:", "batch2_eos"))}
        assert names - others == set(LIMITS)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_batch_whose_first_row_stops(version: str) -> None:
    golden, model = limits_of(version), small_model(version)
    given, expected = golden["batch2_input"], golden["batch2_eos_row0_third(finished row keeps generating)"]["ok"]
    ids = torch.tensor(given["input_ids"])
    mask = (ids != 0).long()
    limit = len(expected["last"][0])
    *_, last = ours = list(
        model.stream_generate(ids, do_sample=False, attention_mask=mask, max_length=limit, eos_token_id=given["eos"])
    )
    assert DEVIATIONS["a_finished_row_is_padded"]
    assert [item.shape[1] for item in ours] == expected["lengths"] and len(ours) == expected["n_yields"]
    stopped, other = expected["last"]
    end = stopped.index(given["eos"]) + 1
    assert last.tolist() == [stopped[:end] + [model.config.pad_token_id] * (limit - end), other]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_cache_of_stream_generate(version: str) -> None:
    """It holds all but the last token; the originals' is (tokens, batch, groups, head_dim)."""
    golden, model = limits_of(version)["return_past"], small_model(version)
    prompt = torch.tensor([limits_of(version)["prompt"]])
    *_, (ids, past) = model.stream_generate(prompt, do_sample=False, max_new_tokens=4, return_past_key_values=True)
    tokens, batch, groups, size = golden["past_key_shape"]
    assert ids.tolist() == golden["ids"] and len(past.layers) == golden["past_layers"]
    assert all(layer.keys.shape == (batch, groups, tokens, size) for layer in past.layers)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_stream_generate_without_a_stop_token(version: str) -> None:
    assert read_json(f"{version}/edge.json")["eos_none_stream_generate"]["error"] in ("TypeError", "AttributeError")
    assert DEVIATIONS["every_stop_token_of_a_list_stops"]
    golden, model = limits_of(version), small_model(version)
    prompt = torch.tensor([golden["prompt"]])
    *_, last = model.stream_generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert last[0].tolist() == golden["greedy12"]


# ---- the arguments of chat -------------------------------------------------------------------------------------------


def captured(version: str) -> list[dict[str, Any]]:
    """What the original's chat passes to generate() by default."""
    cases = tokenizer_golden("chat")[version]["chat"]
    if version == "v3":
        return [case["result"]["ok"]["generate_kwargs"] for case in cases if "ok" in case["result"]]
    cases = cases + tokenizer_golden("chat")["v1_0"]["chat"] if version == "v1" else cases
    return [case["captured"] for case in cases]


@pytest.mark.parametrize("method", ["chat", "stream_chat"])
@pytest.mark.parametrize("version", MODELS)
def test_the_defaults_of_chat(version: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(version)
    seen: list[GenerationOptions] = []

    def look(model: Any, ids: Any, options: GenerationOptions, *rest: Any) -> Any:
        seen.append(options)
        raise InterruptedError

    monkeypatch.setattr("chatglm.chat_methods.generate_text", look)
    with pytest.raises(InterruptedError):
        list(getattr(model, method)(tokenizer, "x"))
    assert DEVIATIONS["numbers_that_are_not_finite_are_an_error"]
    for golden in captured(version):
        assert (golden["num_beams"], golden["logits_processor"]) == (1, ["InvalidScoreLogitsProcessor"])
        for name in ("max_length", "do_sample", "top_p", "temperature"):
            assert getattr(seen[0], name) == golden[name]
        assert seen[0].logits_processor == [] and seen[0].top_k == 50  # of transformers 4.30's own


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_arguments_of_chat_reach_generate(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(version)
    golden = dict(tokenizer_golden("chat")[version]["chat_kwargs_forwarded"])
    assert version != "v1" or golden == tokenizer_golden("chat")["v1_0"]["chat_kwargs_forwarded"]
    processor, seen = InvalidScoreLogitsProcessor(), {}
    assert golden.pop("logits_processor") == [type(processor).__name__]

    def look(inputs: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(model, "generate", look)
    processors = [processor]
    with pytest.raises(InterruptedError):
        model.chat(tokenizer, "x", logits_processor=processors, **golden)
    assert DEVIATIONS["greedy_ignores_warpers"]
    assert {name: seen.get(name) for name in golden} == golden | {"top_p": None, "temperature": None}
    assert seen["logits_processor"] == processors == [processor]
