"""After a notebook's `%autoreload 2` has run changed modules of the package again, loaded models go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("IPython")
PACKAGE = Path(__file__).parents[1] / "chatglm"
#: Modules with a registry, or with classes that others compare with.
CHANGED = ["cache/chat.py", "chat.py", "configuration_chatglm.py", "conversation/formats.py", "modelscope.py",
           "network/layers.py", "quantization/loading.py", "tokenizers/base.py"]  # fmt: skip
NOTEBOOK = """
import contextlib, io, os, sys, time
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

root, changed = Path(sys.argv[1]), sys.argv[2:]
sys.path.insert(0, str(root))
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "autoreload")
shell.run_line_magic("autoreload", "2")

def run(cell):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        done = shell.run_cell(cell)
    assert done.success, shown.getvalue()
    return shown.getvalue()

folder = root / "chatglm" / "demo"
load = f"loaded = [chatglm.load('{folder}/' + name) for name in ('chatglm-demo', 'chatglm3-demo')]"
chat = "print([model.chat(tokenizer, '1+1=?', history=[], do_sample=False)[0] for model, tokenizer in loaded])"
run("import chatglm")
run(load)
answers = run(chat)
for number, name in enumerate(changed, 1):
    file = root / "chatglm" / name
    file.write_text(file.read_text(encoding="utf-8") + "\\nfor _changed in (1,):\\n    pass\\n", encoding="utf-8")
    os.utime(file, (time.time() + 5 * number,) * 2)
    assert run("pass") == "", name
    module = "chatglm." + name.removesuffix(".py").replace("/", ".")
    assert hasattr(sys.modules[module], "_changed"), name
    assert run(chat) == answers, name
run(load)
assert run(chat) == answers
run(f"quantised = chatglm.load('{folder}/chatglm3-demo', quantize=4)")
"""


def test_changed_modules(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "chatglm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-W", "ignore", "-c", NOTEBOOK, str(tmp_path), *CHANGED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
