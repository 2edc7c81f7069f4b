"""The entry point for vLLM (`vllm.general_plugins` in pyproject.toml): config, tokenizers, network, tool parsers.

vLLM calls `register` in each of its processes, perhaps more than once.
"""

from __future__ import annotations

#: The names under which programs have saved these models, today's and older ones.
ARCHITECTURES = (
    "ChatGLMModel",
    "ChatGLMForConditionalGeneration",
    "ChatGLM2ForConditionalGeneration",
    "ChatGLM3ForConditionalGeneration",
    "ChatGLM4ForConditionalGeneration",
)


def register() -> None:
    """Makes vLLM run the published folders of ChatGLM2, ChatGLM3 and GLM-4."""
    from vllm import ModelRegistry
    from vllm.tool_parsers import ToolParserManager
    from vllm.transformers_utils import config

    from .. import public as _  # noqa: F401  # registers the generations with transformers
    from .configs import ServedConfig
    from .rendering import render_as_text

    render_as_text()
    config._CONFIG_REGISTRY["chatglm"] = ServedConfig  # before vLLM's own, which lacks fields and checks
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{__package__}.vllm_network:ChatGLMForCausalLM")
    for name, kind in (("chatglm3", "ChatGLM3ToolParser"), ("glm4", "GLM4ToolParser")):
        ToolParserManager.register_lazy_module(name, f"{__package__}.vllm_tools", kind)
