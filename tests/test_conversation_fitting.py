"""A conversation within a budget of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from chatglm.conversation import encode_conversation, fit_conversation, tool_call_message
from conversations import TOOLS, tiny


def turns_of(version: int, count: int) -> list[Any]:
    if version != 3:
        return [(f"问题 {index}" * (index % 4 + 1), f"answer {index}") for index in range(count)]
    return [
        message
        for index in range(count)
        for message in (
            {"role": "user", "content": f"问题 {index}" * (index % 4 + 1)},
            {"role": "assistant", "content": f"answer {index}"},
        )
    ]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_as_few_turns_as_possible_are_dropped(version: int) -> None:
    ours, history = tiny(version), turns_of(version, 14)
    step = 2 if version == 3 else 1
    prompts = [encode_conversation(ours, "现在呢", history[step * dropped :]) for dropped in range(15)]
    for budget in range(len(prompts[-1]), len(prompts[0]) + 2):
        ids, kept = fit_conversation(ours, "现在呢", history, budget)
        dropped = next(index for index, prompt in enumerate(prompts) if len(prompt) <= budget)
        assert ids == prompts[dropped] and kept == history[step * dropped :]
    with pytest.raises(ValueError, match=rf"needs {len(prompts[-1])} tokens, but only {len(prompts[-1]) - 1} are left"):
        fit_conversation(ours, "现在呢", history, len(prompts[-1]) - 1)


def test_the_work_grows_with_the_budget_not_with_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2, 3):
        ours, seen = tiny(version), [0]
        encode = type(ours).encode_text

        def counted(self: Any, text: str, encode: Any = encode, seen: Any = seen) -> list[int]:
            seen[0] += len(text)
            return encode(self, text)

        with monkeypatch.context() as patch:
            patch.setattr(type(ours), "encode_text", counted)
            counts = []
            for size in (200, 2000):
                seen[0] = 0
                fit_conversation(ours, "q", turns_of(version, size), 300)
                counts.append(seen[0])
        assert counts[1] < 2 * counts[0]


def test_a_system_message_and_the_current_turn_stay() -> None:
    ours = tiny(3)
    system = {"role": "system", "content": "天气工具", "tools": TOOLS}
    call = [{"role": "user", "content": "北京天气"}, tool_call_message("get_weather", {"city": "北京"})]
    history = [system, *turns_of(3, 5), *call]
    least = encode_conversation(ours, "晴", [system, *call], "observation")
    assert fit_conversation(ours, "晴", history, len(least), "observation") == (least, [system, *call])
    with pytest.raises(ValueError, match="the question alone"):
        fit_conversation(ours, "晴", history, len(least) - 1, "observation")
    ids, kept = fit_conversation(ours, "问", history, len(encode_conversation(ours, "问", [system])))
    assert kept == [system] and ids == encode_conversation(ours, "问", [system])


def test_a_history_that_does_not_start_with_a_question() -> None:
    history = [{"role": "assistant", "content": "Hello!"}, *turns_of(3, 1)]
    ids = encode_conversation(tiny(3), "q", history)
    assert fit_conversation(tiny(3), "q", history, len(ids)) == (ids, history)
    assert fit_conversation(tiny(3), "q", history, len(ids) - 1)[1] == history[1:]
