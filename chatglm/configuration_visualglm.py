"""The configuration of VisualGLM-6B: ChatGLM-6B's, and that of its image encoder."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from .checkpoints.clues import VISUAL
from .configuration_chatglm import CONFIGS, ChatGLM1Config

#: The image side of VisualGLM-6B as published.
_EVA: dict[str, Any] = {
    "num_layers": 39, "hidden_size": 1408, "num_attention_heads": 16, "inner_hidden_size": 6144,
    "layernorm_epsilon": 1e-6, "image_size": [224, 224], "patch_size": 14,
}  # fmt: skip
_QFORMER: dict[str, Any] = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "layernorm_epsilon": 1e-12}


class VisualGLMConfig(ChatGLM1Config):
    """VisualGLM-6B: ChatGLM-6B with an image encoder. The two dicts have the fields of its published config.json."""

    image_length: int = 32
    eva_config: dict[str, Any] = field(default_factory=dict)
    qformer_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        self.eva_config = _EVA | (self.eva_config or {})
        self.qformer_config = _QFORMER | (self.qformer_config or {})
        super().__post_init__(**kwargs)
        self.chatglm_version = VISUAL
        sides = self.eva_config["image_size"]
        sides = [sides] if isinstance(sides, int) else list(sides)
        if len(set(sides)) != 1 or sides[0] % self.eva_config["patch_size"]:
            raise ValueError(f"image_size in eva_config must be a square of whole patches, not {sides}")

    @property
    def image_size(self) -> int:
        """Height and width in pixels to which pictures are resized."""
        sides = self.eva_config["image_size"]
        return int(sides if isinstance(sides, int) else sides[0])


CONFIGS[VISUAL] = VisualGLMConfig
