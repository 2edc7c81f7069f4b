"""`python -m chatglm.export --to openvino`: a stand-in plays pip and optimum-intel, which need gigabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatglm import export, load
from chatglm.exports import openvino
from chatglm.exports.environments import MARKER, environment
from tiny_adapters import make_lora, make_prefix
from tiny_folders import make_folder

posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in of optimum-cli is a script with a #! line")

#: Plays optimum-cli: writes what it was asked for and what it saw; a file FAIL beside it makes it fail halfway.
OPTIMUM_CLI = """#!{python}
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
out = Path(arguments[-1])
for name in {files}:
    (out / name).write_text("{{}}")
print("noise")
glm = Path(arguments[arguments.index("--model") + 1])
config = json.loads((glm / "config.json").read_text())
told = {{"arguments": arguments, "model": config, "path": os.environ.get("PYTHONPATH")}}
Path({told!r}).write_text(json.dumps(told))
failure = Path({failure!r})
if failure.exists():
    if failure.read_text():
        (out / failure.read_text()).unlink()
    else:
        sys.exit(3)
"""


class Pip:
    """Stands in for `python -m venv` and pip: notes the commands, and puts an optimum-cli into the environment."""

    def __init__(self, folder: Path) -> None:
        self.commands: list[list[str]] = []
        self.status = 0
        self.failure = folder / "FAIL"
        self.told = folder / "told.json"
        self._run = subprocess.run

    def __call__(self, command: list[str], **options: Any) -> Any:
        if command[1] != "-m":
            return self._run(command, **options)
        self.commands.append(command)
        if command[2] == "venv":
            place = Path(command[3]) / "bin" / "optimum-cli"
            place.parent.mkdir()
            script = OPTIMUM_CLI.format(
                python=sys.executable, files=openvino.FILES, told=str(self.told), failure=str(self.failure)
            )
            place.write_text(script, encoding="utf-8")
            place.chmod(0o755)
        return subprocess.CompletedProcess(command, self.status)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    return pip


@posix
def test_an_export(pip: Pip, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = make_folder(tmp_path / "folder", 3), tmp_path / "out"
    assert export.main([str(folder), str(out), "--to", "openvino", "--type", "int4"]) == 0
    printed = capfd.readouterr()
    assert printed.out.strip() == str(out)  # what the programs print goes to the other stream
    assert "noise" in printed.err and printed.err.splitlines()[-1].endswith(f"LLMPipeline({str(out)!r}, \"CPU\")")
    assert sorted(path.name for path in out.iterdir()) == sorted([*openvino.FILES, "generation_config.json"])
    told = json.loads(pip.told.read_text())
    assert told["model"]["architectures"] == ["GlmForCausalLM"]
    assert told["path"] is None
    assert told["arguments"][told["arguments"].index("--weight-format") + 1] == "int4"
    place = tmp_path / "cache" / f"optimum-intel-{openvino.OPTIMUM}"
    venv, install, uninstall = pip.commands
    assert venv[-1] == str(place) and uninstall[-1] == "torchvision"
    assert f"optimum-intel[openvino]=={openvino.OPTIMUM}" in install

    # The environment is used again; without --type, float32 files stay so, and others become float16.
    assert export.main([str(folder), str(tmp_path / "second"), "--to", "openvino"]) == 0
    assert len(pip.commands) == 3
    assert "fp32" in json.loads(pip.told.read_text())["arguments"]
    load(folder, dtype="bfloat16")[0].save_pretrained(folder)
    lora = make_lora(tmp_path / "lora", load(folder)[0])
    assert export.main([str(folder), str(lora), str(tmp_path / "third"), "--to", "openvino"]) == 0
    assert "fp16" in json.loads(pip.told.read_text())["arguments"]
    assert export.main([str(folder), str(out), "--to", "openvino"]) == 1
    assert "exists already" in capfd.readouterr().err


@posix
@pytest.mark.parametrize("missing", ["", "openvino_tokenizer.xml"])
def test_an_export_that_fails_leaves_nothing(
    missing: str, pip: Pip, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_folder(tmp_path / "folder", 3), tmp_path / "new" / "out"
    pip.failure.write_text(missing)
    assert export.main([str(folder), str(out), "--to", "openvino"]) == 1
    assert (missing or "status 3") in capfd.readouterr().err.splitlines()[-1]
    assert list(out.parent.iterdir()) == []


def test_what_has_no_place_there_is_refused_before_anything_is_installed(
    pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, three = make_folder(tmp_path / "one", 1), make_folder(tmp_path / "three", 3)
    prefix = make_prefix(tmp_path / "prefix", load(three)[0])
    refused = {"two-dimensional positions": [str(one)], "P-tuning prefix": [str(three), str(prefix)]}
    for reason, arguments in refused.items():
        assert export.main([*arguments, str(tmp_path / "out"), "--to", "openvino"]) == 1
        assert reason in capsys.readouterr().err
    for wrong in (["--to", "openvino", "--type", "q4_0"], ["--to", "gguf", "--type", "int4"],
                  ["--to", "glm", "--type", "f16"], ["--to", "glm", "--environment", "x"]):  # fmt: skip
        with pytest.raises(SystemExit):
            export.main([str(three), str(tmp_path / "out"), *wrong])
    assert pip.commands == [] and not (tmp_path / "out").exists()


def test_environments(pip: Pip, tmp_path: Path) -> None:
    place, calls = tmp_path / "place", []
    programs = environment(place, ["a==1"], told=lambda: calls.append("told"))
    assert programs.parent == place and calls == ["told"]
    environment(place, ["a==1"], told=lambda: calls.append("told"))
    assert len(pip.commands) == 2 and calls == ["told"]
    environment(place, ["a==2"], ["b"])  # other requirements: made anew
    assert [command[2] for command in pip.commands] == ["venv", "pip", "venv", "pip", "pip"]
    pip.status = 1
    with pytest.raises(RuntimeError, match="cannot make the environment"):
        environment(place, ["a==3"])
    pip.status = 0
    environment(place, ["a==3"])  # what was not finished is made anew
    assert (place / MARKER).read_text() == "a==3\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(FileExistsError, match="name another folder"):
        environment(tmp_path / "mine", ["a==1"])
    assert (tmp_path / "mine" / "letter.txt").exists()
