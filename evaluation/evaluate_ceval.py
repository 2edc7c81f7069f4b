"""C-Eval (https://cevalbenchmark.com) as ChatGLM2-6B's repository measures it: think first, then choose.

    python evaluation/evaluate_ceval.py --model FOLDER --data CEval --output ceval.json

Reads DATA/SPLIT/**/*.jsonl, one subject per file, one question per line: `inputs_pretokenized` (the question with its
four choices) and `label` (0 to 3 for A to D). Each question is asked twice: the model first reasons in its own words;
then the prompt is question, reasoning and "综上所述，ABCD中正确的选项是：", and the most likely of A, B, C and D is the
answer. Finished subjects are kept in the output file, and an interrupted run resumes after them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # `chatglm` is there

import torch

from chatglm.checkpoints.atomic import write_file
from chatglm.front.arguments import add_model_arguments, load_from_arguments

CHOICES = ("A", "B", "C", "D")
EXTRACTION = "综上所述，ABCD中正确的选项是："


class CEvalError(ValueError):
    """The data, arguments or an earlier result cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Question:
    text: str
    label: int | None  # None: not published (test split)


@dataclass(frozen=True)
class Subject:
    name: str  # the path of the file in the split, without .jsonl
    questions: list[Question]
    digest: str  # of the file


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after a failure, 2 for wrong arguments (SystemExit), 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        _evaluate(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: finished subjects are in {args.output}, the same command resumes", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_model_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--data", default="CEval", metavar="FOLDER", help="the data set (default: %(default)s)")
    group.add_argument("--split", default="val", help="its subfolder (default: %(default)s)")
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="questions at a time (default: 8)")
    group.add_argument(
        "--max-new-tokens", type=_positive, default=512, metavar="N", help="for the reasoning (default: %(default)s)"
    )
    group.add_argument(
        "--max-length", type=_positive, default=2048, metavar="N",
        help="tokens of a prompt; longer ones lose their beginning (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions of each subject")
    group.add_argument("--output", default="ceval.json", metavar="FILE", help="the result (default: %(default)s)")
    group.add_argument("--overwrite", action="store_true", help="start from scratch if the output file exists")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _evaluate(args: argparse.Namespace) -> None:
    subjects = read_subjects(Path(args.data), args.split, args.limit)
    output = Path(args.output)
    settings = {
        "model": args.model, "revision": args.revision, "adapter": args.adapter, "dtype": args.dtype,
        "quantize": args.quantize, "split": args.split, "max_new_tokens": args.max_new_tokens,
        "max_length": args.max_length, "limit": args.limit,
    }  # fmt: skip
    done = {} if args.overwrite else read_result(output, settings)
    results = {
        subject.name: done[subject.name]
        for subject in subjects
        if subject.name in done and done[subject.name]["digest"] == subject.digest
    }
    left = [subject for subject in subjects if subject.name not in results]
    if results:
        print(f"{output} has {len(results)} of {len(subjects)} subjects already")
    if left:
        write_result(output, settings, results)  # if it cannot be written, fail before the model loads
        model, tokenizer = load_from_arguments(args)
        runner = Runner(model, tokenizer, args.batch_size, args.max_new_tokens, args.max_length)
        for subject in left:
            started = time.monotonic()
            results[subject.name] = runner.measure(subject)
            write_result(output, settings, {one.name: results[one.name] for one in subjects if one.name in results})
            print(f"{subject.name}: {_share(results[subject.name])}, {time.monotonic() - started:.0f} s", flush=True)
    for name, group in summary(results).items():
        print(f"{name}: {_share(group)}")
    print(f"result: {output}")


def _share(found: dict[str, Any]) -> str:
    if not found["counted"]:
        return f"{found['questions']} questions, none with a label"
    return f"accuracy {found['correct'] / found['counted']:.2%} ({found['correct']} of {found['counted']})"


# ---- files -----------------------------------------------------------------------------------------------------------


def read_subjects(data: Path, split: str, limit: int | None = None) -> list[Subject]:
    """All subjects of a split, sorted by name. Raises CEvalError with file and line."""
    folder = data.expanduser() / split
    if not folder.is_dir():
        there = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        found = f"it has {', '.join(there)}" if there else "unpack C-Eval's CEval.zip, or name its folder with --data"
        raise CEvalError(f"there is no folder {folder}: {found}")
    paths = sorted(folder.rglob("*.jsonl"))
    if not paths:
        raise CEvalError(f"{folder} holds no .jsonl file")
    return [_read_subject(path, path.relative_to(folder).with_suffix("").as_posix(), limit) for path in paths]


def _read_subject(path: Path, name: str, limit: int | None) -> Subject:
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CEvalError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise CEvalError(f"{path} holds no questions")
    return Subject(name, questions[:limit], hashlib.sha256(raw).hexdigest())


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CEvalError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("inputs_pretokenized"), str):
        raise CEvalError(f"{where}: there is no text inputs_pretokenized, which holds the question")
    label = row.get("label")
    if label == -1:  # the hidden answers of the test split
        label = None
    if label is not None and (isinstance(label, bool) or label not in range(4)):
        raise CEvalError(f"{where}: label is {label!r}, not 0, 1, 2 or 3 for A, B, C or D")
    return Question(row["inputs_pretokenized"], label)


def read_result(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The subjects of an earlier run. Raises CEvalError if it had other settings or is not a result file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, subjects = dict(content["settings"]), dict(content["subjects"])
    except (ValueError, KeyError, TypeError) as error:
        raise CEvalError(f"{path} is no result of this program: name another --output, or --overwrite it") from error
    changed = [f"{key} was {before.get(key)!r}" for key, value in settings.items() if before.get(key) != value]
    if changed:
        raise CEvalError(
            f"{path} was measured with other settings ({', '.join(changed)}): name another --output, or --overwrite it"
        )
    return subjects


def write_result(path: Path, settings: dict[str, Any], subjects: dict[str, Any]) -> None:
    """Writes the results; the file is complete at any time."""
    content = {"settings": settings, "summary": summary(subjects), "subjects": subjects}
    write_file(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def summary(subjects: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each group of subjects (the folder they are in) and "total", weighted by the number of questions."""
    groups: dict[str, list[Any]] = {}
    for name, found in subjects.items():
        if "/" in name:
            groups.setdefault(name.partition("/")[0], []).append(found)
    groups["total"] = list(subjects.values())
    return {name: _add(found) for name, found in groups.items()}


def _add(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(one[key] for one in found) for key in ("questions", "counted", "correct")}
    return sums | {"accuracy": sums["correct"] / sums["counted"] if sums["counted"] else None}


# ---- the two passes --------------------------------------------------------------------------------------------------


class Runner:
    """Asks a model the questions of a subject.

    Raises:
        CEvalError: the tokenizer cannot tell A, B, C and D apart, or the lengths do not fit the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 8, max_new_tokens: int = 512, max_length: int = 2048
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.chat_format = tokenizer.chat_format
        self.before_choice, self.choice_ids = _choice_ids(tokenizer)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """The numbers of all, of labelled and of correctly answered questions, and the chosen letters in order."""
        texts = [question.text for question in subject.questions]
        thoughts = self.reason(texts)
        chosen = self.choose([f"{text}{thought}\n{EXTRACTION}" for text, thought in zip(texts, thoughts, strict=True)])
        labels = [question.label for question in subject.questions]
        pairs = [(label, one) for label, one in zip(labels, chosen, strict=True) if label is not None]
        return _add([{"questions": len(texts), "counted": len(pairs), "correct": sum(a == b for a, b in pairs)}]) | {
            "answers": "".join(CHOICES[one] for one in chosen),
            "digest": subject.digest,
        }

    def reason(self, texts: Sequence[str]) -> list[str]:
        """The model's greedy answers."""
        answers = [""] * len(texts)
        for places, ids, mask in self._batches([self.prompt(text) for text in texts]):
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids, attention_mask=mask, max_length=ids.shape[1] + self.max_new_tokens,
                    do_sample=False, eos_token_id=self.chat_format.stop_token_ids(self.tokenizer),
                    pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
            for place, row in zip(places, made[:, ids.shape[1] :].tolist(), strict=True):
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                answers[place] = str(self.chat_format.parse(text).content)
        return answers

    def choose(self, texts: Sequence[str]) -> list[int]:
        """For each text 0 to 3: the choice that is most likely as the first word of the answer."""
        chosen = [0] * len(texts)
        for places, ids, mask in self._batches([[*self.prompt(text), *self.before_choice] for text in texts]):
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
            for place, best in zip(places, logits[:, -1, self.choice_ids].float().argmax(-1).tolist(), strict=True):
                chosen[place] = best
        return chosen

    def prompt(self, text: str) -> list[int]:
        """The prompt of a question without history, in `max_length` tokens: a longer text loses its beginning."""
        ids = self.chat_format.encode(self.tokenizer, text)
        while len(ids) > self.max_length:
            if not text:
                raise CEvalError(f"--max-length {self.max_length} is too short for the prompt of an empty question")
            # Cuts by the share of excess tokens, at least one character, so that a few rounds are enough.
            text = text[max(1, len(text) * (len(ids) - self.max_length) // len(ids)) :]
            ids = self.chat_format.encode(self.tokenizer, text)
        return ids

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """(places, ids, mask) with padding on the left, the longest prompts first: little padding, errors early."""
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            longest = len(prompts[places[0]])
            rows = [[self.tokenizer.pad_token_id] * (longest - len(prompts[one])) + prompts[one] for one in places]
            mask = [[0] * (longest - len(prompts[one])) + [1] * len(prompts[one]) for one in places]
            device = self.model.device
            yield places, torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _choice_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids before the letter of an answer (the same for all four), and the four ids that differ."""
    start = tokenizer.chat_format.answer_start(tokenizer)
    encoded = [tokenizer.encode_text(choice) for choice in CHOICES]
    common = 0
    while all(len(ids) > common and ids[common] == encoded[0][common] for ids in encoded):
        common += 1
    letters = [ids[common] for ids in encoded if len(ids) > common]
    if len(set(letters)) != len(CHOICES):
        raise CEvalError("the tokenizer cannot tell A, B, C and D apart")
    return [*start, *encoded[0][:common]], letters


if __name__ == "__main__":
    sys.exit(main())
