"""vLLM's own network, with the stretched positions of chatglm2-6b-32k."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models import chatglm

from ..exports.glm_network import ROPE_BASE


class ChatGLMForCausalLM(chatglm.ChatGLMForCausalLM):
    """ChatGLM2, ChatGLM3 and GLM-4."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        if config.stretches_positions and config.rope_ratio != 1:  # vLLM multiplies the base instead, as ChatGLM3 does
            rope = {"rope_type": "linear", "factor": float(config.rope_ratio), "rope_theta": ROPE_BASE}
            rope["partial_rotary_factor"] = 0.5
            length = config.seq_length
            for layer in self.transformer.encoder.layers:
                attention = getattr(layer, "self_attention", None)
                if attention is not None:  # layers of other pipeline stages have none
                    attention.rotary_emb = get_rope(
                        attention.head_dim, max_position=length, rope_parameters=rope, is_neox_style=False
                    )
