"""`python -m tools.engines [NAME ...]` runs other engines over the exported demo: are 24 greedy answers ours?

Each engine is installed in an environment of its own, in a folder that is removed at the end or, with `--work`, kept
for the next time. Prints a row per engine; `--write` puts the rows into the table of docs/serving.md. The exit status
is 1 if an engine cannot be installed or does not answer; answers that differ are a result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm.demo import FOLDERS
from chatglm.exports.environments import alone, environment
from tools.engines import table
from tools.engines.known import ENGINES, ENVIRONMENTS, Engine
from tools.engines.servers import Server, ask_all
from tools.lock import ROOT

DEMO = FOLDERS[3]
TOKENS = 64  # more than the demo's answers have


class Failed(Exception):
    """An engine does not run here; the message says why."""


def questions() -> list[str]:
    """24 of the demo's held-out questions: ten that it knows and two that it does not, in each language."""
    chosen: list[str] = []
    for name, count in (("scope", 10), ("foreign", 2)):
        path = ROOT / "tools" / "demo" / "evaluation" / f"{name}.jsonl"
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for language in ("zh", "en"):
            single = [one for one in items if one["lang"] == language and len(one["turns"]) == 1 and not one["tools"]]
            chosen += [one["turns"][0] for one in single[:: len(single) // count][:count]]
    return chosen


def prompt_ids(asked: Sequence[str]) -> list[Any]:
    """The token ids of chats that begin with these questions, each of shape (1, length)."""
    import chatglm

    tokenizer = chatglm.ChatGLMTokenizer.from_pretrained(DEMO)
    return [tokenizer.build_chat_input(question)["input_ids"] for question in asked]


def own_answers(asked: Sequence[str], bits: int | None) -> list[str]:
    """This project's greedy answers in float32, from weights of so many bits if any, without what `chat` tidies up."""
    import torch

    import chatglm

    model, tokenizer = chatglm.load(DEMO, "cpu", "float32", quantize=bits)
    stops = tokenizer.chat_format.stop_token_ids(tokenizer)
    answers = []
    for ids in prompt_ids(asked):
        with torch.inference_mode():
            new = model.generate(ids, do_sample=False, max_new_tokens=TOKENS)[0, ids.shape[1] :].tolist()
        answers.append(tokenizer.decode([token for token in new if token not in stops], skip_special_tokens=True))
    return answers


def checkpoint(name: str, work: Path) -> Path:
    """What an engine reads, by its name in `known.py`, made in `work` if it is not there."""
    if name == "demo":
        return DEMO
    path, source, arguments = work / name, DEMO, ["--to", *name.removesuffix(".gguf").split("-")]
    if not path.exists():
        kind, *types = arguments[1:]
        if types and types[0].startswith("ours"):  # INT4 or INT8 of this project, whose values a GGUF file keeps
            source, types = _quantized(int(types[0].removeprefix("ours")), work), []
        options = ["--type", *types] if types else []
        options += ["--environment", str(work / "environments" / "optimum")] if kind == "openvino" else []
        command = [sys.executable, "-m", "chatglm.export", str(source), str(path), "--to", kind, *options]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise Failed(f"{' '.join(command[2:])} failed")
    return path


def _quantized(bits: int, work: Path) -> Path:
    import chatglm

    folder = work / f"demo-int{bits}"
    if not folder.exists():
        model, tokenizer = chatglm.load(DEMO, quantize=bits)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def installed(engine: Engine, work: Path) -> Path:
    """The folder of the programs of the engine's environment."""
    wanted = ENVIRONMENTS[engine.environment]
    programs = environment(
        work / "environments" / engine.environment, wanted.requirements, wanted.without,
        told=lambda: print(f"installing {' '.join(wanted.requirements)}", file=sys.stderr, flush=True),
    )  # fmt: skip
    if engine.with_project:
        from tools.wheel import build

        with tempfile.TemporaryDirectory() as folder:
            pip = [str(programs / "python"), "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall"]
            subprocess.run([*pip, str(build(Path(folder))[1])], check=True, env=alone(), stdout=sys.stderr)
    return programs


def version(programs: Path, package: str) -> str:
    """The release of a package in an environment."""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run(
        [str(programs / "python"), "-c", code], check=True, env=alone(), capture_output=True, text=True
    ).stdout.strip()


def answers_of(engine: Engine, programs: Path, path: Path, asked: Sequence[str], work: Path) -> list[str]:
    """The engine's greedy answers."""
    if engine.script:
        script, *more = engine.script
        command = [str(programs / "python"), str(Path(__file__).parent / script), str(path), str(TOKENS), *more]
        prompts = json.dumps({"text": asked, "ids": [ids.tolist()[0] for ids in prompt_ids(asked)]})
        done = subprocess.run(
            command, input=prompts, stdout=subprocess.PIPE, text=True, env=alone(), check=False
        )
        if done.returncode != 0:
            raise Failed(f"{engine.name}: the lines above say why")
        answers: list[str] = json.loads(done.stdout.splitlines()[-1])
        return answers
    with Server(engine, programs, path, work / f"{engine.name}.log") as server:
        return ask_all(server.url, server.model, asked, TOKENS)


def run(engine: Engine, asked: Sequence[str], work: Path) -> dict[str, str]:
    """Runs one engine; returns its row."""
    path = checkpoint(engine.reads, work)
    programs = installed(engine, work)
    theirs = answers_of(engine, programs, path, asked, work)
    ours = own_answers(asked, engine.bits)
    same = 0
    for question, one, other in zip(asked, theirs, ours, strict=True):
        if one.strip() == other.strip():
            same += 1
        else:
            print(f"{engine.name}: {question!r} -> {one!r}, here {other!r}", file=sys.stderr)
    release, today = version(programs, engine.package), str(datetime.date.today())
    return table.row(engine.title, release, engine.shown, f"{same} / {len(asked)}", today)


def main(arguments: Sequence[str] | None = None) -> int:
    known: dict[str, Any] = {engine.name: engine for engine in ENGINES}
    parser = argparse.ArgumentParser(
        prog="python -m tools.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keeps environments and exports here (gigabytes)")
    parser.add_argument("--write", action="store_true", help="write the rows into the table of docs/serving.md")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"unknown engine: {', '.join(unknown)}")
    asked, status = questions(), 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder) if options.work is None else options.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.names or known:
            try:
                rows = run(known[name], asked, work)
            except (Failed, OSError, RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                status = 1
                continue
            print(*rows.values(), sep="\n", flush=True)
            if options.write:
                table.write(rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
