"""Prompt formats against the goldens; histories, budgets, answers and tool calls."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from chatglm import conversation
from chatglm.conversation.chat_messages import normalize_messages, pairs_from_messages
from chatglm.conversation.fitting import fit_conversation
from chatglm.conversation.formats import encode_conversation, stop_token_ids
from chatglm.conversation.history import has_tools, validate_history
from chatglm.conversation.responses import clean_response, parse_response, stable_response
from chatglm.conversation.tool_calls import tool_call_message
from chatglm.tokenization_chatglm import ChatGLMTokenizer
from conftest import needs_shared
from tokenizer_goldens import deviation, golden, make_vocabulary, tokenizer

TOOLS = [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("conversation")

    @lru_cache
    def load(version: int) -> Any:
        return ChatGLMTokenizer.from_pretrained(make_vocabulary(root / str(version), version))

    return load


# ---------------------------------------------------------------------------------------------------- goldens


@needs_shared
@pytest.mark.parametrize("name", ["v1", "v1_0", "v2"])
def test_prompts_of_pairs(name: str) -> None:
    ours, data = tokenizer(name), golden("chat")[name]
    for case in data["chat"]:
        query, history, (expected,) = case["query"], case["history"], case["captured"]["input_ids"]
        before = copy.deepcopy(history)
        assert not case["caller_history_mutated"] and ours.decode(expected) == case["prompt_decoded"]
        assert encode_conversation(ours, query, history) == expected
        assert fit_conversation(ours, query, history, len(expected)) == (expected, [tuple(pair) for pair in history])
        assert history == before
        inputs = {key: value.tolist() for key, value in ours.build_chat_input(query, history).items()}
        assert inputs == {key: case["captured"][key] for key in ours.model_input_names if key in case["captured"]}
        *answer_ids, stop = case["fake_generated_ids"]
        assert [stop] == stop_token_ids(ours)
        response = parse_response(ours.chatglm_version, ours.decode(answer_ids)).content
        if name == "v1_0":
            assert deviation("the_old_vocabulary_works_like_the_new") and ours.decode(answer_ids) == case["response"]
            assert golden("chat")["v1_0"]["process_response"] == "no such method in v1.0 revision"
            (new,) = {other["response"] for other in golden("chat")["v1"]["chat"]}
            assert response == new  # the same ids, 20,000 lower
            assert case["new_history"] == [*map(list, history), [query, case["response"]]]
        else:
            assert response == case["response"]
            assert [*map(list, history), [query, response]] == case["new_history"]
    for case in data.get("build_prompt", []):
        history = [pair for chat in data["chat"] if len(chat["history"]) == case["n"] for pair in chat["history"]]
        assert ours.build_prompt(data["chat"][0]["query"], history) == case["prompt"]


@needs_shared
def test_the_next_round_of_generation_2_is_a_suffix() -> None:
    """What the original sends with a cache is the end of the whole prompt."""
    ours, data = tokenizer("v2"), golden("chat")["v2"]
    for case, chat in zip(data["build_stream_inputs"], data["chat"], strict=True):
        (ids,) = case["inputs"]["input_ids"]
        assert case["n"] == len(chat["history"])
        assert encode_conversation(ours, chat["query"], chat["history"])[-len(ids) :] == ids
        assert case["inputs"]["attention_mask"] == [[1] * len(ids)]
        assert case["inputs"]["position_ids"] == [[*range(len(ids))]]


@needs_shared
@pytest.mark.parametrize("version", [1, 2])
def test_cleaned_answers(version: int) -> None:
    for case in golden("chat")[f"v{version}"]["process_response"]:
        assert clean_response(version, case["inp"]) == case["out"]


@needs_shared
def test_prompts_of_roles() -> None:
    ours, data = tokenizer("v3"), golden("chat")["v3"]
    for case in data["build_chat_input"]:
        arguments = case["case"]
        before = copy.deepcopy(arguments)
        if "error" in case["result"]:
            assert deviation("wrong_names_are_value_errors")
            with pytest.raises(ValueError, match="unknown role"):
                ours.build_chat_input(**arguments)
            continue
        found = {name: value.tolist() for name, value in ours.build_chat_input(**arguments).items()}
        assert found == case["result"]["ok"]
        ids = found["input_ids"][0]
        assert fit_conversation(ours, arguments["query"], arguments["history"], len(ids), arguments["role"])[0] == ids
        assert arguments == before
    for case in data["build_single_message"]:
        assert ours.build_single_message(*case["args"]) == case["ids"]


@needs_shared
def test_histories_and_stop_tokens_of_roles() -> None:
    *cases, wrong = golden("chat")["v3"]["chat"]
    assert wrong["case"]["role"] == "tool" and wrong["result"]["error"] == "AssertionError"  # as above
    for case in cases:
        query, history, role = (case["case"][key] for key in ("query", "history", "role"))
        expected = case["result"]["ok"]
        if expected["caller_history_after"] is not None:
            assert deviation("arguments_are_left_alone")
            assert expected["caller_history_after"] == [*history, {"role": role, "content": query}]
        assert stop_token_ids(tokenizer("v3")) == expected["generate_kwargs"]["eos_token_id"]
        response = parse_response(3, f"\n {expected['response']}", has_tools(history))
        assert response.content == expected["response"]
        before = validate_history(3, history)
        assert [*before, {"role": role, "content": query}, *response.messages] == expected["new_history"]


@needs_shared
def test_answers_of_roles() -> None:
    kept = 0
    for case in golden("chat")["v3"]["process_response"]:
        content, history = case["result"]["ok"]
        assert not case["caller_history_mutated"]
        response = parse_response(3, case["inp"], has_tools(case["history"]))
        if content == {"name": "interpreter", "parameters": None}:
            assert deviation("interpreter_code_is_kept")
            content, kept = {**content, "content": "```python\nprint(1)\n```"}, kept + 1
        assert response.content == content
        assert [*case["history"], *response.messages] == history
    assert kept == 1


# ---------------------------------------------------------------------------------------------------- history


def test_a_history_is_copied() -> None:
    pairs = [["q", "a"]]
    assert validate_history(1, pairs) == validate_history(2, pairs) == [("q", "a")] and pairs == [["q", "a"]]
    system = {"role": "system", "content": "s", "tools": TOOLS}
    copied = validate_history(3, [system])
    copied[0]["tools"][0]["name"] = "other"
    assert TOOLS[0]["name"] == "get_weather"
    assert validate_history(3, None) == validate_history(1, ()) == []


@pytest.mark.parametrize(
    ("version", "history", "error", "match"),
    [
        (1, "text", TypeError, "history must be a list, not str"),
        (2, {"role": "user"}, TypeError, "history must be a list, not dict"),
        (3, 7, TypeError, "history must be a list, not int"),
        (1, [("q",)], ValueError, r"history\[0\] must be a \(question, answer\) pair, but has 1 items"),
        (1, [("q", "a"), ("q", None)], TypeError, r"the answer of history\[1\] must be a string, not NoneType"),
        (2, ["qa"], TypeError, r"history\[0\] must be a \(question, answer\) pair, not str"),
        (2, [{"role": "user", "content": "q"}], TypeError, "For role dicts use tokenizer.apply_chat_template"),
        (3, [("q", "a")], TypeError, "pairs are for ChatGLM-6B and ChatGLM2-6B"),
        (3, [{"role": "user"}], ValueError, "needs the keys 'role' and 'content'"),
        (3, [{"role": "tool", "content": ""}], ValueError, "unknown role 'tool': use one of system, user"),
        (3, [{"role": [], "content": ""}], ValueError, "unknown role"),
        (3, [{"role": "user", "content": None}], TypeError, r"the content of history\[0\] must be a string"),
        (3, [{"role": "assistant", "content": "", "metadata": 3}], TypeError, "the metadata of"),
        (3, [{"role": "system", "content": "", "tools": "get_weather"}], TypeError, "must be a list of tool"),
    ],
)
def test_a_history_of_the_wrong_shape(
    tiny: Any, version: int, history: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        validate_history(version, history)
    with pytest.raises(error, match=match):
        encode_conversation(tiny(version), "q", history)
    with pytest.raises(error, match=match):
        fit_conversation(tiny(version), "q", history, 1000)


def test_queries_and_roles(tiny: Any) -> None:
    for version in (1, 2, 3):
        with pytest.raises(TypeError, match="the query must be a string, not NoneType"):
            encode_conversation(tiny(version), None)  # type: ignore[arg-type]
        assert encode_conversation(tiny(version), "")
    for version in (1, 2):
        with pytest.raises(ValueError, match="for ChatGLM3-6B only"):
            encode_conversation(tiny(version), "q", role="system")
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        encode_conversation(tiny(3), "q", role="tool")
    system = [{"role": "system", "content": "", "tools": [{"name": object()}]}]
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        encode_conversation(tiny(3), "q", system)


@pytest.mark.parametrize(("tools", "text"), [([], "\n[]"), ({}, "\n{}"), ((), "\n[]"), (None, "")])
def test_an_empty_list_of_tools_is_written(tiny: Any, tools: Any, text: str) -> None:
    """The original asks whether the key is there, for the prompt and for the answer."""
    ours, history = tiny(3), [{"role": "system", "content": "s", "tools": tools}]
    assert tools is not None or deviation("none_is_not_written")
    messages = [*history, {"role": "user", "content": "q"}]
    written = [{"role": "system", "content": f"s{text}"}]
    expected = encode_conversation(ours, "q", written)
    assert expected[2 : -len(encode_conversation(ours, "q")) + 2] == ours.build_single_message("system", "", f"s{text}")
    assert encode_conversation(ours, "q", history) == ours.build_chat_input("q", history)["input_ids"][0].tolist()
    assert encode_conversation(ours, "q", history) == expected
    assert fit_conversation(ours, "q", history, len(expected)) == (expected, history)
    assert ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
    assert has_tools(history) == (tools is not None)
    call = parse_response(3, "get_weather\n```python\ntool_call(city='x')\n```", has_tools(history)).content
    assert isinstance(call, dict) and ("parameters" in call) == (tools is not None)


def test_tools_of_a_message_that_is_no_system_message(tiny: Any) -> None:
    assert deviation("tools_belong_to_a_system_message")
    for role in ("user", "assistant", "observation"):
        with pytest.raises(ValueError, match=rf"history\[0\] has tools and the role '{role}'"):
            encode_conversation(tiny(3), "q", [{"role": role, "content": "c", "tools": TOOLS}])
        plain = encode_conversation(tiny(3), "q", [{"role": role, "content": "c"}])
        assert encode_conversation(tiny(3), "q", [{"role": role, "content": "c", "tools": []}]) == plain


def test_metadata_that_is_none(tiny: Any) -> None:
    assert deviation("none_is_not_written")
    with_none, without = ({"role": "assistant", "content": "c"} | extra for extra in ({"metadata": None}, {}))
    assert encode_conversation(tiny(3), "q", [with_none]) == encode_conversation(tiny(3), "q", [without])


def test_wrapped_tools_are_unwrapped(tiny: Any) -> None:
    assert deviation("wrapped_tools_are_unwrapped")
    wrapped = [{"type": "function", "function": tool} for tool in TOOLS]
    prompts = [
        encode_conversation(tiny(3), "q", [{"role": "system", "content": "s", "tools": tools}])
        for tools in (TOOLS, wrapped)
    ]
    assert prompts[0] == prompts[1]
    assert json.dumps(TOOLS, indent=4, ensure_ascii=False) in tiny(3).decode(prompts[0])


# ----------------------------------------------------------------------------------------------------- budget


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
def test_as_few_turns_as_possible_are_dropped(tiny: Any, version: int) -> None:
    ours, history = tiny(version), turns_of(version, 14)
    step = 2 if version == 3 else 1
    prompts = [encode_conversation(ours, "现在呢", history[step * dropped :]) for dropped in range(15)]
    for budget in range(len(prompts[-1]), len(prompts[0]) + 2):
        ids, kept = fit_conversation(ours, "现在呢", history, budget)
        dropped = next(index for index, prompt in enumerate(prompts) if len(prompt) <= budget)
        assert ids == prompts[dropped] and kept == history[step * dropped :]
    with pytest.raises(ValueError, match=rf"needs {len(prompts[-1])} tokens, but only {len(prompts[-1]) - 1} are left"):
        fit_conversation(ours, "现在呢", history, len(prompts[-1]) - 1)


def test_the_work_grows_with_the_budget_not_with_the_history(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_system_message_and_the_current_turn_stay(tiny: Any) -> None:
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


def test_a_history_that_does_not_start_with_a_question(tiny: Any) -> None:
    history = [{"role": "assistant", "content": "Hello!"}, *turns_of(3, 1)]
    ids = encode_conversation(tiny(3), "q", history)
    assert fit_conversation(tiny(3), "q", history, len(ids)) == (ids, history)
    assert fit_conversation(tiny(3), "q", history, len(ids) - 1)[1] == history[1:]


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("```python\ntool_call(city='北京', days=-3, deep={'a': [1, (2, None)]})\n```",
         {"city": "北京", "days": -3, "deep": {"a": [1, (2, None)]}}),
        ("```python\ntool_call(x=true, y=null, z=[false])\n```", {"x": True, "y": None, "z": [False]}),
        ("```python\nget_weather(city='x')\n```", {"city": "x"}),
        ("```python\ntool_call()\n```", {}),
        ("```python\ntool_call(city='没有关上的围栏')", {"city": "没有关上的围栏"}),
        ("tool_call(city='no fence')", {"city": "no fence"}),
        ("get_weather(city='no fence')", {"city": "no fence"}),
        ("```python\ntool_call(path='C:\\dir\\new', tab='\\t')\n```", {"path": "C:\\dir\new", "tab": "\t"}),
        ("```python\ntool_call(path=r'C:\\dir')```", {"path": "C:\\dir"}),
        ('```json\n{"city": "北京"}\n```', {"city": "北京"}),
        ('{"name": "get_weather", "arguments": {"city": "x"}}', {"city": "x"}),
    ],
)  # fmt: skip
def test_tool_calls(text: str, parameters: Any) -> None:
    response = parse_response(3, f"get_weather\n{text}", with_tools=True)
    assert response.content == {"name": "get_weather", "parameters": parameters}
    assert response.messages == [{"role": "assistant", "metadata": "get_weather", "content": text}]


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(city=open('/etc/passwd').read())",
        "tool_call(city=__import__('os').system('true'))",
        "tool_call('北京')",
        "tool_call(**{1: 1})",
        "tool_call(**[1])",
        "tool_call(a=1, **{'a': 1})",
        "tool_call(a=1, a=2)",
        "tool_call(a=b)",
        "tool_call(a=1); print(1)",
        "other(a=1)",
        "tool_call.x(a=1)",
        "tool_call(a=",
        "tool_call(a=1\x00)",
        "tool_call(a=" + "(" * 5000 + ")" * 5000 + ")",
        "tool_call(a=" + "-" * 100_000 + "1)",
        "{'a': 1}",
        "{" * 100_000,
        "[1]",
        "",
    ],
)
def test_calls_that_cannot_be_read_are_a_result(code: str) -> None:
    assert deviation("calls_are_read_not_run")
    content = f"```python\n{code}\n```"
    response = parse_response(3, f"get_weather\n{content}", with_tools=True)
    assert isinstance(response.content, dict)
    error = response.content.pop("error")
    assert error.startswith("the tool call cannot be read: ") and len(error) > 31
    assert response.content == {"name": "get_weather", "parameters": None, "content": content}


def test_nothing_is_run(tmp_path: Path) -> None:
    target = tmp_path / "made"
    code = f"tool_call(x=open({str(target)!r}, 'w'))"
    for name in ("get_weather", "interpreter"):
        parse_response(3, f"{name}\n```python\n{code}\n```", with_tools=True)
    assert not target.exists()


@pytest.mark.parametrize(
    "text", ["你好", "Sure, here it is:\n```python\nprint(1)\n```", "Hello\nworld", "1.\n```\n2\n```", "get_weather"]
)
def test_a_first_line_that_is_no_tool_name(text: str) -> None:
    assert deviation("a_first_line_that_is_no_name_is_text")
    for with_tools in (True, False):
        response = parse_response(3, text, with_tools)
        assert response.content == text
        assert response.messages == [{"role": "assistant", "metadata": "", "content": text}]


def test_a_call_survives_the_way_there_and_back() -> None:
    parameters = {"city": "O'Hare \"x\"\n", "n": [1, 2.5, None, True], "d": {"k": "```"}, "path": "C:\\dir"}
    for given in (parameters, {**parameters, "not an identifier": 1}, {}):
        message = tool_call_message("get_weather", given)
        response = parse_response(3, f"{message['metadata']}\n{message['content']}", with_tools=True)
        assert response.content == {"name": "get_weather", "parameters": given}
        assert response.messages == [message]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (1, "你好,世界! It's 3:00, OK? 是的; 1,2,三 [[训练时间]] a.\n\n  end  "),
        (1, "他说:[[训练 好,\n好"),
        (2, "\n [[训练时间]] x [[训练 😀 [x] [[y]]  \n"),
        (3, "\n 你好，[[训练时间]]。\n```python\nx = [[1]]\n```\n"),
        (3, "get_weather\n```python\ntool_call(city='北京')\n```"),
        (3, "no line break"),
    ],
)
def test_what_may_be_shown_of_an_answer_only_grows(version: int, text: str) -> None:
    shown = ""
    for end in range(len(text) + 1):
        for tail in ("", "\ufffd", "\ufffd\ufffd"):
            stable = stable_response(version, text[:end] + tail)
            assert stable.startswith(shown)
            shown = stable
    final = clean_response(version, text)
    assert final.startswith(shown) and len(shown) >= len(final) - 12


@needs_shared
def test_what_may_be_shown_with_generation_1s_clean_up_of_blanks() -> None:
    ours, shown = tokenizer("v1"), ""
    ids = ours.encode_text("hello , world . what ' s up ? I do n't , we 've 你好 ! 是 's")
    for end in range(len(ids) + 1):
        stable = stable_response(1, ours.decode(ids[:end]))
        assert stable.startswith(shown)
        shown = stable
    assert clean_response(1, ours.decode(ids)).startswith(shown)


def test_plain_answers_of_pairs() -> None:
    response = parse_response(1, " 你好,世界! ")
    assert response.content == "你好，世界！"
    assert response.messages == [{"role": "assistant", "content": "你好，世界！"}]
    assert parse_response(2, "你好,世界!\n").content == "你好,世界!"


def test_stop_tokens(tiny: Any) -> None:
    names = {1: ["<eop>"], 2: ["</s>"], 3: ["</s>", "<|user|>", "<|observation|>"]}
    for version, expected in names.items():
        assert tiny(version).convert_ids_to_tokens(stop_token_ids(tiny(version))) == expected


# --------------------------------------------------------------------------------- messages of other programs


def test_messages_of_openai_clients() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "北京"}, {"type": "text", "text": "天气"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "晴"},
    ]
    before = copy.deepcopy(messages)
    result = normalize_messages(messages, TOOLS)
    assert messages == before
    assert result == [
        {"role": "system", "content": conversation.TOOLS_SYSTEM_PROMPT, "tools": TOOLS},
        {"role": "user", "content": "北京天气"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"},
        {"role": "observation", "content": "晴"},
    ]
    assert normalize_messages([{"role": "developer", "content": "s"}], TOOLS) == [
        {"role": "system", "content": "s", "tools": TOOLS}
    ]


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ("hi", TypeError, "messages must be a list of dicts, not str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], TypeError, "the models read text only"),
        ([{"role": "assistant", "tool_calls": [{}]}], ValueError, "a tool call of messages"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], ValueError, "JSON"),
    ],
)
def test_wrong_messages(messages: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        normalize_messages(messages)


def test_messages_as_pairs() -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "s"}
    assert pairs_from_messages([user]) == ([], "q")
    assert pairs_from_messages([system, user, assistant]) == ([("s\nq", "a")], None)
    assert pairs_from_messages([user, assistant, user]) == ([("q", "a")], "q")
    for wrong in ([assistant], [user, user], [user, system], [user, assistant, assistant], [system, system]):
        with pytest.raises(ValueError, match="takes user and assistant messages in turn"):
            pairs_from_messages(wrong)
    for empty in ([], [system]):
        with pytest.raises(ValueError, match="needs a user message"):
            pairs_from_messages(empty)
    with pytest.raises(ValueError, match="in turn"):
        pairs_from_messages([user, {"role": "assistant", "content": "", "metadata": "get_weather"}])


def test_templates_and_tools(tiny: Any) -> None:
    for version in (1, 2):
        with pytest.raises(ValueError, match="tools are for ChatGLM3-6B only"):
            tiny(version).apply_chat_template([{"role": "user", "content": "q"}], tools=TOOLS)
        with pytest.raises(ValueError, match="the last message to be the user's"):
            messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
            tiny(version).apply_chat_template(messages, add_generation_prompt=True)

    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name
        """
        return city

    ours: Any = tiny(3)
    messages = [{"role": "user", "content": "q"}]
    text = ours.apply_chat_template(messages, tools=[get_weather], tokenize=False)
    assert text.startswith("[gMASK]sop<|system|>\n Answer the following") and '"name": "get_weather"' in text
    assert '"type": "function"' not in text


@pytest.mark.parametrize("tools", [None, [], {}, TOOLS, [{"type": "function", "function": TOOLS[0]}], {"a": TOOLS[0]}])
@pytest.mark.parametrize("content", ["s", ""])
@pytest.mark.parametrize("given", [None, [{"name": "other"}]])
def test_the_template_writes_tools_as_the_format_does(tiny: Any, tools: Any, content: str, given: Any) -> None:
    """The tools of a system message, and those of the call in their place."""
    ours: Any = tiny(3)
    messages = [{"role": "system", "content": content, "tools": tools}, {"role": "user", "content": "q"}]
    for chat in (messages, messages[1:]):
        text = ours.apply_chat_template(chat, tools=given, tokenize=False, add_generation_prompt=True)
        rendered = PreTrainedTokenizerBase.apply_chat_template(
            ours, chat, tools=given, tokenize=False, add_generation_prompt=True
        )
        assert rendered == text
        ids = ours.apply_chat_template(chat, tools=given, return_dict=False, add_generation_prompt=True)
        assert ids == ours.encode(text, add_special_tokens=False, split_special_tokens=False)
