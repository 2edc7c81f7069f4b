"""The image side of VisualGLM-6B: a ViT, a Q-Former and a projection turn a picture into embeddings of the text model.

The ViT is EVA-CLIP's ViT-g without its last block, the Q-Former that of BLIP-2 (https://arxiv.org/abs/2301.12597), so
both are transformers' classes; `published_names` translates between their names and those of the published weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming

from ..configuration_visualglm import VisualGLMConfig

#: Epsilon of the norm after the ViT: LayerNorm's default, whatever eva_config says of the blocks.
_FINAL_EPSILON = 1e-5
#: The names of the Q-Former's layers are translated one by one, up to this many.
_MOST_LAYERS = 64


class ImageEncoder(nn.Module):
    """Pixels to embeddings, (batch, 3, height, width) -> (batch, `image_length`, hidden_size of the text model)."""

    #: Quantisation leaves these weights as they are.
    stays_float = True

    def __init__(self, config: VisualGLMConfig) -> None:
        super().__init__()
        eva, qformer = config.eva_config, config.qformer_config
        self.vit = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=eva["hidden_size"],
                intermediate_size=eva["inner_hidden_size"],
                num_hidden_layers=eva["num_layers"],
                num_attention_heads=eva["num_attention_heads"],
                image_size=config.image_size,
                patch_size=eva["patch_size"],
                layer_norm_eps=eva["layernorm_epsilon"],
                initializer_range=config.initializer_range,
            )
        )
        self.vit.post_layernorm.eps = _FINAL_EPSILON
        self.query_tokens = nn.Parameter(torch.zeros(config.image_length, qformer["hidden_size"]))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=qformer["hidden_size"],
                intermediate_size=qformer.get("inner_hidden_size") or 4 * qformer["hidden_size"],
                num_hidden_layers=qformer["num_layers"],
                num_attention_heads=qformer["num_attention_heads"],
                layer_norm_eps=qformer["layernorm_epsilon"],
                cross_attention_frequency=_cross_attention_frequency(qformer),
                encoder_hidden_size=eva["hidden_size"],
                initializer_range=config.initializer_range,
            )
        )
        # The last norm has a name of its own in the published weights, so it stands outside.
        self.qformer.encoder.layer[-1].output_query.LayerNorm = nn.Identity()
        self.final_layernorm = nn.LayerNorm(qformer["hidden_size"], eps=qformer["layernorm_epsilon"])
        self.glm_proj = nn.Linear(qformer["hidden_size"], config.hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: as `chatglm.pictures.pixels` makes them.
        """
        queries = self.query_tokens.expand(len(images), -1, -1)
        seen = self.vit(pixel_values=images).last_hidden_state
        found = self.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        projected: torch.Tensor = self.glm_proj(self.final_layernorm(found).to(self.glm_proj.weight.dtype))
        return projected


def _cross_attention_frequency(qformer: dict[str, Any]) -> int:
    """Every how many layers the Q-Former looks at the picture. Raises ValueError if that is not regular."""
    marks = [bool(mark) for mark in qformer.get("is_decoder") or [True, False]]
    frequency = marks.index(True, 1) if True in marks[1:] else len(marks)
    if marks != [index % frequency == 0 for index in range(len(marks))]:
        raise ValueError(f"is_decoder in qformer_config must be true at regular distances from layer 0, not {marks}")
    return frequency


class _Axis(ConversionOps):
    """Adds an axis in front when weights are loaded, and drops it when they are saved."""

    def __init__(self, adds: bool) -> None:
        self.adds = adds

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return {target_patterns[0]: tensor[None] if self.adds else tensor[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Axis(not self.adds)


_VIT = {
    r"transformer\.layers\.(\d+)\.input_layernorm": r"encoder.layers.\1.layer_norm1",
    r"transformer\.layers\.(\d+)\.post_attention_layernorm": r"encoder.layers.\1.layer_norm2",
    r"transformer\.layers\.(\d+)\.attention\.query_key_value": r"encoder.layers.\1.self_attn.qkv",
    r"transformer\.layers\.(\d+)\.attention\.dense": r"encoder.layers.\1.self_attn.projection",
    r"transformer\.layers\.(\d+)\.mlp\.dense_h_to_4h": r"encoder.layers.\1.mlp.fc1",
    r"transformer\.layers\.(\d+)\.mlp\.dense_4h_to_h": r"encoder.layers.\1.mlp.fc2",
    r"mixins\.patch_embedding\.proj": "embeddings.patch_embedding",
    r"mixins\.cls\.ln_vision": "post_layernorm",
}
_QFORMER = {
    r"attention\.query_key_value": "attention.attention.query_key_value",
    r"attention\.dense": "attention.output.dense",
    r"post_attention_layernorm": "attention.output.LayerNorm",
    r"cross_attention\.query": "crossattention.attention.query",
    r"cross_attention\.key_value": "crossattention.attention.key_value",
    r"cross_attention\.dense": "crossattention.output.dense",
    r"post_cross_attention_layernorm": "crossattention.output.LayerNorm",
    r"mlp\.dense_h_to_4h": "intermediate_query.dense",
    r"mlp\.dense_4h_to_h": "output_query.dense",
}


def published_names() -> list[Any]:
    """The translations of names and shapes between the published weights and `ImageEncoder`, in transformers' form.

    In the published post-norm layers of the Q-Former, the norm after a layer stands at the head of the next one.
    """
    vit, qformer = r"image_encoder\.vit\.", r"image_encoder\.qformer\.transformer\."
    renamed = [WeightRenaming(f"^{vit}{old}", f"image_encoder.vit.{new}") for old, new in _VIT.items()]
    renamed += [
        WeightRenaming(rf"^{qformer}layers\.(\d+)\.{old}", rf"image_encoder.qformer.encoder.layer.\1.{new}")
        for old, new in _QFORMER.items()
    ]
    renamed += [
        WeightRenaming(f"^{qformer}word_embeddings.weight", "image_encoder.query_tokens"),
        WeightRenaming(f"^{qformer}final_layernorm", "image_encoder.final_layernorm"),
        WeightRenaming(rf"^{qformer}layers\.0\.input_layernorm", "image_encoder.qformer.layernorm"),
    ]
    renamed += [
        WeightRenaming(
            rf"^{qformer}layers\.{after + 1}\.input_layernorm",
            f"image_encoder.qformer.encoder.layer.{after}.output_query.LayerNorm",
        )
        for after in range(_MOST_LAYERS)
    ]
    thirds = [rf"\.attention\.attention\.{part}" for part in ("query", "key", "value")]
    halves = [rf"\.crossattention\.attention\.{part}" for part in ("key", "value")]
    return [
        *renamed,
        WeightConverter(r"\.attention\.attention\.query_key_value", thirds, [Chunk(dim=0)]),
        WeightConverter(r"\.crossattention\.attention\.key_value", halves, [Chunk(dim=0)]),
        WeightConverter(
            r"image_encoder\.vit\.transformer\.word_embeddings\.weight",
            r"image_encoder\.vit\.embeddings\.class_embedding",
            [_Axis(adds=True)],
        ),
        WeightConverter(
            r"image_encoder\.vit\.transformer\.position_embeddings\.weight",
            r"image_encoder\.vit\.embeddings\.position_embedding",
            [_Axis(adds=True)],
        ),
    ]
