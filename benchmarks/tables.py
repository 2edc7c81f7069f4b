"""All tables of the READMEs: `python -m benchmarks.tables`, with `--write` to put them there.

Measures decoding and llama.cpp in turns (`decode_6b`, `llama_cpp_6b`), the server (`serving`), guessing ahead
(`guessing`) and the products of the kernels beside torch's (`matrices`), prints each table in Markdown and, with
`--write`, replaces the region of that name in README.md and README_zh.md, in their languages. Under each table stand
the CPU, the date, and the peers that were not found. Use `--table` for some of them, `--quick` for few turns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import io
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import guessing, matrices, serving
from benchmarks.turns import Program
from chatglm.kernels import cpu
from chatglm.serving.chat_engine import ChatEngine

ROOT = Path(__file__).resolve().parents[1]
READMES = (ROOT / "README.md", ROOT / "README_zh.md")  # English and Chinese, as in every `Text`
Text = tuple[str, str]

#: What decodes, in turns with llama.cpp: a name and the arguments of `decode_6b`.
DECODERS: list[tuple[Text, str]] = [
    (("ChatGLM2-6B, ChatGLM3-6B", "ChatGLM2-6B、ChatGLM3-6B"), "--generation 3"),
    (("the same, `precision=\"int8\"`", "同上，`precision=\"int8\"`"), "--generation 3 --precision int8"),
    (("the same at 4,096 tokens", "同上，4,096 个词元处"), "--generation 3 --context 4096 --random-cache"),
    (("the same, output head INT4 too", "同上，输出头也为 INT4"), "--generation 3 --head 4"),
    (("ChatGLM-6B", "ChatGLM-6B"), "--generation 1"),
    (("ChatGLM-6B, output head INT4 too", "ChatGLM-6B，输出头也为 INT4"), "--generation 1 --head 4"),
]
LLAMA: Text = ("llama.cpp, Q4_0 with a Q4_0 head", "llama.cpp，Q4_0，输出头 Q4_0")


@dataclass
class Table:
    """A table in both languages, and what to know about it."""

    title: Text
    columns: list[Text]
    rows: list[list[str | Text]]
    notes: list[Text] = field(default_factory=list)

    def markdown(self, language: int) -> str:
        """In English (0) or Chinese (1)."""
        cells = [[one[language] for one in self.columns], ["---"] * len(self.columns)]
        cells += [[one if isinstance(one, str) else one[language] for one in row] for row in self.rows]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        end = ("; ", "；")[language].join(note[language] for note in self.notes) + (".", "。")[language]
        return "\n".join([self.title[language] + (":", "：")[language], "", *lines, "", end])


@dataclass(frozen=True)
class Settings:
    size: str
    turns: int
    llama: str | None
    folder: Path


def decode(settings: Settings) -> Table:
    """Tokens per second of whole models, INT4."""
    tiny = settings.size == "tiny"
    table = Table(
        ("Decoding, INT4, random weights, 64 tokens of context unless said",
         "解码，INT4，随机权重，未注明时上下文为 64 个词元"),
        [("", ""), ("tokens/s", "词元/秒"), ("share of a loop that only reads the weights", "与只读权重的循环之比"),
         ("times llama.cpp (least to most)", "与 llama.cpp 之比（最小至最大）")],
        [],
    )  # fmt: skip
    peer = None
    if settings.llama and not tiny:
        script = shlex.quote(str(ROOT / "benchmarks" / "llama_cpp_6b.py"))
        file = shlex.quote(str(settings.folder / "chatglm3-6b-q4_0.gguf"))
        peer = f"{settings.llama} {script} {file} --turns"
    else:
        missing = "llama.cpp was left out: not found, see `--llama-cpp`"
        table.notes.append((missing, "未与 llama.cpp 比较：没有找到，见 `--llama-cpp`"))
    theirs: list[float] = []
    for name, arguments in DECODERS[:2] if tiny else DECODERS:
        ours = f"{shlex.quote(sys.executable)} -m benchmarks.decode_6b --turns {arguments}{' --tiny' if tiny else ''}"
        programs = take_turns([ours, *([peer] if peer else [])], settings.turns)
        cells: list[str | Text] = [name, speed(programs[0].turns), f"{statistics.median(programs[0].shares):.2f}", ""]
        if peer and "--context" not in arguments:
            theirs += programs[1].turns
            ratios = sorted(b / a for a, b in zip(programs[0].turns, programs[1].turns, strict=True))
            cells[3] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        table.rows.append(cells)
    if theirs:
        table.rows.append([LLAMA, speed(theirs), "", "1"])
    table.notes.append((f"{settings.turns} turns of six tokens", f"每六个词元轮换，共 {settings.turns} 轮"))
    return table


def speed(milliseconds: Sequence[float]) -> str:
    return f"{1e3 / statistics.median(milliseconds):.1f}"


def take_turns(commands: list[str], turns: int) -> list[Program]:
    """Runs programs in turns of a few tokens, see `benchmarks.turns`."""
    programs = [Program(command) for command in commands]
    try:
        for program in programs:
            program.wait()
        for _ in range(turns):
            for program in programs:
                program.turn()
    finally:
        for program in programs:
            program.end()
    return programs


def clients(settings: Settings) -> Table:
    """The server with one client and with 16."""
    tiny = settings.size == "tiny"
    count, tokens = (3, 4) if tiny else (16, 16 * settings.turns)
    model, tokenizer = serving.make_model(3, "tiny" if tiny else "300m", "float32")
    running = serving.Running(ChatEngine(model, tokenizer, max_batch=count))
    questions = serving.prompts(count)
    try:
        serving.measure(running.url, "warm-up", questions[:1], 2, 1)
        found = [serving.measure(running.url, name, questions, tokens, at_once)
                 for name, at_once in (("one after another", 1), (f"{count} at once", count))]  # fmt: skip
    finally:
        running.stop()
    same = sum(a == b for a, b in zip(found[0].texts, found[1].texts, strict=True))
    millions = model.num_parameters() / 1e6
    return Table(
        (f"The server, {millions:.0f}M random weights, float32, answers of {tokens} tokens",
         f"服务器，{millions:.0f}M 个随机权重，float32，每个回答 {tokens} 个词元"),
        [("clients", "客户端"), ("tokens/s", "词元/秒"),
         ("ms to the first token, median / p99", "首个词元毫秒，中位数 / p99"),
         ("ms between tokens, median / p99", "词元间隔毫秒，中位数 / p99")],
        [[(name, chinese), f"{one.rate:.1f}", one.first, one.between] for one, name, chinese in
         zip(found, ("one after another", f"{count} at once"), ("逐个", f"{count} 个同时"), strict=True)],
        [(f"{found[1].rate / found[0].rate:.1f} times the speed; {same} of {count} answers are equal",
          f"速度 {found[1].rate / found[0].rate:.1f} 倍；{count} 个回答中 {same} 个相同")],
    )  # fmt: skip


def lookup(settings: Settings) -> Table:
    """Answers with and without prompt lookup."""
    model, tokenizer = serving.make_model(3, "tiny" if settings.size == "tiny" else "small", "float32")
    names = {"a summary": "摘要", "edited code": "改写代码", "a text about something else": "无关的文本"}
    rows: list[list[str | Text]] = []
    for name in guessing.TASKS:
        cells, _ = guessing.compare(model, tokenizer, name, settings.turns, 10)
        rows.append([(name, names[name]), *cells[1:]])
    columns = [("answer", "回答"), ("tokens of the prompt", "提示词元"), ("of the answer", "回答词元"),
               ("tokens/s", "词元/秒"), ("with lookup", "开启查找"),
               ("ratio, least / median / most", "比值，最小 / 中位数 / 最大"),
               ("tokens per forward", "每次前向的词元")]  # fmt: skip
    title = (f"Prompt lookup, {model.num_parameters() / 1e6:.0f}M random weights, float32",
             f"提示查找，{model.num_parameters() / 1e6:.0f}M 个随机权重，float32")  # fmt: skip
    return Table(title, columns, rows, [(f"{settings.turns} turns", f"{settings.turns} 轮")])


def products(settings: Settings) -> Table:
    """The products of the kernels, beside memory and torch."""
    tiny = settings.size == "tiny"
    rows: list[list[str | Text]] = []
    kernels = [*matrices.ours(cpu.load()), *matrices.peers()]
    for bits in (4, 8, 16):
        for count in (1, 8):
            chosen = [kernel for kernel in kernels if kernel.bits == bits]
            generation, layers = (0, 1) if tiny else (2, 4)
            for cells in matrices.measure(cpu.load(), chosen, generation, layers, count, settings.turns):
                rows.append([cells[index] for index in (0, 1, 3, 4, 5, 6, 9)])
    return Table(
        ("Products with the matrices of four layers and the head of ChatGLM2-6B and ChatGLM3-6B",
         "ChatGLM2-6B、ChatGLM3-6B 四层及输出头矩阵的乘积"),
        [("kernel", "内核"), ("rows", "行"), ("ms", "毫秒"), ("GB/s", "GB/s"), ("read loop, GB/s", "只读循环，GB/s"),
         ("share of it, least / median / most", "占比，最小 / 中位数 / 最大"), ("relative error", "相对误差")],
        rows, [(f"{settings.turns} turns", f"{settings.turns} 轮")],
    )  # fmt: skip


TABLES: dict[str, Callable[[Settings], Table]] = {
    "decode": decode, "serving": clients, "guessing": lookup, "matrices": products,
}  # fmt: skip


def machine() -> str:
    """The CPU's name with its family, and the number of threads."""
    name, family = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        text = information.read_text(encoding="utf-8", errors="replace")
        for key in ("model name", "cpu family"):
            if found := re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE):
                name, family = (found[1], family) if key == "model name" else (name, f" (family {found[1]})")
    return f"{name}{family}, {torch.get_num_threads()} threads"


def put(path: Path, name: str, text: str) -> None:
    """Replaces the region `name` of a file. Raises SystemExit if the file has no such region."""
    region = re.compile(rf"(<!-- benchmarks: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    before = path.read_text(encoding="utf-8")
    if not region.search(before):
        raise SystemExit(f"{path} has no region '<!-- benchmarks: {name} -->' … '<!-- end -->' to write to")
    after = region.sub(lambda found: f"{found[1]}{text}\n{found[2]}", before)
    aside = path.with_name(path.name + ".new")
    aside.write_text(after, encoding="utf-8")
    os.replace(aside, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), action="append", help="only this one; may be repeated")
    parser.add_argument("--turns", type=int, default=12, help="of each program (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three turns")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and README_zh.md")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--folder", type=Path, help="keeps llama.cpp's file of 3.4 GB (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the command out")
    args = parser.parse_args(arguments)
    llama = args.llama_cpp
    if llama is None and all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf")):
        llama = sys.executable
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        settings = Settings(
            "tiny" if args.tiny else "6b", 3 if args.quick else args.turns, llama, args.folder or Path(temporary)
        )
        for name in args.table or TABLES:
            with contextlib.redirect_stdout(io.StringIO()):  # the tables of the single benchmarks
                table = TABLES[name](settings)
            now = f"{machine()}, {datetime.date.today()}, `python -m benchmarks.tables --table {name}`"
            table.notes.append((now, now))
            print(table.markdown(0), end="\n\n", flush=True)
            if args.write:
                for language, path in enumerate(READMES):
                    put(path, name, table.markdown(language))


if __name__ == "__main__":
    main()
