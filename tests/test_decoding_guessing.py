"""Guessing ahead: the same answers with and without, the same distribution, and never much slower."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.guessing import TASKS, Script
from chatglm.decoding import guessing
from chatglm.decoding.guessing import Costs, GuessAhead
from chatglm.decoding.lookup import PromptLookup
from chatglm.decoding.options import GenerationOptions
from chatglm.generation import ChatCache, decode, piece_end, weights_stamp
from chatglm.kernels import KernelUnavailable, cpu
from scripted import Say
from tiny_chat import pair
from tiny_networks import VERSIONS, prompt, tiny_model

LOOKUP = {"prompt_lookup_num_tokens": 5}


class Eager(GuessAhead):
    """Guesses all it can, whatever it costs, and counts."""

    guessed: Counter[int] = Counter()
    right: Counter[int] = Counter()

    def guess(self, ids: Sequence[int], room: int) -> list[int]:
        self._guesser.read(ids)
        return self._guesser.guess(min(len(self._guesser.chances()), max(room, 0)))

    def took(self, guessed: int, right: int, seconds: float) -> None:
        self.guessed[guessed] += 1
        self.right[right] += 1


class Chain(torch.nn.Module):
    """A model of three tokens whose next one depends on the last one alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
        self.config, self.device = SimpleNamespace(vocab_size=3), torch.device("cpu")

    def positions_from(self, input_ids: torch.Tensor, start: int, mask: Any = None) -> torch.Tensor:
        return torch.arange(start, input_ids.shape[1]).unsqueeze(0)

    def reusable_prefix(self, input_ids: list[int], common: int) -> int:
        return common

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids[:, -logits_to_keep:]])


class Steady(Costs):
    """A machine that is never busy."""

    def took(self, tokens: int, seconds: float) -> None:
        super().took(tokens, 0.9 + 0.1 * tokens)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> type[Eager]:
    monkeypatch.setattr(guessing, "GuessAhead", Eager)
    Eager.guessed, Eager.right = Counter(), Counter()
    return Eager


def answer(model: Any, ids: list[int], cache: ChatCache | None = None, tokens: int = 24, **options: Any) -> list[int]:
    cache = ChatCache(weights_stamp(model)) if cache is None else cache
    cache.keep_prefix_of(ids, model, weights_stamp(model))
    *_, (sequence, _) = decode(model, torch.tensor([ids]), GenerationOptions(**options), len(ids) + tokens, cache)
    spoken = sequence[0].tolist()
    assert cache.token_ids == spoken[:-1]  # what was guessed wrong has left the cache
    assert cache.get_seq_length() == len(spoken) - 1
    return spoken[len(ids) :]


@pytest.mark.parametrize("assisted", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_the_same(version: int, bits: int | None, assisted: bool, eager: type[Eager]) -> None:
    model, tokenizer = pair(version)
    ids = model.prepare_turn(tokenizer, "一二三 四五六 一二三 四五六 " * 3)[0]
    if bits:
        model = copy.deepcopy(model).quantize(bits)
    guess: dict[str, Any] = {"assistant_model": model, "num_assistant_tokens": 3} if assisted else LOOKUP
    few = [token for token in range(model.config.vocab_size) if not 300 <= token < 308]  # pairs come again soon
    options: dict[str, Any]
    for options in ({"do_sample": False}, {"seed": 1}, {"seed": 2, "repetition_penalty": 1.2, "top_p": 0.9}):
        options["suppress_tokens"] = None if assisted else few
        assert answer(model, ids, **options, **guess) == answer(model, ids, **options)
    assert sum(count for guessed, count in eager.guessed.items() if guessed)
    if assisted:
        assert eager.right[3]  # a model guesses itself


def test_several_tokens_of_a_quantised_network_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        backend = cpu.load()
    except KernelUnavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    rows: list[int] = []
    run = type(backend).run_blocks
    monkeypatch.setattr(
        type(backend), "run_blocks", lambda self, tokens, blocks: rows.append(tokens.rows) or run(self, tokens, blocks)
    )
    for version in VERSIONS:
        model = tiny_model(version).quantize(8, precision="exact")
        ids = torch.tensor([[*prompt(version, 12), 20, 21, 22, 23, 24, 25]])
        logits = []
        for sizes in ((12, 1, 5), (12, 1, 1, 1, 1, 1, 1)):
            cache, parts, start = ChatCache(), [], 0
            with torch.no_grad():
                for size in sizes:
                    positions = model.positions_from(ids, start)[..., :size]
                    piece = ids[:, start : start + size]
                    parts.append(model(input_ids=piece, position_ids=positions, past_key_values=cache).logits)
                    cache.token_ids += piece[0].tolist()
                    start += size
            logits.append(torch.cat(parts, dim=1)[:, 12:])
        torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert rows.count(5) == len(VERSIONS)


@pytest.mark.parametrize("draft", ["lookup", "other model"])
def test_sampled_answers_have_the_same_distribution(draft: str, eager: type[Eager]) -> None:
    """A chi-square test of 2,000 answers of four tokens against the model's probabilities."""
    model, ids, runs = Chain(0), [0, 1, 2, 1, 2, 0, 0, 1], 2000
    guess: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if draft == "other model":
        guess = {"assistant_model": Chain(1), "num_assistant_tokens": 3}
    chances = (model.table / 0.8).softmax(-1)
    expected = {
        spoken: float(torch.stack([chances[a, b] for a, b in itertools.pairwise((ids[-1], *spoken))]).prod())
        for spoken in itertools.product(range(3), repeat=4)
    }
    torch.manual_seed(3)
    options = GenerationOptions(temperature=0.8, **guess)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(runs):
        *_, (sequence, _) = decode(model, torch.tensor([ids]), options, len(ids) + 4)
        seen[tuple(sequence[0, len(ids) :].tolist())] += 1
    assert min(eager.right[count] for count in (0, 1)) > 100  # guesses were right, and wrong
    square = sum((seen[one] - runs * chance) ** 2 / (runs * chance) for one, chance in expected.items())
    assert square < 139  # 80 degrees of freedom: more happens in one of 20,000 runs


def test_an_answer_that_repeats_its_prompt_takes_few_forwards(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = pair(3)
    text = "The harbour office closed the north basin on Monday after divers found cracks in the outer wall."
    forwards: list[int] = []
    monkeypatch.setattr(guessing, "_costs", {model: Steady()})
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    request.addfinalizer(hook.remove)
    for most in (0, 10):
        forwards.clear()
        say = Say(tokenizer, text)
        steps = list(
            model.stream_steps(
                tokenizer, f"Repeat: {text}", do_sample=False, logits_processor=[say], prompt_lookup_num_tokens=most
            )
        )
        assert steps[-1].text == text and len(steps) == len(say.ids)
        assert [step.completion_tokens for step in steps] == list(range(1, len(steps) + 1))
        assert (len(forwards) < 0.5 * len(steps)) == bool(most)


def test_an_answer_may_stop_or_be_left_within_a_guess(eager: type[Eager]) -> None:
    model, _ = pair(2)
    ids = list(range(30, 60)) * 2
    plain = answer(model, ids, do_sample=False)
    repeated = ids + plain  # so that the answer can be guessed
    stop = next(i for i in range(4, 20) if plain[i] not in plain[:i])
    cache, cancel = ChatCache(weights_stamp(model)), threading.Event()
    steps = list(decode_steps(model, ids + plain[:2], cache, eos_token_id=plain[stop], assistant_model=model))
    assert [token for token, _ in steps] == plain[2 : stop + 1]
    assert steps[-1][1] == "stop"
    for count in (1, 3, 4):
        cache = ChatCache(weights_stamp(model))
        left = list(itertools.islice(decode_steps(model, ids, cache, assistant_model=model), count))
        assert [token for token, _ in left] == plain[:count]
        assert answer(model, ids, cache, do_sample=False) == plain  # what the cache says it holds is there
    cancel.set()
    assert [why for _, why in decode_steps(model, repeated, None, cancel=cancel, **LOOKUP)] == ["cancelled"]


def decode_steps(model: Any, ids: list[int], cache: ChatCache | None, **options: Any) -> Iterator[tuple[int, Any]]:
    if cache is not None:
        cache.keep_prefix_of(ids, model, weights_stamp(model))
    given = GenerationOptions(do_sample=False, **options)
    for sequence, reason in decode(model, torch.tensor([ids]), given, len(ids) + 24, cache):
        yield int(sequence[0, -1]), reason


class Clock:
    """A network whose forwards cost time on a clock: one token 1, each further one `each`."""

    def __init__(self, each: float) -> None:
        self.each = each
        self.time = 0.0

    def run(self, ahead: GuessAhead, ids: list[int], answer: list[int]) -> float:
        """Returns how much longer an answer took than without guesses, at worst up to one of its tokens."""
        done, began, worst = 0, self.time, 0.0
        while done < len(answer):
            guess = ahead.guess(ids + answer[:done], len(answer) - done - 1)
            right = 0
            while right < len(guess) and guess[right] == answer[done + right]:
                right += 1
            seconds = 1 + self.each * len(guess)
            self.time += seconds
            ahead.took(len(guess), right, seconds)
            done += right + 1
            worst = max(worst, (self.time - began) / done)
        return worst


@pytest.mark.parametrize("each", [0.02, 0.2, 0.5, 1.0])
def test_guesses_that_are_wrong_cost_little(each: float) -> None:
    generator = torch.Generator().manual_seed(0)
    guessed = 0.0
    for kinds in (2, 3, 8, 1000):  # few kinds of tokens: much is found, and little of it is right
        clock, costs = Clock(each), Costs()
        for seen in range(3):  # the first answer also shows what forwards cost
            tokens = torch.randint(kinds, (700,), generator=generator).tolist()
            worst = clock.run(GuessAhead(PromptLookup(10), costs), tokens[:300], tokens[300:])
            assert worst <= (1.03 if seen or each <= guessing.COST_OF_TOKEN else 1.2)
            assert clock.time <= 400 * (seen + 1) * 1.03
        guessed += clock.time - 1200
    assert guessed, "nothing was tried"


def test_a_text_that_cannot_be_guessed_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of all forwards, with a tenth of a token's time for each further row."""
    model, tokenizer = pair(3)
    question, text = TASKS["a text about something else"]
    rows: list[int] = []
    run = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, **inputs: rows.append(inputs["input_ids"].numel()) or run(self, **inputs)
    )
    monkeypatch.setattr(guessing, "_costs", {model: Steady()})
    prompt, ids = model.prepare_turn(tokenizer, question)[0], tokenizer.encode_text(text)
    for most in (0, 10):
        rows.clear()
        options = GenerationOptions(
            do_sample=False, logits_processor=[Script(len(prompt), ids)], prompt_lookup_num_tokens=most
        )
        *_, (sequence, _) = decode(model, torch.tensor([prompt]), options, len(prompt) + len(ids), ChatCache())
        assert sequence[0, len(prompt) :].tolist() == ids
        answered = rows[1:]
        assert sum(0.9 + 0.1 * count for count in answered) <= 1.03 * (len(ids) - 1)
        assert (len(answered) == len(ids) - 1) or most


def test_guesses_that_are_right_save_much() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(1000, (300,), generator=generator).tolist()
    for each, gain in ((0.02, 4.4), (0.1, 3.0), (0.3, 1.8)):
        clock = Clock(each)
        changed = [token if i % 40 else token + 1 for i, token in enumerate(source)]  # one in 40 is another one
        clock.run(GuessAhead(PromptLookup(10), Costs()), source, changed)
        assert len(changed) / clock.time > gain


def test_a_guess_repeats_itself_behind_the_end() -> None:
    lookup = PromptLookup(8)
    assert lookup.chances() == []
    lookup.read([7, 1, 2, 3, 1, 2])
    assert len(lookup.chances()) == 8
    assert lookup.guess(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    lookup.read([7, 1, 2, 3, 1, 2, 3, 9])
    assert lookup.chances() == []


def test_costs_between_measured_sizes() -> None:
    costs = Costs()
    assert costs.ratio(3) == pytest.approx(1 + 2 * guessing.COST_OF_TOKEN)
    costs.took(1, 2.0)
    costs.took(5, 6.0)
    assert [costs.ratio(size) for size in (1, 3, 5)] == pytest.approx([1.0, 2.0, 3.0])
    costs.took(5, 60.0)  # a busy moment counts little
    assert costs.ratio(5) < 6


def test_what_cannot_be_guessed_ahead_is_an_error() -> None:
    model, _ = pair(2)
    with pytest.raises(ValueError, match="not both"):
        GenerationOptions(assistant_model=model, **LOOKUP)
    with pytest.raises(ValueError, match="need the KV cache"):
        GenerationOptions(use_cache=False, **LOOKUP)
    with pytest.raises(ValueError, match="whole number of 0 or more"):
        GenerationOptions(prompt_lookup_num_tokens=-1)
    with pytest.raises(ValueError, match="one sequence"):
        next(decode(model, torch.ones(2, 3, dtype=torch.long), GenerationOptions(**LOOKUP), 8))
    options = GenerationOptions(assistant_model=tiny_model(2))
    with pytest.raises(ValueError, match="same tokenizer"):
        guessing.guess_ahead(model, options, piece_end)
