"""What the programs check before they load a model: libraries, ports and addresses."""

from __future__ import annotations

import argparse
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.front import arguments
from chatglm.front.arguments import LibraryError, check_address, importing_libraries, port_number, require
from chatglm.quantization import QuantizedLinear
from test_program import finished
from tiny_folders import make_folder


@pytest.mark.parametrize("text", ["70000", "-1", "65536", "http", "", "8000.0", "٣", "²"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 65535"):
        port_number(text)


def test_ports() -> None:
    assert [port_number(text) for text in ("0", "8000", "65535")] == [0, 8000, 65535]


@pytest.mark.parametrize("words", [["api.py"], ["web_demo.py"]], ids=" ".join)
def test_a_wrong_port_is_one_line(words: list[str]) -> None:
    status, out, err = finished([*words, "--port", "70000"])
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"{words[0]}: error: argument --port: '70000' is no port: a number from 0 to 65535"


@pytest.mark.parametrize("words", [["api.py"], ["web_demo.py"], ["-m", "chatglm", "serve"]], ids=" ".join)
def test_an_address_that_does_not_exist_is_one_line(words: list[str]) -> None:
    status, out, err = finished([*words, "--host", "nosuch.invalid", "--port", "0"])
    assert (status, out) == (1, "")
    assert "--host nosuch.invalid: there is no such address" in err
    assert len(err.splitlines()) == 1


def test_addresses() -> None:
    check_address("127.0.0.1", 0)
    check_address("localhost", 0)
    for host in ("", "." * 70, "a" * 300, "192.0.2.1"):  # 192.0.2.0/24 is for documentation: no machine has it
        if host:
            with pytest.raises(ValueError, match="--host"):
                check_address(host, 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port}: the server cannot listen there .*in use"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)


@pytest.mark.parametrize(
    ("extra", "file", "name"),
    [("api", "requirements.txt", "uvicorn"), ("web", "requirements.txt", "gradio"),
     ("tune", "ptuning/requirements.txt", "rouge-chinese")],
)  # fmt: skip
def test_a_library_that_is_missing_is_named_with_the_command(
    extra: str, file: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require(extra, "en", file)
    really = metadata.version

    def version(wanted: str) -> str:
        if wanted == name:
            raise metadata.PackageNotFoundError(wanted)
        return really(wanted)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(LibraryError) as caught:
        require(extra, "en", file)
    assert str(caught.value) == f"{name} is not installed: pip install -r {file}"
    monkeypatch.setattr(arguments, "CLONE", tmp_path)  # installed from a wheel
    with pytest.raises(LibraryError) as caught:
        require(extra, "zh", file)
    assert str(caught.value) == f'未安装 {name}：pip install "chatglm-rebuilt[{extra}]"'


def test_whatever_an_import_raises_points_to_the_doctor() -> None:
    for error in (ImportError("two\nlines"), OSError("libcudart.so.12: cannot open"), AttributeError("x")):
        with pytest.raises(LibraryError, match=r"python -m chatglm\.doctor") as caught, importing_libraries("en"):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(LibraryError, match="cannot import transformers"), importing_libraries("en"):
        raise ImportError("broken", name="transformers.models")


@pytest.mark.parametrize("library", ["torch", "transformers"])
@pytest.mark.parametrize(
    "words",
    [["cli_demo.py", "-p", "hello"], ["web_demo.py", "--port", "0"], ["api.py", "--port", "0"],
     ["-m", "chatglm", "tune"], ["-m", "chatglm.export", "a", "b", "c"]],
    ids=" ".join,
)  # fmt: skip
def test_a_library_that_cannot_be_imported_is_one_line(words: list[str], library: str, tmp_path: Path) -> None:
    if library == "transformers":
        (tmp_path / "torch.py").write_text("import transformers")  # it takes seconds, and is not the point
    (tmp_path / f"{library}.py").write_text(f"raise ImportError('lib.so: no such file', name='{library}')")
    status, out, err = finished(words, tmp_path)
    assert (status, out) == (1, "")
    assert f"cannot import {library} (ImportError: lib.so: no such file); python -m chatglm.doctor" in err
    assert len(err.splitlines()) == 1


def test_what_was_quantised_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "SLOW_START", 0.0)
    parser = argparse.ArgumentParser()
    arguments.add_model_arguments(parser)
    source, out = make_folder(tmp_path / "model", 3), tmp_path / "kept"

    def load(*words: str) -> tuple[Any, str]:
        args = parser.parse_args(["--device", "cpu", *words])
        model, _ = arguments.load_from_arguments(args)
        return model, capsys.readouterr().err

    model, err = load("--model", str(source), "--quantize", "4")
    assert "--save-quantized" in err and "INT4" in err
    _, err = load("--model", str(source), "--quantize", "4", "--save-quantized", str(out))
    assert f"--model {out}" in err
    kept, err = load("--model", str(out))
    assert err == ""
    weights = kept.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert load("--model", str(out), "--quantize", "4")[1] == ""  # nothing was rounded
    with pytest.raises(FileExistsError, match="exists already"):
        load("--model", str(source), "--quantize", "4", "--save-quantized", str(out))
    with pytest.raises(ValueError, match="goes with --quantize"):
        load("--model", str(source), "--save-quantized", str(tmp_path / "other"))


def test_guessing_ahead_is_an_argument(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_model_arguments(parser)
    source = str(make_folder(tmp_path / "model", 3))

    def options(*words: str) -> Any:
        model, tokenizer = arguments.load_from_arguments(
            parser.parse_args(["--device", "cpu", "--model", source, *words])
        )
        return model.turn_options(tokenizer), model.turn_options(tokenizer, prompt_lookup_num_tokens=0)

    assert [one.guesses for one in options()] == [False, False]
    assert [one.guesses for one in options("--prompt-lookup-num-tokens", "7")] == [True, False]
    assert [one.guesses for one in options("--assistant-model", source)] == [True, False]
    with pytest.raises(ValueError, match="not both"):
        options("--prompt-lookup-num-tokens", "7", "--assistant-model", source)
    with pytest.raises(SystemExit):
        parser.parse_args(["--prompt-lookup-num-tokens", "-1"])


def test_the_precision_is_an_argument(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_model_arguments(parser)
    source, out = str(make_folder(tmp_path / "model", 3)), str(tmp_path / "kept")

    def precisions(*words: str) -> set[str]:
        model, _ = arguments.load_from_arguments(parser.parse_args(["--device", "cpu", *words]))
        return {one.precision for one in model.modules() if isinstance(one, QuantizedLinear)}

    int4 = ("--model", source, "--quantize", "4")
    assert precisions(*int4) == {"default"}
    assert precisions(*int4, "--precision", "int8", "--save-quantized", out) == {"int8"}
    assert precisions("--model", out) == {"int8"}  # as the folder says
    assert precisions("--model", out, "--precision", "exact") == {"exact"}
    with pytest.raises(ValueError, match="add --quantize 4"):
        precisions("--model", source, "--precision", "int8")
    with pytest.raises(ValueError, match="--tensor-parallel"):
        precisions(*int4, "--precision", "int8", "--tensor-parallel", "2")
