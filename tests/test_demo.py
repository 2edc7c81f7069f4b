"""The bundled demo checkpoints and their corpus. The whole evaluation is a command: tools.demo.evaluate."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chatglm
from chatglm.conversation import encode_conversation, validate_history
from chatglm.conversation.tool_calls import parse_call
from chatglm.demo import FOLDERS, is_demo, with_vocabulary_of
from tools.demo import corpus, dialogues, tool_turns
from tools.demo.batches import Encoder, batches
from tools.demo.evaluate import is_right, items, same
from tools.demo.phrases import expand, parse, read

MEGABYTES = 12


@pytest.fixture(scope="module", params=[3, 1])
def demo(request: pytest.FixtureRequest):
    model, tokenizer = chatglm.load(str(FOLDERS[request.param]), device="cpu", dtype="float32")
    return model, tokenizer


# ----------------------------------------------------------------------------------------------------------- corpus


@pytest.mark.parametrize("version", [1, 3])
def test_the_same_seed_gives_the_same_dialogues(version: int) -> None:
    one, two, other = ([*itertools.islice(dialogues.dialogues(seed, version == 3), 300)] for seed in (7, 7, 8))
    assert one == two
    assert one != other


def test_dialogues_alternate_and_tools_are_for_generation_3() -> None:
    for version in (1, 3):
        for dialogue in itertools.islice(dialogues.dialogues(0, version == 3), 400):
            roles = [message.role for message in dialogue if message.role != "system"]
            assert roles[::2] == [role for role in roles[::2] if role in ("user", "observation")]
            assert set(roles[1::2]) == {"assistant"}
            if version == 1:
                assert roles == [message.role for message in dialogue]
                assert "observation" not in roles


def test_no_held_out_question_is_learned() -> None:
    held_out = {dialogues.letters(item["turns"][-1]) for item in items() if len(item["turns"]) == 1}
    messages = itertools.chain(*itertools.islice(dialogues.dialogues(1, True), 5000))
    asked = {dialogues.letters(message.content) for message in messages if message.role == "user"}
    assert len(asked) > 8000
    assert not asked & held_out


def test_every_intent_has_one_answer_and_many_phrasings_in_both_languages() -> None:
    for intent, answers in corpus.INTENTS.items():
        assert set(answers) == {"en", "zh"}, intent
        for lang in corpus.LANGUAGES:
            rng = random.Random(0)
            turns = [corpus.intent_turn(intent, lang, rng) for _ in range(400)]
            assert len({turn[0].content for turn in turns}) > 60, (intent, lang)
            assert {turn[1].content for turn in turns} == {answers[lang]}
    texts = [answer for answers in corpus.INTENTS.values() for answer in answers.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (corpus.add(37, 48), "37+48=70+15=85"),
        (corpus.add(4, 5), "4+5=9"),
        (corpus.subtract(72, 48), "72-48=(60-40)+(12-8)=20+4=24"),
        (corpus.multiply(47, 6), "47×6=240+42=282"),
        (corpus.multiply(6, 47), "6×47=240+42=282"),
        (corpus.convert(3, 1000, "km", "m", "en"), "3 km = 3000 m"),
        (corpus.convert(47, 24, "天", "小时", "zh"), "47天=40×24+7×24=960+168=1128小时"),
    ],
)
def test_worked_steps(text: str, value: str) -> None:
    assert text == value


def test_worked_steps_are_true() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        low, high = sorted((a, b))
        for text, result in (
            (corpus.add(a, b), a + b),
            (corpus.subtract(high, low), high - low),
            (corpus.multiply(a, b), a * b),
        ):
            if "×" in text and min(a, b) > 9:
                continue  # outside of what is taught
            for part in text.split("=")[1:]:
                total = sum(int(term.split("-")[0]) - int([*term.split("-"), "0"][1])
                            for term in part.replace("(", "").replace(")", "").split("+"))  # fmt: skip
                assert total == result, text


def test_blanks_around_a_sign_say_nothing_about_a_question() -> None:
    rng = random.Random(0)
    for lang in corpus.LANGUAGES:
        known = [corpus.arithmetic_turn(lang, rng)[0].content for _ in range(500)]
        foreign = [corpus.foreign_turn(lang, rng)[0].content for _ in range(3000)]
        for texts in (known, foreign):
            for blank in ("", " "):
                sum_in_words = re.compile(rf"[^\W\d].*\d{blank}[-+*×]{blank}\d")
                assert any(sum_in_words.search(text) for text in texts), (lang, blank)


def test_plain_wordings_are_frequent() -> None:
    rng = random.Random(0)
    for intent, lang, plain in (("joke", "en", "tellmeajoke"), ("quit", "zh", "怎么退出"), ("hello", "zh", "你好")):
        asked = [dialogues.letters(corpus.intent_turn(intent, lang, rng)[0].content) for _ in range(2000)]
        assert asked.count(plain) > 10, intent


def test_templates() -> None:
    rng = random.Random(0)
    texts = {expand("a [b|c [d|]|] {x}", rng, {"x": lambda _: "y"}) for _ in range(200)}
    assert texts == {"a b y", "a c d y", "a c  y", "a  y"}
    with pytest.raises(ValueError, match="not closed"):
        parse("a [b")
    for name in ("en", "zh", "foreign_en", "foreign_zh"):
        for lines in read(name).values():
            for line in lines:
                parse(line)


def test_a_call_is_of_an_offered_tool_with_its_arguments() -> None:
    """Also under other names and in ChatGLM3's own dialect, whatever the language and the order of the tools."""
    called: set[str] = set()
    numbers: set[int] = set()
    for dialogue in itertools.islice(dialogues.dialogues(3, True), 3000):
        offered = {tool["name"]: tool for tool in dialogue[0].tools}
        numbers.add(len(offered))
        for message, following in itertools.pairwise([*dialogue, None]):
            if not message.metadata:
                continue
            assert following is None or following.role == "observation"
            tool = offered[message.metadata]
            call = parse_call(message.metadata, message.content)
            assert "error" not in call
            schema = tool.get("parameters", {})
            names = [one["name"] for one in tool["params"]] if "params" in tool else [*schema.get("properties", schema)]
            assert list(call["parameters"]) == (names if call["parameters"] else [])
            called.add(message.metadata)
    assert called >= set(tool_turns.TOOLS) and numbers == {0, 1, 2, 3, 4, 5}


def test_a_question_that_no_offered_tool_is_for_is_answered_as_without_tools() -> None:
    rng = random.Random(0)
    for kinds in (["get_weather"], ["calculate", "get_date"], list(tool_turns.TOOLS)):
        offered = [tool_turns.offer(kind, rng) for kind in kinds]
        turns = [tool_turns.plain_turn(offered, lang, rng) for lang in corpus.LANGUAGES for _ in range(200)]
        assert all(not message.metadata for turn in turns for message in turn)
        asked = [turn[0].content.lower() for turn in turns]
        if "get_weather" in kinds:
            assert not any("weather" in question or "天气" in question for question in asked)
        else:
            assert any("weather" in question or "天气" in question for question in asked)


def test_the_tools_are_those_that_are_built_in() -> None:
    from chatglm.tools import BUILT_IN

    assert {tool.name: tool.describe() for tool in BUILT_IN}.items() <= tool_turns.TOOLS.items()


# --------------------------------------------------------------------------------------------------- what is learned


def test_dialogues_are_encoded_as_chat_encodes_them(demo) -> None:
    _, tokenizer = demo
    version = tokenizer.chatglm_version
    encoder = Encoder(tokenizer, random.Random(0))
    for dialogue in itertools.islice(dialogues.dialogues(5, version == 3), 200):
        example = next(iter(encoder.examples(dialogue)))
        if version == 3:
            history = [
                {"role": m.role, "content": m.content, "metadata": m.metadata} | ({"tools": m.tools} if m.tools else {})
                for m in dialogue[:-2]
            ]
            query = dialogue[-2]
            expected = encode_conversation(tokenizer, query.content, validate_history(3, history), query.role)
        else:
            contents = [m.content for m in dialogue]
            answers = example.ids[example.learned.index(True) :]
            pairs = list(zip(contents[::2], contents[1::2], strict=True))
            expected = next(
                ids
                for index, (query, _) in enumerate(pairs)
                if len(ids := encode_conversation(tokenizer, query, pairs[:index])) + len(answers) == len(example.ids)
                and ids == example.ids[: len(ids)]
            )
        assert example.ids[: len(expected)] == expected
        assert all(example.learned[len(expected) :])
        assert not example.learned[len(expected) - 1]


def test_batches_hold_what_they_may(demo) -> None:
    _, tokenizer = demo
    for batch in itertools.islice(batches(tokenizer, 0, 1024), 5):
        assert batch.ids.shape == batch.learned.shape
        assert batch.ids.numel() <= 1024 or len(batch.ids) == 1
        assert batch.learned.any(dim=1).all()
        assert int(batch.ids.max()) < len(tokenizer)


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("version", [1, 3])
def test_checkpoint_files(version: int) -> None:
    names = {path.name for path in FOLDERS[version].iterdir()}
    vocabulary = {1: "ice_text.model", 3: "tokenizer.model"}[version]
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json", vocabulary} <= names
    assert (FOLDERS[version] / "model.safetensors").stat().st_size < MEGABYTES * 1e6


def test_checkpoint_is_half_precision_and_fit_for_quantisation(demo) -> None:
    model, _ = demo
    stored = load_file(FOLDERS[model.config.chatglm_version] / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 32 == 0 and module.out_features % 32 == 0, name


@pytest.mark.parametrize(
    "text", ["你好，世界！", "a \"b\" 'c' {d}", "```python\nx = 1\n```", "龘 🐱", "37×48=85", "x  y"]
)
def test_texts_come_back_from_the_tokenizer(demo, text: str) -> None:
    _, tokenizer = demo
    assert same(tokenizer.decode(tokenizer.encode_text(text)), text)


QUESTIONS = [
    ("en", ["Hello"], {"intent": "hello"}),
    ("zh", ["你好"], {"intent": "hello"}),
    ("en", ["Who are you?"], {"intent": "who_are_you"}),
    ("zh", ["你是谁？"], {"intent": "who_are_you"}),
    ("en", ["How do I quit?"], {"intent": "quit"}),
    ("zh", ["怎么加载真正的模型？"], {"intent": "load_weights"}),
    ("en", ["What is 37 plus 48?"], {"number": 85}),
    ("zh", ["12乘以7等于多少？"], {"number": 84}),
    ("zh", ["3公里等于多少米？"], {"number": 3000}),
    ("en", ["Translate into Chinese: I like apples"], {"translation": "我喜欢苹果"}),
    ("zh", ["我叫王小明", "我叫什么名字？"], {"contains": "王小明"}),
    ("en", ["My name is Tom", "Thanks", "What is my name?"], {"contains": "Tom"}),
    ("en", ["What is the capital of France?"], {"refusal": True}),
    ("zh", ["法国的首都是哪里？"], {"refusal": True}),
]


@pytest.mark.parametrize(("lang", "turns", "check"), QUESTIONS, ids=[turns[-1] for _, turns, _ in QUESTIONS])
def test_canonical_questions(demo, lang: str, turns: list[str], check: dict) -> None:
    model, tokenizer = demo
    history: list = []
    for turn in turns:
        answer, history = model.chat(tokenizer, turn, history=history, do_sample=False, max_new_tokens=100)
    assert is_right(check, lang, answer), answer


def test_weather_tool() -> None:
    model, tokenizer = chatglm.load(str(FOLDERS[3]), device="cpu", dtype="float32")
    history = [{"role": "system", "content": "Answer the following questions as best as you can. You have access to "
                "the following tools:", "tools": [tool_turns.TOOLS["get_weather"]]}]  # fmt: skip
    call, history = model.chat(tokenizer, "What is the weather in Paris?", history=history, do_sample=False)
    assert call == {"name": "get_weather", "parameters": {"city": "Paris"}}
    answer, _ = model.chat(
        tokenizer, '{"temperature": 21, "weather": "sunny"}', history=history, role="observation", do_sample=False
    )
    assert answer == "The weather in Paris: sunny, 21 degrees."


def test_what_is_the_demo(tmp_path: Path) -> None:
    assert all(is_demo(folder) for folder in FOLDERS.values())
    assert is_demo(FOLDERS[3].parent / ".." / "demo" / "chatglm3-demo")
    link = tmp_path / "link"
    link.symlink_to(FOLDERS[1], target_is_directory=True)
    assert is_demo(link)
    assert not any(map(is_demo, (tmp_path, "THUDM/chatglm3-6b", FOLDERS[3].parent)))
    for generation, name in ((1, "ice_text.model"), (2, "tokenizer.model"), (3, "tokenizer.model")):
        assert (with_vocabulary_of(generation) / name).is_file()
