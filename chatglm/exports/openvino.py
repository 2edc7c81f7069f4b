"""Exports a checkpoint as a folder of OpenVINO.

optimum-intel, which does it, needs an older transformers than this project. So it gets an environment of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..checkpoints.adapters import Adapter
from ..checkpoints.atomic import whole_folder
from ..checkpoints.files import find_weights
from ..kernels.cache_files import cache_folder
from ..loading.reading import read_config
from .environments import alone, environment
from .folders import GENERATION_CONFIG, Progress, export_glm, lora_deltas
from .glm_network import refuse_unfit

#: The releases that were run. transformers: the newest that this optimum-intel takes without its warning.
OPTIMUM, TRANSFORMERS = "2.2.0", "4.57.6"
#: optimum-intel asks for it, for models of pictures; its build for CUDA does not load beside a torch for CPUs.
WITHOUT = ("torchvision",)

#: What OpenVINO GenAI needs. A tokenizer that cannot be converted is only a warning of optimum-cli.
FILES = (
    "openvino_model.xml", "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json",
)  # fmt: skip


def default_environment() -> Path:
    """Where optimum-intel is installed, if the caller says nothing else."""
    return cache_folder() / f"optimum-intel-{OPTIMUM}"


def export_openvino(
    folder: Path,
    out: Path,
    kind: str | None = None,
    adapter: Adapter | None = None,
    chatglm_version: int | None = None,
    progress: Progress | None = None,
    *,
    place: Path | None = None,
    told: Callable[[Path], None] | None = None,
) -> None:
    """Writes a ChatGLM2 or ChatGLM3 as OpenVINO's model, tokenizer and detokenizer, for OpenVINO GenAI and others.

    The checkpoint goes through a folder of `GlmForCausalLM` (`export_glm`), which optimum-intel then reads whole.

    Args:
        kind: how the matrices are stored: one of `OPENVINO_TYPES`; None: fp32 or fp16, as the files.
        adapter: a LoRA adapter to merge.
        chatglm_version: the generation, if the folder does not tell it.
        place: folder of the environment with optimum-intel, made if it does not exist; else `default_environment()`.
        told: called with that folder before it is made.

    Raises:
        ValueError: the model, its vocabulary or the adapter has no place there; the message says why.
        ModelLoadError: files of the folder are missing or broken.
        FileExistsError: `place` holds something else than such an environment.
        OSError: `out` exists or cannot be written.
        RuntimeError: optimum-intel cannot be installed, or fails; its output is on standard error.
    """
    refuse_unfit(read_config(folder, chatglm_version))  # before gigabytes are installed for it
    lora_deltas(adapter)
    if kind is None:
        kind = "fp32" if find_weights(folder).dtype == torch.float32 else "fp16"
    place = (place or default_environment()).absolute()
    # As here: whoever chose a torch without CUDA gets no other one, if pip finds it.
    requirements = (
        f"optimum-intel[openvino]=={OPTIMUM}",
        f"transformers=={TRANSFORMERS}",
        f"torch=={torch.__version__.partition('+')[0]}",
    )
    programs = environment(place, requirements, WITHOUT, told and partial(told, place))
    with whole_folder(out) as aside:
        glm = aside / "glm"
        export_glm(folder, glm, adapter, chatglm_version, progress)
        command = [str(programs / "optimum-cli"), "export", "openvino", "--model", str(glm)]
        command += ["--task", "text-generation-with-past", "--weight-format", kind, str(aside)]
        variables = alone() | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, env=variables, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"optimum-cli ended with status {done.returncode}: the lines above say why")
        # transformers 4 refuses to write temperatures of a model that does not sample.
        shutil.copyfile(glm / GENERATION_CONFIG, aside / GENERATION_CONFIG)
        missing = [name for name in FILES if not (aside / name).is_file()]
        if missing:
            raise RuntimeError(f"optimum-cli has not written {', '.join(missing)}: the lines above say why")
        shutil.rmtree(glm)
