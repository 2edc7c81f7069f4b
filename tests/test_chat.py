"""chat, stream_chat, stream_generate and stream_steps: equalities, limits, reuse of the cache, bad input."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

import chatglm
from chatglm import generation
from chatglm.generation import ChatCache, GenerationOptions
from deviations import DEVIATIONS
from tiny_chat import TOOLS_SYSTEM, pair

VERSIONS = (1, 2, 3)


def turns(version: int, count: int, size: int = 3) -> list[Any]:
    """A history of `count` turns."""
    if version == 3:
        roles = [
            ({"role": "user", "content": f"q{i} " * size}, {"role": "assistant", "content": f"a{i} " * size})
            for i in range(count)
        ]
        return [message for pair_of_messages in roles for message in pair_of_messages]
    return [(f"q{i} " * size, f"a{i} " * size) for i in range(count)]


class Force(LogitsProcessor):
    def __init__(self, ids: list[int]) -> None:
        self.ids, self.step = list(ids), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.step < len(self.ids):
            scores = torch.full_like(scores, -100.0)
            scores[:, self.ids[self.step]] = 100.0
        self.step += 1
        return scores


def say(tokenizer: Any, text: str, end: bool = True) -> list[LogitsProcessor]:
    """A processor that makes the model answer `text`."""
    from chatglm.conversation import stop_token_ids

    return [Force(tokenizer.encode_text(text) + (stop_token_ids(tokenizer)[:1] if end else []))]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"seed": 3}, {"seed": 4, "repetition_penalty": 1.3, "top_k": 20}]
)
def test_the_last_of_stream_chat_is_chat(version: int, options: dict[str, Any]) -> None:
    model, tokenizer = pair(version)
    history = turns(version, 2)
    answer, new_history = model.chat(tokenizer, "你好", history=history, max_new_tokens=30, **options)
    streamed = list(model.stream_chat(tokenizer, "你好", history=history, max_new_tokens=30, **options))
    assert streamed[-1] == (answer, new_history)
    assert history == turns(version, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_deltas_make_up_the_text(version: int) -> None:
    model, tokenizer = pair(version)
    for seed in range(12):  # random weights say random bytes, blanks and punctuation
        steps = list(
            model.stream_steps(tokenizer, "x", seed=seed, temperature=3.0, top_k=0, top_p=1.0, max_new_tokens=40)
        )
        assert "".join(step.delta for step in steps) == steps[-1].text
        assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("text", ["你好 , 世界!", "a\n\nb", "😀 好", "it 's , ok ?", "[[训练时间]],对", "1+1=2;"])
def test_a_streamed_text_never_takes_back_what_was_printed(version: int, text: str) -> None:
    model, tokenizer = pair(version)
    printed = ""
    for step in model.stream_steps(tokenizer, "x", do_sample=False, logits_processor=say(tokenizer, text)):
        printed += step.delta
        assert step.text.startswith(printed)
    assert printed == step.text != ""
    assert step.finish_reason == "stop"


@pytest.mark.parametrize("version", (2, 3))
def test_a_second_turn_reuses_the_cache_and_says_the_same(version: int) -> None:
    model, tokenizer = pair(version)
    model.clear_chat_cache()
    first = list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=10))[-1]
    assert first.cached_tokens == 0
    second = list(model.stream_steps(tokenizer, "what?", first.history, do_sample=False, max_new_tokens=10))[-1]
    assert second.cached_tokens >= first.prompt_tokens - 1
    model.clear_chat_cache()
    again = list(model.stream_steps(tokenizer, "what?", first.history, do_sample=False, max_new_tokens=10))[-1]
    assert again.cached_tokens == 0
    assert (again.text, again.history) == (second.text, second.history)


def test_generation_1_reuses_only_a_prompt_that_is_the_same() -> None:
    model, tokenizer = pair(1)
    model.clear_chat_cache()
    first = list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=5))[-1]
    same = list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=5))[-1]
    assert (first.cached_tokens, same.cached_tokens) == (0, first.prompt_tokens - 1)
    assert same.text == first.text
    other = list(model.stream_steps(tokenizer, "what?", first.history, do_sample=False, max_new_tokens=5))[-1]
    assert other.cached_tokens == 0  # every token of the context sees the new question


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cache_of_other_weights_is_not_reused(version: int) -> None:
    model, tokenizer = copy.deepcopy(pair(version))
    list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=3))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    step = list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=3))[-1]
    assert step.cached_tokens == 0
    model.double()
    step = list(model.stream_steps(tokenizer, "你好", do_sample=False, max_new_tokens=3))[-1]
    assert step.cached_tokens == 0


@pytest.mark.parametrize("version", (2, 3))
def test_an_interrupted_forward_does_not_spoil_the_cache(version: int) -> None:
    model, tokenizer = copy.deepcopy(pair(version))
    expected = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=8)
    model.clear_chat_cache()
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = model.transformer.encoder.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=8)
    hook.remove()
    assert model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=8) == expected


@pytest.mark.parametrize("version", (2, 3))
def test_past_key_values_go_from_turn_to_turn(version: int) -> None:
    model, tokenizer = pair(version)
    *_, (_, history, past) = model.stream_chat(
        tokenizer, "你好", do_sample=False, max_new_tokens=6, return_past_key_values=True
    )
    assert isinstance(past, ChatCache) and past.get_seq_length() == len(past.token_ids) > 6
    *_, (second, _, past) = model.stream_chat(
        tokenizer, "and?", history, past_key_values=past, do_sample=False, max_new_tokens=6, return_past_key_values=True
    )
    *_, (expected, _) = model.stream_chat(
        tokenizer, "and?", history, do_sample=False, max_new_tokens=6, use_cache=False
    )
    assert second == expected
    with pytest.raises(TypeError, match="ChatCache"):
        list(model.stream_chat(tokenizer, "and?", history, past_key_values=((),), max_new_tokens=6))


@pytest.mark.parametrize("version", VERSIONS)
def test_seed_and_temperature(version: int) -> None:
    model, tokenizer = pair(version)

    def answer(**options: Any) -> str:
        return model.chat(tokenizer, "你好", max_new_tokens=12, **options)[0]

    assert answer(seed=1) == answer(seed=1)
    assert len({answer(seed=seed, temperature=5.0, top_k=0, top_p=1.0) for seed in range(4)}) > 1
    assert DEVIATIONS["temperature_zero_is_greedy"]
    assert answer(temperature=0) == answer(do_sample=False) == answer(top_p=0)
    state = torch.random.get_rng_state()
    answer(seed=2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_may_say_how_it_is_sampled(version: int) -> None:
    model, tokenizer = copy.deepcopy(pair(version))
    model.generation_config = GenerationConfig()  # as for the published checkpoints: the family's defaults
    options = model.turn_options(tokenizer)
    assert (options.do_sample, options.top_p, options.temperature, options.top_k) == (
        (True, 0.7, 0.95, 50) if version == 1 else (True, 0.8, 0.8, 50)
    )
    model.generation_config = GenerationConfig(do_sample=False, top_k=7)
    options = model.turn_options(tokenizer, top_p=0.5)
    assert (options.do_sample, options.top_k, options.top_p) == (False, 7, 0.5)


@pytest.mark.parametrize("version", VERSIONS)
def test_limits_mean_what_they_say(version: int) -> None:
    model, tokenizer = pair(version)
    options: dict[str, Any] = {"do_sample": False, "suppress_tokens": [2, tokenizer.eos_token_id]}
    last = list(model.stream_steps(tokenizer, "hi", max_new_tokens=7, **options))[-1]
    assert (last.completion_tokens, last.finish_reason) == (7, "length")
    limit = last.prompt_tokens + 5
    last = list(model.stream_steps(tokenizer, "hi", max_length=limit, **options))[-1]
    assert (last.prompt_tokens + last.completion_tokens, last.finish_reason) == (limit, "length")
    last = list(model.stream_steps(tokenizer, "hi", max_length=limit, max_new_tokens=3, **options))[-1]
    assert last.completion_tokens == 3
    # Never beyond the context of the model.
    last = list(model.stream_steps(tokenizer, "hi", max_length=10**9, **options))[-1]
    assert last.prompt_tokens + last.completion_tokens == model.config.max_position_embeddings
    last = list(model.stream_steps(tokenizer, "hi", logits_processor=say(tokenizer, "ok"), do_sample=False))[-1]
    assert (last.text, last.finish_reason) == ("ok", "stop")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_long_history_loses_its_oldest_turns(version: int) -> None:
    model, tokenizer = pair(version)
    history = turns(version, 30, size=6)
    if version == 3:
        history = [{"role": "system", "content": "be brief"}, *history]
    steps = list(model.stream_steps(tokenizer, "last question", history, do_sample=False, max_new_tokens=4))
    context = model.config.max_position_embeddings
    assert context // 2 < steps[-1].prompt_tokens <= context - 4
    assert steps[-1].history[: len(history)] == history  # what is kept and shown is the whole conversation
    with pytest.raises(ValueError, match=r"needs \d+ tokens, but only \d+"):
        list(model.stream_steps(tokenizer, "long " * context, history))


@pytest.mark.parametrize("version", VERSIONS)
def test_cancel_keeps_what_was_said(version: int) -> None:
    model, tokenizer = pair(version)
    cancel, steps = threading.Event(), []
    processors = say(tokenizer, "one two three four five six seven")
    for step in model.stream_steps(tokenizer, "x", cancel=cancel, do_sample=False, logits_processor=processors):
        steps.append(step)
        if len(steps) == 3:
            cancel.set()
    assert steps[-1].finish_reason == "cancelled"
    assert steps[-1].text == steps[-2].text != ""
    assert steps[-1].history[-1] in (
        ("x", steps[-1].text),
        {"role": "assistant", "metadata": "", "content": steps[-1].text},
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_stop_strings_are_cut_off_and_never_shown(version: int) -> None:
    model, tokenizer = pair(version)
    steps = list(
        model.stream_steps(
            tokenizer,
            "x",
            stop_strings=["STOP", "tw!"],
            do_sample=False,
            logits_processor=say(tokenizer, "one STtwo STOP x"),
        )
    )
    assert (steps[-1].text, steps[-1].finish_reason) == ("one STtwo", "stop")
    printed = ""
    for step in steps:  # an "S" may be shown once what follows rules the stop string out, never before
        printed += step.delta
        assert "one STtwo".startswith(printed)


@pytest.mark.parametrize("version", VERSIONS)
def test_arguments_are_not_changed(version: int) -> None:
    model, tokenizer = pair(version)
    processors: list[LogitsProcessor] = []
    history = turns(version, 1)
    model.chat(tokenizer, "x", history, logits_processor=processors, max_new_tokens=2)
    list(model.stream_chat(tokenizer, "x", history, logits_processor=processors, max_new_tokens=2))
    assert (processors, history) == ([], turns(version, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stream_generate_is_generate(version: int, dtype: torch.dtype) -> None:
    model, tokenizer = pair(version)
    model = copy.deepcopy(model).to(dtype)
    ids = torch.tensor([tokenizer("hello world")["input_ids"]])
    for options in (
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"do_sample": False, "bad_words_ids": [[7], [9, 10]], "suppress_tokens": [11, 12]},
        {"do_sample": True, "top_k": 30, "top_p": 0.9, "temperature": 1.4},
        {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.01},
    ):
        torch.manual_seed(0)
        expected = model.generate(ids, max_new_tokens=12, attention_mask=torch.ones_like(ids), **options)
        torch.manual_seed(0)
        *_, ours = model.stream_generate(ids, max_new_tokens=12, **options)
        assert torch.equal(ours, expected), options


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_gives_what_its_rows_give_alone(version: int) -> None:
    model, tokenizer = pair(version)
    texts = ["hi", "hello to the whole wide world"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    *_, together = model.stream_generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=[])
    for row, text in zip(together, texts, strict=True):
        *_, alone = model.stream_generate(
            tokenizer(text, return_tensors="pt")["input_ids"], max_new_tokens=8, do_sample=False, eos_token_id=[]
        )
        assert row[-8:].tolist() == alone[0, -8:].tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_only_generate_can_do(version: int) -> None:
    model, tokenizer = pair(version)
    history = turns(version, 1)
    answer, new_history = model.chat(tokenizer, "x", history, num_beams=3, do_sample=False, max_new_tokens=6)
    assert isinstance(answer, str)
    assert new_history[-1] in ((("x", answer)), {"role": "assistant", "metadata": "", "content": answer})
    sampled = [model.chat(tokenizer, "x", history, typical_p=0.9, seed=5, max_new_tokens=6)[0] for _ in range(2)]
    assert sampled[0] == sampled[1]
    with pytest.raises(TypeError, match="unknown generation option"):
        list(model.stream_chat(tokenizer, "x", num_beams=2))


@pytest.mark.parametrize("version", VERSIONS)
def test_nan_is_an_error_that_names_the_place(version: int) -> None:
    model, tokenizer = copy.deepcopy(pair(version))
    layers = model.transformer.layers if version == 1 else model.transformer.encoder.layers
    with torch.no_grad():
        layers[1].mlp.dense_h_to_4h.weight[0, 0] = float("nan")
    with pytest.raises(chatglm.NonFiniteLogitsError, match=r"layers\.1\.mlp\.dense_h_to_4h \(torch\.float32\)"):
        model.chat(tokenizer, "x")
    forgiving = [chatglm.InvalidScoreLogitsProcessor()]
    ids = tokenizer("x", return_tensors="pt")["input_ids"]
    *_, out = model.stream_generate(ids, max_new_tokens=3, do_sample=False, logits_processor=forgiving)
    assert out[0, -3:].tolist() == [5, 5, 5]  # what the originals did


@pytest.mark.parametrize("version", VERSIONS)
def test_threads_do_not_share_a_cache(version: int) -> None:
    model, tokenizer = pair(version)
    questions = [f"question {i} 你好" for i in range(4)]
    expected = [model.chat(tokenizer, question, do_sample=False, max_new_tokens=12)[0] for question in questions]
    answers: dict[str, str] = {}

    def ask(question: str) -> None:
        answers[question] = model.chat(tokenizer, question, do_sample=False, max_new_tokens=12)[0]

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[question] for question in questions] == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_that_has_chatted_can_be_copied_and_pickled(version: int) -> None:
    model, tokenizer = pair(version)
    expected = model.chat(tokenizer, "x", do_sample=False, max_new_tokens=5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.chat(tokenizer, "x", do_sample=False, max_new_tokens=5) == expected


def test_a_tool_call_comes_as_a_dict_and_its_result_goes_back() -> None:
    model, tokenizer = pair(3)
    call = "get_weather\n ```python\ntool_call(city='北京')\n```"
    steps = list(
        model.stream_steps(
            tokenizer, "北京天气", [TOOLS_SYSTEM], do_sample=False, logits_processor=say(tokenizer, call)
        )
    )
    assert steps[-1].response == {"name": "get_weather", "parameters": {"city": "北京"}}
    assert steps[-1].history[-1]["metadata"] == "get_weather"
    answer, history = model.chat(
        tokenizer,
        '{"weather": "晴"}',
        steps[-1].history,
        role="observation",
        do_sample=False,
        logits_processor=say(tokenizer, "\n 晴天。"),
    )
    assert (answer, history[-2]["role"]) == ("晴天。", "observation")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length must be"),
        ({"max_length": -5}, ValueError, "max_length must be"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"temperature": float("nan")}, ValueError, "temperature must be"),
        ({"top_p": 1.5}, ValueError, "top_p must be"),
        ({"top_k": -1}, ValueError, "top_k must be"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be"),
        ({"history": "hello"}, TypeError, "history must be a list"),
        ({"history": [1]}, TypeError, r"history\[0\]"),
        ({"history": [("a", "b", "c")]}, (TypeError, ValueError), r"history\[0\]"),
        ({"query": None}, TypeError, "query must be a string"),
    ],
)
def test_bad_input_is_a_clear_error(version: int, options: dict[str, Any], error: Any, message: str) -> None:
    model, tokenizer = pair(version)
    given = {"query": "x"} | options
    for method in (model.chat, lambda *args, **kwargs: list(model.stream_chat(*args, **kwargs))):
        with pytest.raises(error, match=message):
            method(tokenizer, given["query"], **{name: value for name, value in given.items() if name != "query"})


@pytest.mark.parametrize("version", [1, 2])
def test_a_noted_question_and_a_greeting_are_no_rounds_of_their_own(version: int) -> None:
    model, tokenizer = pair(version)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
    response, history = model.chat(tokenizer, "q", history=[["", "Hello!"], ("a", "b")], **options)
    given = [(None, "Hello!"), [], ["a", "b"], ["q", None]]
    assert model.chat(tokenizer, "q", history=given, **options) == (response, history)
    assert list(model.stream_chat(tokenizer, "q", history=given, **options))[-1] == (response, history)
    assert tokenizer.build_prompt("q", given) == tokenizer.build_prompt("q", [("", "Hello!"), ("a", "b")])


def test_unknown_roles_and_other_tokenizers() -> None:
    model, tokenizer = pair(3)
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        model.chat(tokenizer, "x", role="tool")
    with pytest.raises(ValueError, match="generation 1, the model of generation 3"):
        model.chat(pair(1)[1], "x")
    with pytest.raises(TypeError, match="not a ChatGLM tokenizer"):
        model.chat(object(), "x")
    base = copy.deepcopy(model)
    base.config.is_base_model = True
    with pytest.raises(ValueError, match="base model"):
        base.chat(tokenizer, "x")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("query", ["", " ", "\ud800", "\x00", "<|user|>[gMASK]<sop><eop></s>"])
def test_odd_questions_have_an_answer(version: int, query: str) -> None:
    model, tokenizer = pair(version)
    answer, history = model.chat(tokenizer, query, max_new_tokens=3, do_sample=False)
    assert isinstance(answer, str)
    assert history[0] in ((query, answer), {"role": "user", "content": query})


@pytest.mark.parametrize("version", VERSIONS)
def test_a_million_characters_are_refused_with_numbers(version: int) -> None:
    model, tokenizer = pair(version)
    with pytest.raises(ValueError, match=r"needs \d{4,} tokens, but only \d+"):
        model.chat(tokenizer, "长" * 10**6)


def test_options_check_themselves() -> None:
    with pytest.raises(ValueError, match="give max_length or max_new_tokens"):
        GenerationOptions().length_limit(3, None)
    assert GenerationOptions(max_length=9, max_new_tokens=3).length_limit(4, 8) == 7
    assert GenerationOptions(eos_token_id=4).stop_ids() == [4]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_long_prompt_is_read_in_pieces_on_a_cpu(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair(version)
    model = copy.deepcopy(model)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    question = "你好 " * 12
    wanted = [step.text for step in model.stream_steps(tokenizer, question, **settings)]
    model.clear_chat_cache()
    monkeypatch.setattr(generation, "CPU_PROMPT_TOKENS", 7)
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    steps = list(model.stream_steps(tokenizer, question, **settings))
    assert [step.text for step in steps] == wanted
    prompt = lengths[: len(lengths) - 4]
    assert sum(prompt) == steps[0].prompt_tokens
    assert max(prompt) == (7 if version > 1 else steps[0].prompt_tokens), "generation 1 sees its prompt both ways"


@pytest.mark.parametrize("version", VERSIONS)
def test_options_that_change_nothing_are_accepted(version: int) -> None:
    """As the front ends of 2023 call the originals."""
    model, tokenizer = pair(version)
    plain = {"max_new_tokens": 5, "do_sample": False}
    neutral = {"num_beams": 1, "length_penalty": 1.0, "return_dict_in_generate": False}
    expected = model.chat(tokenizer, "q", [], **plain)
    assert model.chat(tokenizer, "q", [], **plain, **neutral) == expected
    assert [*model.stream_chat(tokenizer, "q", [], **plain, **neutral)][-1] == expected
    inputs = tokenizer.build_chat_input("q", [])
    rows = [row.tolist() for row in model.stream_generate(**inputs, past_key_values=None, **plain, **neutral)]
    assert rows == [row.tolist() for row in model.stream_generate(**inputs, **plain)]


@pytest.mark.parametrize("text", ["\n 你好 ", " [[训练时间]] a\n", "你好,再见"])
def test_decoded_answers_are_processed_as_in_chat(text: str) -> None:
    for version in VERSIONS:
        model, _ = pair(version)
        shown = model.process_response(text, turns(3, 1)) if version == 3 else model.process_response(text)
        cleaned = model.chat_format.clean(text)
        if version == 3:
            answer = {"role": "assistant", "metadata": "", "content": text.strip()}
            assert shown == (cleaned, [*turns(3, 1), answer])
        else:
            assert shown == cleaned


def test_a_decoded_tool_call_is_processed_as_in_chat() -> None:
    model, history = pair(3)[0], [TOOLS_SYSTEM, {"role": "user", "content": "q"}]
    before = copy.deepcopy(history)
    content, after = model.process_response("get_weather\n```python\ntool_call(city='x')\n```", history)
    assert content == {"name": "get_weather", "parameters": {"city": "x"}}
    assert history == before == after[:2] and after[2]["metadata"] == "get_weather"


@pytest.mark.parametrize("history", [None, [], [("a", "b")], turns(2, 3)])
def test_the_inputs_of_a_turn_of_generation_2(history: Any) -> None:
    model, tokenizer = pair(2)
    whole = model.build_inputs(tokenizer, "你好", history=history)
    called = tokenizer([tokenizer.build_prompt("你好", history or [])], return_tensors="pt")
    assert {name: rows.tolist() for name, rows in whole.items()} == {k: rows.tolist() for k, rows in called.items()}
    (new,) = model.build_stream_inputs(tokenizer, "你好", history=history)["input_ids"].tolist()
    assert whole["input_ids"][0].tolist()[-len(new) :] == new
    assert (len(new) == whole["input_ids"].shape[1]) == (not history)


@pytest.mark.parametrize("version", (1, 2, 3))
def test_a_completion_is_what_generate_gives(version: int) -> None:
    model, tokenizer = pair(version)
    *_, last = model.complete_steps(tokenizer, "你好", do_sample=False, max_new_tokens=8)
    inputs = tokenizer("你好", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    stops = set(tokenizer.chat_format.stop_token_ids(tokenizer))
    spoken = [index for index in output.tolist() if index not in stops]
    assert last.text == tokenizer.decode(spoken, clean_up_tokenization_spaces=False)
    with pytest.raises(TypeError, match="wrong_name"):
        list(model.complete_steps(tokenizer, "你好", wrong_name=1))
