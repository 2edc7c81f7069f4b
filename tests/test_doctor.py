"""python -m chatglm.doctor: without faults, and with faults of every kind and the line that points to each."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import save_file

import chatglm
from chatglm import kernels
from chatglm.chat import CHAT_MODELS
from chatglm.checkpoints.clues import VISUAL
from chatglm.demo import FOLDERS
from chatglm.doctor import __main__ as command
from chatglm.doctor import checks, environment, versions
from chatglm.doctor.messages import DOCTOR
from chatglm.doctor.versions import Library
from chatglm.front import arguments
from chatglm.kernels import KernelUnavailable, cpu
from chatglm.kernels.__main__ import error_of
from chatglm.quantization import QuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "CHATGLM"))}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "LANG": "en_US.UTF-8", "HF_HUB_OFFLINE": "1"}
Doctor = Callable[..., SimpleNamespace]


def run_process(*given: str, program: Sequence[str] = ("-m", "chatglm.doctor"), **environment: str) -> Any:
    """The finished process, as people start it."""
    return subprocess.run(
        [sys.executable, *program, *given], stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
        env=ENVIRONMENT | environment, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """doctor(*arguments) without a new process: its output, exit status, and the lines that are not ok."""
    for name in environment.VARIABLES:
        if name.startswith("CHATGLM"):
            monkeypatch.delenv(name, raising=False)

    def call(*given: str, language: str = "en") -> SimpleNamespace:
        status = command.main(["--lang", language, *given])
        out, err = capsys.readouterr()
        wrong = [line.strip() for line in out.splitlines() if re.match(r"\s+(WRONG|错误)", line)]
        return SimpleNamespace(returncode=status, stdout=out, stderr=err, wrong=wrong)

    return call


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Runs these self-checks only."""
    for kind in ("CHECKS", "PICTURE_CHECKS"):
        monkeypatch.setattr(checks, kind, tuple(check for check in getattr(checks, kind) if check[0] in names))


# ---------------------------------------------------------------------------------------------------------- healthy


def test_a_healthy_installation() -> None:
    try:
        cpu.load()  # built once: the time of the compiler is not the doctor's
    except KernelUnavailable as reason:
        print(reason)
    before = os.times()
    done = run_process("--json")
    after = os.times()
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    report = json.loads(done.stdout)
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{report['seconds']} s by the clock, {busy:.1f} s of a processor with the start of Python")
    assert report["healthy"] is True
    assert report["wrong"] == 0
    found = [(check["generation"], check["name"]) for check in report["checks"]]
    assert found == [
        *((generation, name) for generation in FOLDERS for name, _, _ in checks.CHECKS),
        *((VISUAL, name) for name, _, _ in checks.PICTURE_CHECKS),
    ]
    assert {check["status"] for check in report["checks"]} <= {"ok", "skipped"}
    assert busy < 60  # within 15 s on an idle machine; a busy one takes longer by the clock


@pytest.mark.parametrize(("language", "words"), [("en", ("Versions", "ok")), ("zh", ("版本", "正常"))])
def test_both_languages(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, language: str, words: tuple[str, ...]) -> None:
    only(monkeypatch, "load", "tokenizer")
    done = doctor(language=language)
    assert done.returncode == 0, done.stdout
    for word in words:
        assert word in done.stdout
    assert bool(re.search("[一-龥]", done.stdout)) == (language == "zh")


def test_the_language_of_the_locale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    command.main(["--no-checks", "no-such-folder"])
    assert "没有 no-such-folder 这个文件夹" in capsys.readouterr().out


def test_texts() -> None:
    """Every text is in both languages, with the same fields, and is used."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "chatglm" / "doctor").glob("*.py"))
    built = {f"version_{state}" for state in ("ok", "newer", "older", "missing", "absent")}
    built |= {one.extra for one in versions.libraries()}
    for key, texts in DOCTOR.items():
        assert list(texts) == ["zh", "en"], key
        blanks = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts.values()]
        assert blanks[0] == blanks[1], key
        assert sources.count(f'"{key}"') > 1 or key in built, key
    assert set(re.findall(r'\bsay\(\s*"(\w+)"', sources)) <= set(DOCTOR)


def test_help_and_wrong_arguments_need_no_libraries(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "packaging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = run_process("--help", PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FOLDER" in done.stdout
    assert run_process("--lang", "fr", PYTHONPATH=path).returncode == 2


# --------------------------------------------------------------------------------------------------- sick libraries


def test_a_generate_that_loses_the_cache(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 did with code that knew another name for it: no error, and wrong texts."""
    mixin = transformers.GenerationMixin
    prepare = mixin.prepare_inputs_for_generation

    def forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("past_key_values", "cache")}

    monkeypatch.setattr(mixin, "prepare_inputs_for_generation", forget)
    done = doctor()
    assert done.returncode == 1
    for generation in FOLDERS:
        lines = [line for line in done.wrong if f"generation {generation}: " in line]
        assert [re.sub(r".*generation \d: (.*?): .*", r"\1", line) for line in lines] == [
            "generate with a cache = recomputed", "a batch = one by one", "beams with a cache = recomputed",
            "P-tuning prefix",
        ], lines  # fmt: skip
        for line in lines:
            assert " instead of '" in line
            assert 'pip install' in line and '"transformers' in line
    assert "wrong" in done.stdout.splitlines()[-1]


def longer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = transformers.PreTrainedTokenizerBase.decode
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerBase, "decode", lambda self, *given, **more: decode(self, *given, **more) + "!"
    )


def one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in CHAT_MODELS.values():
        stream = kind.stream_chat
        monkeypatch.setattr(
            kind, "stream_chat", lambda *given, stream=stream, **more: list(stream(*given, **more))[-1:]
        )


Change = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


def change_inputs(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """`change` gets the ids and the other arguments of transformers' generate, and returns the ids to generate from."""
    generate = transformers.GenerationMixin.generate

    def changed(self: Any, inputs: Any = None, *, input_ids: torch.Tensor, **more: Any) -> Any:
        options = {name: value for name, value in more.items() if not name.endswith("position_ids")}
        seen = change(input_ids, options)
        options["attention_mask"] = torch.ones_like(seen)
        output = generate(self, inputs, input_ids=seen, **options)
        new = output.sequences[:, seen.shape[1] :]
        output.sequences = torch.cat((input_ids.repeat_interleave(len(new) // len(input_ids), 0), new), 1)
        return output

    monkeypatch.setattr(transformers.GenerationMixin, "generate", changed)


def short_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last tokens, although no cache holds the others."""
    change_inputs(monkeypatch, lambda ids, options: ids[:, -2:] if options.get("use_cache") is False else ids)


def seen_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    change_inputs(monkeypatch, lambda ids, options: ids)


def mixed_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda self, order: None)


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    dequantize = QuantizedLinear.dequantize
    monkeypatch.setattr(QuantizedLinear, "dequantize", lambda self, dtype: dequantize(self, dtype) * 1.02)


def other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, torch.Tensor], *given: Any, **more: Any) -> None:
        save_file({name: tensor * 1.02 for name, tensor in tensors.items()}, *given, **more)

    monkeypatch.setattr("chatglm.adapters.saving.save_file", save)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)


@pytest.mark.parametrize(
    ("check", "break_it", "words"),
    [
        ("tokenizer", longer_texts, "instead of"),
        ("chat", longer_texts, "instead of"),
        ("stream_chat", one_piece, "does not come in pieces"),
        ("generate_uncached", short_sight, ""),  # generation 1 raises an error instead
        ("batch", seen_padding, ""),
        ("beams", mixed_beams, ""),
        ("int8", other_weights, "the logits differ by"),
        ("int4", other_weights, "the logits differ by"),
        ("saved", other_files, "the weights differ by"),
        ("prefix", other_files, "the logits differ by"),
        ("lora_adapter", other_files, "the logits differ by"),
    ],
)
def test_every_check_notices_its_fault(
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    only(monkeypatch, check)
    break_it(monkeypatch)
    done = doctor()
    assert done.returncode == 1
    assert len(done.wrong) == len(FOLDERS), done.stdout
    assert all(words in line for line in done.wrong), done.wrong


def test_a_check_that_crashes_is_one_line(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(patient: checks.Patient) -> None:
        raise KeyError("cache\nand more")

    monkeypatch.setattr(checks, "CHECKS", (("generate", crash, ("transformers",)),))
    monkeypatch.setattr(checks, "PICTURE_CHECKS", ())
    done = doctor()
    assert done.returncode == 1
    assert [re.sub(r"^WRONG +[\d.]+ s +", "", line) for line in done.wrong] == [
        f"generation {generation}: generate with a cache = recomputed: KeyError: 'cache\\nand more'; do: "
        f"{next(one for one in versions.libraries() if one.name == 'transformers').command}"
        for generation in FOLDERS
    ]
    assert done.stderr == ""
    assert "Traceback" in doctor("--verbose").stderr


def test_a_model_that_does_not_load_is_not_checked_further(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    done = doctor("--device", "cuda:99")
    assert done.returncode == 1
    assert len(done.wrong) == len(FOLDERS) + 1  # one of each model
    assert all("it loads: ValueError: device 'cuda:99'" in line for line in done.wrong)
    assert done.stdout.count("not checked") == len(FOLDERS) * (len(checks.CHECKS) - 1) + 1


def test_a_part_that_crashes_does_not_end_the_others(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> Any:
        raise RuntimeError("no driver\nfor this")

    monkeypatch.setattr(environment, "devices", crash)
    only(monkeypatch, "tokenizer")
    done = doctor("--json")
    report = json.loads(done.stdout)
    assert {"name": "machine", "status": "wrong", "text": "RuntimeError: no driver"} in report["machine"]
    assert [check["status"] for check in report["checks"]] == ["ok"] * len(FOLDERS)
    assert done.returncode == 1


def fake_library(folder: Path, name: str, version: str, code: str | None = None) -> str:
    """A PYTHONPATH with a distribution of this name in front: its metadata, and code where it is to be imported."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if code is not None:
        (folder / f"{name}.py").write_text(code)
    return os.pathsep.join((str(folder), str(ROOT)))


def test_libraries_that_this_package_cannot_be_imported_with(tmp_path: Path) -> None:
    done = run_process(PYTHONPATH=fake_library(tmp_path, "transformers", "4.30.2", "__version__ = '4.30.2'"))
    assert (done.returncode, done.stderr) == (1, "")
    first, last = re.findall(r"^  WRONG.*", done.stdout, re.MULTILINE)
    assert "transformers 4.30.2 is too old" in first
    assert "import chatglm: ImportError: cannot import name" in last
    for line in (first, last):
        assert line.count('pip install "transformers>=5') == line.count("pip install") == 1
    report = json.loads(run_process("--json", PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))).stdout)
    assert report["healthy"] is False


def test_a_library_below_ours_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("import no_such_library")
    done = run_process(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert done.returncode == 1
    assert "No module named 'no_such_library'; do: pip install no_such_library\n" in done.stdout


def test_nothing_installed(tmp_path: Path) -> None:
    (tmp_path / "packaging.py").write_text("raise ModuleNotFoundError(\"No module named 'packaging'\")")
    done = run_process(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert (done.returncode, done.stderr) == (1, "")
    assert "No module named 'packaging'; do: pip install -r requirements.txt" in done.stdout


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that libraries seem to have; None: not installed."""
    changed: dict[str, str | None] = {}
    really = metadata.version

    def version(name: str) -> str:
        found = changed[name] if name in changed else really(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return changed


def test_a_peft_too_old(doctor: Doctor, installed: dict[str, str | None]) -> None:
    installed["peft"] = "0.7.1"
    done = doctor("--no-checks")
    assert done.returncode == 1
    (line,) = done.wrong
    assert line.startswith("WRONG  peft 0.7.1 is too old")
    assert 'pip install "peft>=0.20' in line


def test_a_peft_that_cannot_be_imported(
    doctor: Doctor, installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    only(monkeypatch, "lora_adapter")
    done = doctor()
    assert done.returncode == 1
    assert len(done.wrong) == len(FOLDERS)
    assert all("LoRA: saved, loaded, merged: ModuleNotFoundError" in line and '"peft' in line for line in done.wrong)
    installed["peft"] = None  # then its absence is not reported
    done = doctor()
    assert done.returncode == 0
    assert done.stdout.count("peft is not installed, only needed for LoRA") == 1 + len(FOLDERS)


def test_a_missing_library(doctor: Doctor, installed: dict[str, str | None]) -> None:
    installed |= {"sentencepiece": None, "gradio": None}
    done = doctor("--no-checks")
    assert done.returncode == 1
    (line,) = done.wrong
    assert 'sentencepiece is not installed (needed: >=0.2' in line
    assert "gradio is not installed, only needed for the web page" in done.stdout


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache whose only library is truncated."""
    try:
        built = cpu.load()
    except KernelUnavailable as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    path = tmp_path / built.path.name
    path.write_bytes(built.path.read_bytes()[:50_000])
    return path


def test_a_damaged_kernel_cache(damaged: Path) -> None:
    """Without a compiler to rebuild it, users have to delete it. Opening it would end the process with a bus error."""
    done = run_process("--no-checks", CHATGLM_CACHE=str(damaged.parent), CC="/no/such/compiler")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = re.findall(r"^  WRONG.*", done.stdout, re.MULTILINE)
    text = f"the compiled kernels {damaged} are damaged (cut off or changed) and are not used"
    assert line == f"  WRONG  {text}; do: delete {damaged}"


def test_a_damaged_kernel_cache_that_heals(doctor: Doctor, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cpu.load().path.read_bytes()
    monkeypatch.setenv("CHATGLM_CACHE", str(damaged.parent))
    monkeypatch.setattr(environment, "use_once", lambda device: damaged.write_bytes(whole))
    done = doctor("--no-checks")
    assert done.returncode == 1
    assert [line for line in done.wrong if f"{damaged} were damaged" in line and "were rebuilt" in line] == done.wrong
    assert doctor("--no-checks").returncode == 0


def test_kernels_that_are_wrong(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "error_of", lambda *given: error_of(*given) + (given[1] == 4))
    done = doctor("--no-checks")
    assert done.returncode == 1
    assert "error 1e+00" in done.wrong[0]
    assert "CHATGLM_KERNELS" in done.wrong[0] or "torch" in done.wrong[0]


def test_plain_torch_is_a_note_with_the_reason(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATGLM_KERNELS", "torch")
    kernels.choose_again()
    done = doctor("--no-checks")
    kernels.choose_again()
    assert done.returncode == 0
    assert "plain torch, which is slow: asked for by CHATGLM_KERNELS" in done.stdout
    assert "environment variables: CHATGLM_KERNELS=torch" in done.stdout


# ---------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("tested", "found", "extra", "state"),
    [
        (">=5.17,<5.25", "5.17.0", None, "ok"),
        (">=5.17,<5.25", "5.24.3", None, "ok"),
        (">=5.17,<5.25", "5.25.0", None, "newer"),
        (">=5.17,<5.25", "5.25.0.dev0", None, "newer"),
        (">=5.17,<5.25", "6.0.0rc1", None, "newer"),
        (">=5.17,<5.25", "5.16.1", None, "older"),
        (">=5.17,<5.25", "4.57.1", None, "older"),
        (">=5.17,<5.25", None, None, "missing"),
        (">=5.17,<5.25", "unknown", None, "newer"),
        (">=2.11", "2.13.0+cpu", None, "ok"),
        ("==2.13.*", "2.12.0", None, "older"),
        (">=0.20", None, "lora", "absent"),
        (">=0.20", "0.7", "lora", "older"),
        ("", "1", None, "ok"),
    ],
)
def test_state_of_a_library(tested: str, found: str | None, extra: str | None, state: str) -> None:
    assert Library("transformers", tested, found, extra).state == state


@pytest.mark.parametrize(
    ("found", "locked", "said"),
    [
        ("5.26.0", "5.24.0", 'pip install "transformers>=5.17,<5.25"'),
        ("5.26.0", None, 'pip install "transformers>=5.17,<5.25"'),
        (None, "5.24.0", 'pip install "transformers>=5.17,<5.25"'),
        ("5.20.0", "5.24.0", 'pip install "transformers==5.24.0"'),
        ("5.24.0+local", "5.24.0", 'pip install --force-reinstall --no-deps "transformers==5.24.0"'),
        ("5.20.0", None, 'pip install --force-reinstall --no-deps "transformers>=5.17,<5.25"'),
    ],
)
def test_what_to_install(found: str | None, locked: str | None, said: str) -> None:
    assert Library("transformers", ">=5.17,<5.25", found, None, locked).command == said


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot read TOML")
def test_the_ranges_are_those_of_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {(text, None) for text in project["dependencies"]}
    wanted |= {(text, extra) for extra, texts in project["optional-dependencies"].items() for text in texts}
    assert set(versions.ranges_of_clone(ROOT / "pyproject.toml")) == wanted
    assert project["name"] == versions.DISTRIBUTION
    assert set(project["optional-dependencies"]) <= set(DOCTOR)  # what each is for, in words
    known = {one.name: one for one in versions.libraries()}
    assert known["transformers"].found == metadata.version("transformers")
    assert {Requirement(text).name for text, _ in wanted} == set(known)


PYPROJECT = """[project]
name = "chatglm-rebuilt"
keywords = ["chat>=1"]
dependencies = [
    # the "newest" that was run
    "torch>=2.11,<2.15",  # a "comment"
    "transformers>=5.17,<5.25",
    "readline>=1; sys_platform == 'no such system'",
]
[project.optional-dependencies]
lora = ["peft>=0.20,<0.22"]
web = [
    "gradio[oauth]>=6.31,<7",
]
[tool.other]
dependencies = ["other>=1"]
"""
METADATA = [
    "torch<2.15,>=2.11", "transformers<5.25,>=5.17", "readline>=1; sys_platform == 'no such system'",
    'peft<0.22,>=0.20; extra == "lora"', "gradio[oauth]<7,>=6.31; extra == 'web'",
]  # fmt: skip


@pytest.mark.parametrize("source", ["clone", "installed"])
def test_where_the_ranges_come_from(
    source: str, installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    installed |= {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": None, "gradio": "7.0"}
    assert versions.libraries() == []
    if source == "clone":
        (tmp_path / "pyproject.toml").write_text(PYPROJECT)
        (tmp_path / "requirements.lock").write_text(
            "# exact\n--hash\ntorch==2.13.0             # via accelerate\n"
            "transformers==5.20.2 ; python_full_version < '3'\n"
            "transformers==5.24.0 ; python_full_version >= '3'  # via peft\n"
        )
    else:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace("chatglm-rebuilt", "another"))
        monkeypatch.setattr(metadata, "requires", lambda name: METADATA if name == "chatglm-rebuilt" else None)
    locked = {"torch": "2.13.0", "transformers": "5.24.0"} if source == "clone" else {}
    assert versions.libraries() == [
        Library("torch", ">=2.11,<2.15", "2.13.0+cpu", None, locked.get("torch")),
        Library("transformers", ">=5.17,<5.25", "5.24.0", None, locked.get("transformers")),
        Library("peft", ">=0.20,<0.22", None, "lora"),
        Library("gradio", ">=6.31,<7", "7.0", "web"),
    ]
    assert versions.newer_than_tested() == []
    assert [one.name for one in versions.newer_than_tested("web", "lora")] == ["gradio"]


def test_newer_than_tested_is_no_fault(
    doctor: Doctor, installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["transformers"] = "99.0"
    done = doctor("--no-checks")
    assert done.returncode == 0
    assert "note   transformers 99.0 is newer than the tested versions (>=5.17,<" in done.stdout


def test_ranges_that_are_not_known(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert "the tested versions are unknown" in doctor("--no-checks").stdout


# -------------------------------------------------------------------------------------------------------- front doors


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """load(extras, *arguments): what a front door says on standard error when it loads a model, which it does not."""
    monkeypatch.setattr(chatglm, "load", lambda *args, **kwargs: (None, None))

    def call(extras: tuple[str, ...], *given: str, **more: str) -> str:
        parser = arguments.argparse.ArgumentParser()
        arguments.add_model_arguments(parser, *extras)
        parser.set_defaults(**more)
        arguments.load_from_arguments(parser.parse_args(given))
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return call


def test_front_doors_say_when_a_library_is_newer(
    load: Callable[..., str], installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    installed |= {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.99", "gradio": "7.0"}
    assert load(()) == ""
    assert load((), lang="zh") == ""
    assert load(("web",), lang="en") == (
        "Note: newer than the tested versions: gradio 7.0 (>=6.31,<7). "
        "If anything misbehaves, run python -m chatglm.doctor\n"
    )
    installed["transformers"] = "5.25.0"
    assert load((), "--adapter", "x", lang="zh") == (
        "注意：比测试过的版本新：transformers 5.25.0 (>=5.17,<5.25), peft 0.99 (>=0.20,<0.22)。"
        "若有异常，请运行 python -m chatglm.doctor\n"
    )
    installed["transformers"] = "5.1.0"  # that is no news for a note: it may not even get here
    assert load((), lang="en") == ""


def test_the_note_of_a_real_front_door(tmp_path: Path) -> None:
    """A version that no range of ours holds, by the metadata alone."""
    path = fake_library(tmp_path, "transformers", "99.0")
    done = run_process("-p", "hello", program=["cli_demo.py"], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "chatglm.doctor" in line]
    assert "transformers 99.0" in line
    assert "Hello" in done.stdout


def test_looking_for_newer_libraries_is_quick() -> None:
    start = time.thread_time()
    for _ in range(5):
        versions.newer_than_tested("web", "lora", "api", "format")
    assert (time.thread_time() - start) / 5 < 0.5  # about 0.03 on an idle machine


def test_the_checks_leave_no_trace(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "load", "prefix")
    torch.manual_seed(5)
    before = (torch.random.get_rng_state(), torch.get_num_threads(), transformers.utils.logging.get_verbosity())
    assert doctor().returncode == 0
    after = (torch.random.get_rng_state(), torch.get_num_threads(), transformers.utils.logging.get_verbosity())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
