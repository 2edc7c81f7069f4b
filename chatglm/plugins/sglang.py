"""The entry point for SGLang (`sglang.srt.plugins` in pyproject.toml): config, tokenizers, names of the network.

Written by the source of SGLang 0.5.23, whose wheels need an NVIDIA GPU, and tested against stand-ins for it only.
"""

from __future__ import annotations

from .vllm import ARCHITECTURES


def register() -> None:
    """Makes SGLang take the published folders of ChatGLM2, ChatGLM3 and GLM-4; SGLang calls it in each process."""
    from sglang.srt.models.chatglm import ChatGLMModel
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.utils.hf_transformers import common
    from transformers import AutoConfig

    from .. import public as _  # noqa: F401  # registers the generations with transformers
    from .configs import ServedConfig
    from .rendering import render_as_text

    render_as_text()
    ServedConfig.knows_stretched_positions = False
    common._CONFIG_REGISTRY["chatglm"] = ServedConfig
    AutoConfig.register("chatglm", ServedConfig, exist_ok=True)
    for name in ARCHITECTURES:
        ModelRegistry.models[name] = ChatGLMModel
