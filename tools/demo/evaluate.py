"""Measures a demo checkpoint: `python -m tools.demo.evaluate FOLDER`.

Asks the questions of `evaluation/*.jsonl`, which were written without sight of the phrase files, through `chat()` as a
user would, and compares the answers with the expected ones.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoints.atomic import write_file
from chatglm.loading import load

from . import corpus, tool_turns

FOLDER = Path(__file__).parent / "evaluation"


def items(files: Iterable[Path] | None = None) -> list[dict[str, Any]]:
    """The questions of the held-out sets, in the order of the files."""
    paths = sorted(FOLDER.glob("*.jsonl")) if files is None else files
    return [
        json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
    ]


def same(one: str, other: str) -> bool:
    """Equal except for the width of punctuation, which generation 1's vocabulary does not keep."""
    return unicodedata.normalize("NFKC", one).strip() == unicodedata.normalize("NFKC", other).strip()


def _letters(text: str) -> str:
    return "".join(sign for sign in unicodedata.normalize("NFKC", text).lower() if sign.isalnum())


def _is_argument(wanted: Any, given: Any) -> bool:
    """Whether an argument is the one wanted, or one of them; case and blanks do not matter."""
    if isinstance(wanted, list):
        return any(_is_argument(one, given) for one in wanted)
    if isinstance(wanted, str):
        return isinstance(given, str) and "".join(given.lower().split()) == "".join(wanted.lower().split())
    return not isinstance(given, bool) and bool(given == wanted)


def is_right(check: dict[str, Any], lang: str, answer: Any) -> bool:
    """Whether an answer (text, or a tool call as `chat` gives it) passes a check.

    Raises:
        ValueError: an unknown kind of check.
    """
    if "tool" in check:
        arguments = {key: value for key, value in check["tool"].items() if key != "name"}
        if not isinstance(answer, dict) or answer.get("name") != check["tool"]["name"]:
            return False
        given = answer.get("parameters") or {}
        return given.keys() == arguments.keys() and all(_is_argument(arguments[key], given[key]) for key in given)
    if not isinstance(answer, str):
        return False
    if "intent" in check:
        return same(answer, corpus.INTENTS[check["intent"]][lang])
    if "refusal" in check:
        return same(answer, corpus.REFUSAL[lang])
    if "number" in check:
        numbers = re.findall(r"\d+", answer)
        return bool(numbers) and int(numbers[-1]) == check["number"]
    if "contains" in check:
        wanted = check["contains"] if isinstance(check["contains"], list) else [check["contains"]]
        return all(str(part).lower() in answer.lower() for part in wanted)
    if "translation" in check:
        wanted = check["translation"] if isinstance(check["translation"], list) else [check["translation"]]
        return any(_letters(text) == _letters(answer) for text in wanted)
    raise ValueError(f"unknown check {sorted(check)}")


def ask(model: Any, tokenizer: Any, item: dict[str, Any], **options: Any) -> Any:
    """The answer to the last turn of an item; the answers before it are the model's own."""
    history: list[Any] = []
    if offered := item.get("tools"):
        names = ["get_weather"] if offered is True else offered
        tools = [tool_turns.TOOLS[name] for name in names]
        history = [{"role": "system", "content": tokenizer.chat_format.tools_system_prompt, "tools": tools}]
    answer: Any = None
    for turn in item["turns"]:
        role = "user"
        if isinstance(turn, dict):
            role, turn = turn.get("role", "user"), turn["content"]
        extra = {"role": role} if role != "user" else {}
        answer, history = model.chat(tokenizer, turn, history=history, max_new_tokens=120, **extra, **options)
    if "observation" in item:
        result = item["observation"]
        answer, _ = model.chat(
            tokenizer,
            result if isinstance(result, str) else json.dumps(result, ensure_ascii=False),
            history=history,
            role="observation",
            max_new_tokens=120,
            **options,
        )
    return answer


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, questions: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """The items with their answers and whether those are right; without tool items if the model knows no tools."""
    results = []
    for item in questions:
        if item.get("tools") and not tokenizer.chat_format.knows_tools:
            continue
        answer = ask(model, tokenizer, item, **options)
        results.append({**item, "answer": answer, "right": is_right(item["check"], item["lang"], answer)})
    return results


def shares(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Right answers by kind, language and intent."""

    def share(of: list[dict[str, Any]]) -> dict[str, Any]:
        right = sum(result["right"] for result in of)
        return {"right": right, "of": len(of), "percent": round(100 * right / len(of), 1)}

    table: dict[str, Any] = {}
    for kind in ("scope", "foreign", "tools"):
        chosen = [result for result in results if result["kind"] == kind]
        if not chosen:
            continue
        table[kind] = share(chosen)
        for lang in corpus.LANGUAGES:
            table[f"{kind} {lang}"] = share([result for result in chosen if result["lang"] == lang])
    intents = sorted({result["intent"] for result in results if not result["right"]})
    table["wrong by intent"] = {
        intent: sum(not result["right"] for result in results if result["intent"] == intent) for intent in intents
    }
    return table


def evaluate_folder(folder: Path, sampled: bool = True, files: Iterable[Path] | None = None) -> dict[str, Any]:
    """Greedy results, and one run with the sampling defaults of `chat`."""
    model, tokenizer = load(str(folder), device="cpu", dtype="float32")
    questions = items(files)
    start = time.monotonic()
    greedy = evaluate(model, tokenizer, questions, do_sample=False)
    table = {"generation": tokenizer.chatglm_version, "greedy": shares(greedy)}
    table["seconds"] = round(time.monotonic() - start)
    if sampled:
        torch.manual_seed(0)
        table["sampled"] = shares(evaluate(model, tokenizer, questions))
    table["wrong"] = [
        {key: result[key] for key in ("id", "turns", "answer")} for result in greedy if not result["right"]
    ]
    return table


def report(table: dict[str, Any]) -> None:
    """Print a table of `evaluate_folder`."""
    for result in table["wrong"]:
        print(json.dumps(result, ensure_ascii=False))
    print(json.dumps({key: value for key, value in table.items() if key != "wrong"}, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--files", type=Path, nargs="*", help="other question files than evaluation/*.jsonl")
    parser.add_argument("--sampled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save", type=Path, help="write the results as JSON to this file")
    arguments = parser.parse_args()
    tables = {}
    for folder in arguments.folder:
        table = evaluate_folder(folder, arguments.sampled, arguments.files)
        report(table)
        tables[folder.name] = {key: value for key, value in table.items() if key != "seconds"}
    if arguments.save:
        write_file(arguments.save, json.dumps(tables, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
