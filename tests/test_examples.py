"""The notebooks in examples/ run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int | None = None) -> Any:
    """The notebook with the outputs of its cells, none of which is an error. `steps`: of training, for its STEPS."""
    for variable, value in {"JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(tmp_path / "ipython"),
                            "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
                            "OMP_NUM_THREADS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    if steps is not None:
        for cell in notebook.cells:
            cell.source = re.sub(r"^STEPS = \d+$", f"STEPS = {steps}", cell.source, flags=re.MULTILINE)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    # What cannot be displayed is an error among the outputs and does not stop the notebook.
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    return notebook


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []) if output.output_type == "stream")


@pytest.mark.filterwarnings("default")
def test_memory_after_an_interrupted_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What docs/notebooks.md says about it."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    sources = ["class Model: pass\nmodel = Model()\nimport gc, weakref\nseen = weakref.ref(model)\n"
               "def chat(model):\n    raise KeyboardInterrupt\nchat(model)",
               "del model\ngc.collect()\nprint(seen() is None)",
               "1 / 0", "gc.collect()\nprint(seen() is None)"]  # fmt: skip
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    for cell in cells[::2]:
        cell.metadata["tags"] = ["raises-exception"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    assert [printed(cell).strip() for cell in notebook.cells[1::2]] == ["False", "True"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.filterwarnings("default")
def test_chat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = run("chat.ipynb", monkeypatch, tmp_path).cells
    text = "".join(map(printed, cells))
    assert "{'name': " in text and re.search(r"[\d.]+ MiB -> [\d.]+ MiB", text)
    assert any(output.output_type == "display_data" for cell in cells for output in cell.get("outputs", []))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("steps", [5, pytest.param(None, marks=pytest.mark.slow)], ids=["quick", "as written"])
def test_tuning(steps: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = run("tuning.ipynb", monkeypatch, tmp_path, steps).cells
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in one for one in data) and any("text/markdown" in one for one in data)
    last = [printed(cell) for cell in cells if cell.cell_type == "code"][-1]
    answers = dict(line.split(": ", 1) for line in last.strip().splitlines())
    assert list(answers) == ["None", "ai", "bo"]
    if steps is None:
        assert "ChatGLM" in answers["None"] and "小艾" in answers["ai"] and "阿波" in answers["bo"]
