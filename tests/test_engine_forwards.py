"""A piece of a prompt goes through the network together with the next tokens of answers, where that reads the weights
once instead of twice."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch

from chatglm import kernels
from chatglm.adapters import add_prefix, use_adapter
from chatglm.engine import Request, forwards
from chatglm.generation import GenerationOptions, NonFiniteLogitsError
from chatglm.quantization import quantize
from test_engine_batch import Server, alone, model_of, prompt, said, words
from test_engine_prefill import Machine

VERSIONS = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def with_kernels() -> None:
    if kernels.backend_for(torch.device("cpu")) is None:
        pytest.skip("no CPU kernels here: every forward reads the weights for itself")


@cache
def quantised(version: int, prefix: int | None = None) -> Any:
    """A tiny model of 4 bits, computed so that rounding does not turn a choice; do not change it."""
    model = quantize(copy.deepcopy(model_of(version)), 4, precision="exact")
    if prefix is not None:
        add_prefix(model, prefix, name="prefix")
        with torch.no_grad():
            model.transformer.prefix_encoder.embedding.weight.normal_(std=3.0)
    return model.eval()


def poison(model: Any, token: int) -> None:
    """Makes the embedding of a token NaN."""

    def poisoned(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == token).unsqueeze(-1), float("nan"))

    model.get_input_embeddings().register_forward_hook(poisoned)


def run_by_modules(model: Any) -> None:
    """Hooks a module, so that the kernels do not run the blocks in one call."""
    inner = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp"))
    inner.register_forward_hook(lambda *args: None)


class Watched(Server):
    """A server that counts forwards: `together`, for a prompt and answers, and `apart`, for either."""

    def __init__(self, model: Any, request: pytest.FixtureRequest, **sizes: Any) -> None:
        self.machine = Machine()
        super().__init__(model, clock=self.machine, **sizes)
        self.together = self.apart = 0
        self.broken = False
        hook = model.register_forward_pre_hook(self.note, with_kwargs=True)
        request.addfinalizer(hook.remove)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.machine.work(module, args, kwargs)
        if isinstance(kwargs["logits_to_keep"], int):
            self.apart += 1
            return
        self.together += 1
        if self.broken:
            raise RuntimeError("not this time")

    def begin(self, version: int, count: int = 3) -> list[tuple[Request, list[int]]]:
        """Long answers, under way."""
        prompts = [prompt(version, words(20 + 3 * number, number)) for number in range(count)]
        found = [(self.ask(ids, 60), ids) for ids in prompts]
        while any(one.answer_tokens < 2 for one, _ in found):
            self.step()
        self.together = self.apart = 0
        return found

    def times_until_answer(self, request: Request) -> list[float]:
        """Steps until the first token of an answer; returns how long each took."""
        times = []
        while not request.answer_tokens:
            before = self.machine.time
            self.step()
            times.append(self.machine.time - before)
        return times


@pytest.mark.parametrize("kind", ["plain", "prefix", "shared beginning"])
@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_those_given_alone(version: int, kind: str, request: pytest.FixtureRequest) -> None:
    model = quantised(version, 5 if kind == "prefix" else None)
    server = Watched(model, request, max_batch=8)
    begun = server.begin(version)
    system = words(200, "system") if kind == "shared beginning" else words(9, "hello")
    prompts = [prompt(version, system, words(100 + 7 * number, f"later {number}")) for number in range(3)]
    begun += [(server.ask(ids, 10), ids) for ids in prompts]
    while server.scheduler.has_work:
        answered = [one.answer_tokens for one, _ in begun]
        server.step()
        growth = [one.answer_tokens - before for (one, _), before in zip(begun, answered, strict=True)]
        assert all(more == 1 or one.answer_tokens == 60 for more, (one, _) in zip(growth[:3], begun[:3], strict=True))
    assert server.together > 5
    assert [said(one) for one, _ in begun] == [
        alone(model, ids, 60 if number < 3 else 10) for number, (_, ids) in enumerate(begun)
    ]
    if kind == "shared beginning":
        assert [one.cached_tokens >= (200 if version > 1 else 0) for one, _ in begun[4:]] == [True, True]


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_those_given_alone_whatever_the_schedule(version: int, request: pytest.FixtureRequest) -> None:
    """Requests of two clients come at random, beginnings in common, into caches with room for all or hardly for two."""
    model, rng = quantised(version), random.Random(version)
    prompts = [prompt(version, words(70, number % 2), words(8 + 15 * number, number)) for number in range(6)]
    wanted = [alone(model, ids, 100) for ids in prompts]
    together = preempted = 0
    for cache_tokens in (260, 400, 600, 3000):
        server = Watched(model, request, max_batch=3, cache_tokens=cache_tokens)
        asked: list[tuple[Request, int, int]] = []
        while len(asked) < 12 or server.scheduler.has_work:
            if len(asked) < 12 and (rng.random() < 0.5 or not server.scheduler.has_work):
                number, tokens = rng.randrange(6), rng.choice([1, 2, 30, 100])
                asked.append((server.ask(prompts[number], tokens), number, tokens))
                asked[-1][0].client = "first" if len(asked) <= 6 else "second"  # gives rows back to the second
            server.step()
        assert [said(one) for one, *_ in asked] == [wanted[number][:tokens] for _, number, tokens in asked]
        seen = server.scheduler.statistics
        assert seen.finished == {"length": 12} and seen.completion_tokens == sum(tokens for *_, tokens in asked)
        together, preempted = together + server.together, preempted + seen.preempted
    assert together > 20 and preempted > 0


def test_it_takes_fewer_walks_over_the_weights(request: pytest.FixtureRequest) -> None:
    """Every token of the prompt and every answer of the step in one forward, and the steps are no longer."""
    server = Watched(quantised(3), request)
    server.begin(3)
    one = server.ask(words(150, "a long prompt"), 1)
    times = server.times_until_answer(one)
    assert server.together + server.apart < 1.4 * len(times)
    assert max(times) <= 2.5 * (1 + 3 * 0.05) + 1


def test_a_forward_that_fails_is_tried_again_in_two(request: pytest.FixtureRequest) -> None:
    server = Watched(quantised(3), request)
    begun = server.begin(3)
    server.broken = True
    ids = words(150, "a long prompt")
    begun.append((server.ask(ids, 60), ids))
    server.run()
    assert server.together == 1  # the rest of this prompt is read apart at once
    assert [said(one) for one, _ in begun] == [alone(server.model, ids, 60) for _, ids in begun]
    assert server.scheduler.statistics.finished == {"length": 4}
    server.broken = False
    server.begin(3)
    server.ask(words(150, "another long prompt"), 1)
    server.run()
    assert server.together > 3


@pytest.mark.parametrize("times, ended", [(1, {"length": 3}), (2, {"length": 2, "error": 1})])
def test_an_adapter_that_cannot_be_used_ends_its_request_alone(
    times: int, ended: dict[str, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First while it is found out how much of a prompt fits beside the answers, then when the prompt is read."""
    model = copy.deepcopy(quantised(3, 5))
    use_adapter(model, None)
    server = Watched(model, request)
    server.ask(words(20, 2), 30, adapter=None)
    server.ask(words(20, 1), 30, adapter="prefix")
    for _ in range(4):
        server.step()
    faults = iter(range(times))

    def use(model: Any, name: str | None) -> None:
        if name == "prefix" and next(faults, None) is not None:
            raise torch.OutOfMemoryError("not this time")
        use_adapter(model, name)

    monkeypatch.setattr(forwards, "use_adapter", use)
    server.ask(words(30, 3), 5, adapter="prefix")
    server.run()
    assert next(faults, None) is None and server.scheduler.statistics.finished == ended


def test_a_gpu_is_not_asked_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They might be compiled, while answers wait, for a model that needs none."""
    monkeypatch.setattr(kernels, "ready_backend_for", lambda device: pytest.fail("it was asked"))
    model = model_of(3)
    blocks = model.get_submodule(model.part_names.blocks)
    assert model.transformer.run_blocks.most_rows(blocks, torch.device("cuda")) == 0


def test_short_prompts_do_not_make_the_pieces_of_a_long_one_large(request: pytest.FixtureRequest) -> None:
    server = Watched(quantised(3), request)
    server.machine.per_token = 0.1
    server.begin(3)
    for number in range(12):
        server.ask(words(3, number), 1)
        for _ in range(3):
            server.step()
    one = server.ask(words(300, "a long prompt"), 1)
    assert max(server.times_until_answer(one)) <= 2.5 * (1 + 3 * 0.1) + 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_prefix_in_front_of_an_int8_cache_is_rounded_wherever_its_prompt_is_read(
    version: int, shared: bool, request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(quantised(version, 5))
    model.kv_cache_dtype = "int8"
    system = words(80 if shared else 0, "system")
    ids = prompt(version, system, words(120, "mine"))
    found = []
    for company in (0, 3):
        server = Watched(model, request, max_batch=6)
        for number in range(company):
            server.ask(prompt(version, system, words(20 + number, number)), 60)
        for _ in range(6):
            server.step()
        seen: list[torch.Tensor] = []

        def note(_: Any, scores: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(scores.clone())
            return scores

        asked = GenerationOptions(do_sample=False, max_new_tokens=1, min_new_tokens=1, logits_processor=[note])
        server.scheduler.add(server.scheduler.make_request(ids, asked))
        server.run()
        found.append(seen[0])
    finite = found[0].isfinite()
    torch.testing.assert_close(found[1][finite], found[0][finite], atol=1e-2, rtol=0)


def test_what_a_cancelled_prompt_has_left_harms_nobody(request: pytest.FixtureRequest) -> None:
    """NaN in the middle of a prompt shows only at its end; the modules multiply what they do not see by zero."""
    model, bad = copy.deepcopy(model_of(3)), 7
    poison(model, bad)
    run_by_modules(model)
    server = Watched(model, request, max_batch=2, prefill_tokens=16)
    long = server.ask(words(300, "long"), 60)
    while long.answer_tokens < 2:
        server.step()
    poisoned = server.ask([*words(20, "p"), bad, *words(200, "q")], 5)
    for _ in range(5):
        server.step()
    poisoned.stream.cancel()
    ids = words(10, "innocent")
    one = server.ask(ids, 20)
    server.run()
    assert said(one) == alone(model_of(3), ids, 20)
    assert said(long) == alone(model_of(3), words(300, "long"), 60)


def test_nan_in_a_prompt_ends_its_request_alone(request: pytest.FixtureRequest) -> None:
    model, bad = copy.deepcopy(quantised(3)), 7
    poison(model, bad)
    server = Watched(model, request)
    begun = server.begin(3)
    poisoned = server.ask([*words(120, "a long prompt"), bad, *words(9, "more")], 5)
    server.run()
    assert server.together > 3
    with pytest.raises(NonFiniteLogitsError):
        list(poisoned.stream)
    assert [said(one) for one, _ in begun] == [alone(quantised(3), ids, 60) for _, ids in begun]
    ids = words(140, "another one")  # in the row of the poisoned one
    again = server.ask(ids, 5)
    server.run()
    assert said(again) == alone(quantised(3), ids, 5)


@pytest.mark.parametrize("answers", [True, False])
def test_probabilities_of_a_prompt(answers: bool, request: pytest.FixtureRequest) -> None:
    server = Watched(quantised(3), request)
    server.begin(3)
    ids = words(90, "told")
    one = server.ask(ids, 4, prompt_logprobs=2, answers=answers)
    server.run()
    assert server.together > 2
    other = Server(quantised(3))
    wanted = other.ask(ids, 4, prompt_logprobs=2, answers=answers)
    other.run()
    found, expected = list(one.stream), list(wanted.stream)
    assert [step.token_id for step in found] == [step.token_id for step in expected]
    assert found[-1].finish_reason == expected[-1].finish_reason == "length"
    told, right = found[0].prompt_logprobs, expected[0].prompt_logprobs
    assert told is not None and right is not None and told[0] is None and len(told) == len(right) == 90
    for mine, theirs in zip(told[1:], right[1:], strict=True):
        assert mine is not None and theirs is not None and mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-3)


def test_a_network_that_runs_module_by_module_reads_prompts_apart(request: pytest.FixtureRequest) -> None:
    model = copy.deepcopy(quantised(3))
    assert model.tokens_at_once() > 8
    run_by_modules(model)
    assert model.tokens_at_once() == 0
    server = Watched(model, request)
    begun = server.begin(3)
    ids = words(150, "a long prompt")
    begun.append((server.ask(ids, 60), ids))
    server.run()
    assert server.together == 0
    assert [said(one) for one, _ in begun] == [alone(model, ids, 60) for _, ids in begun]
