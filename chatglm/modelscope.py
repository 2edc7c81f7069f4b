"""ModelScope: its `Model` and `pipeline` load ChatGLM with the code here, as its `AutoModel` and `AutoTokenizer` do.

The repositories on ModelScope bring code for transformers 4 (`ms_wrapper.py`), which modelscope itself would run.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from .checkpoints import file_names
from .checkpoints.clues import generation_in, read_values
from .loading.one_device import find_device
from .loading.over_gpus import load_split
from .loading.reading import read_tokenizer

#: The name of our pipeline in modelscope's registry.
PIPELINE = "chatglm-chat"
_TASKS = ("chat", "text-generation")
# Arguments that modelscope passes on for its own use, or for models of other kinds.
_OF_MODELSCOPE = (
    "invoked_by", "model_prefetched", "task", "use_hf", "external_engine_for_llm", "llm_framework", "trust_remote_code",
    "model_revision", "preprocessor", "config_file", "pipeline_name", "framework",
)  # fmt: skip


def register() -> None:
    """Registers with modelscope, if the program uses it: at once, or as soon as it is imported."""
    for name, take_over in _TAKEN_OVER.items():
        module = sys.modules.get(name)
        if module is not None:
            take_over(module)
    if not all(name in sys.modules for name in _TAKEN_OVER):
        sys.meta_path.insert(0, _WhenImported(_TAKEN_OVER))


class _WhenImported(MetaPathFinder):
    """Takes over a module of modelscope once it has been imported."""

    def __init__(self, taken_over: Mapping[str, Callable[[Any], None]]) -> None:
        self.taken_over = taken_over

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        take_over = self.taken_over.get(fullname)
        if take_over is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                take_over(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _take_over_model(module: Any) -> None:
    """Lets `Model.from_pretrained` of modelscope.models.base.base_model load ChatGLM by `load_model`."""
    original = module.Model.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_chatglm(model_name_or_path):
            return original(cls, model_name_or_path, *args, **kwargs)
        return load_model(model_name_or_path, *args, **kwargs)

    module.Model.from_pretrained = classmethod(from_pretrained)


def _take_over_pipeline(module: Any) -> None:
    """Lets `pipeline` of modelscope.pipelines.builder give ours for a ChatGLM: a model, a folder, or an id."""
    original = module.pipeline
    for task in _TASKS:  # for programs that have imported `pipeline` before us
        module.PIPELINES.register_module(group_key=task, module_name=PIPELINE, module_cls=ChatGLMPipeline)

    @functools.wraps(original)
    def pipeline(task: Any = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        if args or task not in _TASKS or kwargs.get("pipeline_name") is not None:
            return original(task, model, *args, **kwargs)
        if isinstance(model, str) and _is_chatglm(model):
            model = load_model(model, kwargs.pop("model_revision", None), device=kwargs.get("device"))
        if getattr(model, "pipeline", {}).get("type") != PIPELINE:
            return original(task, model, **kwargs)
        return ChatGLMPipeline(model, **{name: one for name, one in kwargs.items() if name not in _OF_MODELSCOPE})

    module.pipeline = pipeline
    package = sys.modules.get("modelscope.pipelines")
    if package is not None and package.__dict__.get("pipeline") is original:
        package.__dict__["pipeline"] = pipeline


_TAKEN_OVER: Mapping[str, Callable[[Any], None]] = {
    "modelscope.models.base.base_model": _take_over_model,
    "modelscope.pipelines.builder": _take_over_pipeline,
}


def _is_chatglm(path_or_id: Any) -> bool:
    """Whether a folder says so in its config.json, or an id of the hub in its name."""
    source = os.fspath(path_or_id)
    if os.path.exists(source):
        return read_values(Path(source, file_names.CONFIG)).get("model_type") == "chatglm"
    return generation_in(source) is not None


def load_model(
    path_or_id: str | os.PathLike[str],
    revision: str | None = None,
    cfg_dict: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    device_map: Any = None,
    torch_dtype: Any = None,
    ignore_file_pattern: Any = None,
    **options: Any,
) -> Any:
    """What modelscope's `Model.from_pretrained` returns for a ChatGLM: its model, ready to chat.

    No code of the repository is fetched or run, whatever `trust_remote_code` says.

    Args:
        path_or_id: a folder, or an id of ModelScope, whose files modelscope fetches or finds in its cache.
        revision: of an id.
        device: "cpu", "gpu", "cuda:1", ...
        device_map: as in `load_model_on_gpus`; "auto" puts the model on what the machine has.
        torch_dtype: None chooses as `chatglm.load` does.
        options: further arguments of `load_model_on_gpus`, such as `quantize` and `chatglm_version`.

    Raises:
        What `load_model_on_gpus` raises.
    """
    folder = os.fspath(path_or_id)
    if not os.path.exists(folder):
        from modelscope import snapshot_download

        given = [ignore_file_pattern] if isinstance(ignore_file_pattern, str) else ignore_file_pattern or []
        folder = snapshot_download(folder, revision=revision, ignore_file_pattern=["*.py", *given])
    for name in _OF_MODELSCOPE:
        options.pop(name, None)
    if device_map is None:
        device_map = find_device((device or "auto").replace("gpu", "cuda"))
    model: Any = load_split(folder, device_map=device_map, dtype=torch_dtype or "auto", **options)
    model.model_dir = folder
    model.pipeline = {"type": PIPELINE}  # by which modelscope's `pipeline` finds ours
    return model


class ChatGLMPipeline:
    """modelscope's pipeline for `Tasks.chat`: `pipe({"text": ..., "history": ...})`.

    Args:
        model: what `load_model` returns.
        device: has no effect, as the model is in its place already.
    """

    group_key = _TASKS[0]

    def __init__(self, model: Any, device: str | None = None, device_map: Any = None) -> None:
        self.model = model
        self.tokenizer = read_tokenizer(Path(model.model_dir), model.config.chatglm_version)

    def __call__(self, input: Any, **settings: Any) -> Any:
        """Answers one question, or several in a list.

        Args:
            input: `text` is the question, `history` that of the last result (`[]` or None at the start); further keys
                are settings.
            settings: of `chat`: `max_length`, `top_p`, `temperature`, ...

        Returns:
            `response`, and the `history` to continue from.

        Raises:
            TypeError: the input is no such dict.
            ValueError: what `chat` raises.
        """
        if isinstance(input, list):
            return [self(one, **settings) for one in input]
        if not isinstance(input, Mapping) or not isinstance(input.get("text"), str):
            raise TypeError('give a dict with the question in "text" and the last result\'s "history"')
        given = {name: value for name, value in input.items() if name not in ("text", "history")} | settings
        history = input.get("history") or []
        response, history = self.model.chat(self.tokenizer, input["text"], history=history, **given)
        return {"response": response, "history": history}
