"""Waiting prompts are read in pieces that do not stall running answers."""

from __future__ import annotations

from typing import Any

import pytest

from chatglm.chat import ids_to_text
from chatglm.engine import Request, Scheduler
from chatglm.engine.prefill import BESIDE_RUN, LEAST, LEAST_BESIDE, SHARE, PrefillPace
from chatglm.generation import GenerationOptions
from tiny_chat import pair


def test_pieces_follow_the_measured_times() -> None:
    pace = PrefillPace(512)
    assert pace.piece(0.0, 0, 0) == 512 and pace.piece(9.0, 500, 0) == 12 and pace.piece(9.0, 512, 0) == 0
    assert pace.piece(0.0, 0, 3) == 512  # nothing is known yet
    pace.answered(0.2)
    pace.read(100, 0.5)
    assert pace.piece(0.0, 0, 3) == int(SHARE * 0.2 / 0.005)
    assert pace.piece(0.0, 0, 0) == 512  # nobody waits
    assert pace.piece(0.24, 48, 3) == 0  # too little time is left for another piece
    pace.read(100, 5.0)
    assert pace.piece(0.0, 0, 3) == LEAST  # but a step always reads something
    for _ in range(30):
        pace.answered(2.0)
    pace.read(100, 0.1)
    assert pace.piece(0.0, 0, 3) == 512


def test_pieces_beside_answers_follow_the_measured_times() -> None:
    pace = PrefillPace(512)
    pace.answered(0.2)
    assert pace.beside(0.0, 0, 60) == 0  # nothing is known of prompts yet
    pace.read(16, 0.4)
    assert pace.beside(0.0, 0, LEAST_BESIDE - 1) == 0
    assert pace.beside(0.0, 0, 12) == 12 and pace.beside(0.0, 500, 60) == 12  # all that there is room for
    assert pace.beside(0.0, 0, 60) == LEAST  # as if they took as long as those read on their own
    pace.read_beside(16, 0.36)  # 0.01 each
    assert pace.beside(0.0, 0, 60) == int(SHARE * 0.2 / 0.01) and pace.beside(0.05, 0, 60) == 20
    for _ in range(BESIDE_RUN - 1):
        assert pace.beside(0.0, 0, 60)
        pace.read_beside(16, 0.36)
    assert pace.beside(0.0, 0, 60) == 0  # the answers' own time has to be measured
    pace.answered(0.2)
    assert pace.beside(0.0, 0, 60) == 25
    pace.read(100, 0.1)
    assert pace.beside(0.0, 0, 60) == 0  # a much larger piece of its own takes as long


def test_answers_that_were_measured_while_the_machine_was_busy_are_not_believed_for_long() -> None:
    pace = PrefillPace(512)
    pace.answered(5.0)
    pace.read(16, 5.0)
    sizes = []
    for _ in range(40):  # now answers take 0.1, and each token beside them 0.01
        sizes.append(pace.beside(0.0, 0, 60))
        if sizes[-1]:
            pace.read_beside(sizes[-1], 0.1 + 0.01 * sizes[-1])
        else:
            pace.read(16, 0.26)
            pace.answered(0.1)
    assert max(sizes[:20]) == 60 and max(sizes[-10:]) <= 20


class Machine:
    """A clock that the forwards of a model move: 1 for the weights and `per_token` for each token."""

    def __init__(self) -> None:
        self.time, self.per_token = 0.0, 0.05

    def __call__(self) -> float:
        return self.time

    def work(self, module: Any, args: Any, kwargs: Any) -> None:
        self.time += 1 + self.per_token * kwargs["input_ids"].numel()


@pytest.mark.parametrize("version", [2, 3])
def test_answers_go_on_while_prompts_are_read(version: int, request: pytest.FixtureRequest) -> None:
    model, tokenizer = pair(version)
    machine = Machine()
    hook = model.register_forward_pre_hook(machine.work, with_kwargs=True)
    request.addfinalizer(hook.remove)
    scheduler = Scheduler(model, ids_to_text(tokenizer), clock=machine)
    options = GenerationOptions(do_sample=False, max_new_tokens=20, min_new_tokens=20)

    def ask(tokens: int) -> Request:
        one = scheduler.make_request([10 + i % 50 for i in range(tokens)], options)
        scheduler.add(one)
        return one

    running = ask(8)
    for _ in range(4):
        scheduler.step()
    joining = [ask(150), ask(20), ask(30)]
    while any(one.answer_tokens == 0 for one in joining):
        before, answered = machine.time, running.answer_tokens
        scheduler.step()
        assert machine.time - before <= 3 * (1 + 0.05) + 0.05 * 3  # at most three times a step without prompts
        assert running.answer_tokens == answered + 1 or running.answer_tokens == 20
    while scheduler.has_work:
        scheduler.step()
    assert [one.answer_tokens for one in (running, *joining)] == [20] * 4
