"""The network of VisualGLM-6B: ChatGLM-6B, in whose prompt the embeddings of a picture replace some tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_visualglm import VisualGLMConfig
from .modeling_chatglm import ChatGLM1ForCausalLM, ChatGLM1PreTrainedModel
from .network.image_encoder import ImageEncoder, published_names


class VisualGLMForCausalLM(ChatGLM1ForCausalLM):
    """Token ids and a picture to logits. A picture is context: it is seen in both directions, and takes positions."""

    config: VisualGLMConfig
    config_class = VisualGLMConfig
    part_names = dataclasses.replace(ChatGLM1PreTrainedModel.part_names, others=("image_encoder",))
    _no_split_modules = ["ChatGLM1Block", "Blip2EncoderLayer", "Blip2QFormerLayer", "Blip2VisionEmbeddings"]
    # In half precision, the Q-Former's epsilon of 1e-12 is zero.
    _keep_in_fp32_modules = ["image_encoder.qformer", "image_encoder.query_tokens", "image_encoder.final_layernorm"]

    def __init__(self, config: VisualGLMConfig, empty_init: bool = True) -> None:
        super().__init__(config, empty_init)
        self.image_encoder = ImageEncoder(config)
        if config.pre_seq_len is not None:
            self.image_encoder.requires_grad_(False)
        self.post_init()

    @staticmethod
    def conversions() -> list[Any]:
        return published_names()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """The embeddings of pictures, (batch, 3, height, width) -> (batch, image_length, hidden_size)."""
        size = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images must be (batch, 3, {size}, {size}), not {tuple(images.shape)}")
        weight = self.image_encoder.vit.embeddings.patch_embedding.weight
        encoded: torch.Tensor = self.image_encoder(images.to(weight.device, weight.dtype))
        return encoded

    def embed_with_images(
        self, input_ids: torch.Tensor, image_features: torch.Tensor, pre_image_length: int
    ) -> torch.Tensor:
        """Token embeddings (batch, tokens, hidden), with those of a picture from index `pre_image_length` on.

        Raises:
            ValueError: the tokens end before the picture does.
        """
        end = pre_image_length + image_features.shape[1]
        if input_ids.shape[1] < end or pre_image_length < 0:
            raise ValueError(
                f"input_ids hold {input_ids.shape[1]} tokens, and the picture takes those from {pre_image_length} to "
                f"{end}: put {image_features.shape[1]} placeholders (id 0) where it stands"
            )
        words = self.get_input_embeddings()
        before, after = words(input_ids[:, :pre_image_length]), words(input_ids[:, end:])
        return torch.cat((before, image_features.to(before), after), dim=1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        positions_behind_cache: torch.Tensor | None = None,
        cache: Cache | None = None,
        images: torch.Tensor | None = None,
        pre_image_length: int | torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As without pictures; with one, `input_ids` hold `config.image_length` placeholders where it stands.

        Args:
            images: (batch, 3, height, width), normalised pixels, see `chatglm.pictures`.
            pre_image_length: how many tokens stand before the placeholders, in every row.
            image_features: what `encode_images` returned, in place of `images`.

        Raises:
            ValueError: a picture comes without its place, twice, or with `inputs_embeds`.
        """
        if images is not None or image_features is not None:
            if (images is None) == (image_features is None) or input_ids is None or pre_image_length is None:
                raise ValueError("a picture is images or image_features, with input_ids and pre_image_length")
            if image_features is None:
                assert images is not None
                image_features = self.encode_images(images)
            place = int(torch.as_tensor(pre_image_length).flatten()[0])
            inputs_embeds = self.embed_with_images(input_ids, image_features, place)
            input_ids = None
        elif pre_image_length is not None and int(torch.as_tensor(pre_image_length).max()):
            raise ValueError("pre_image_length is the place of a picture: give images or image_features, too")
        outputs: CausalLMOutputWithPast = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, positions_behind_cache=positions_behind_cache, cache=cache, **kwargs,
        )  # fmt: skip
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        images: torch.Tensor | None = None,
        pre_image_length: int | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As without pictures; a picture goes into the forwards that read the prompt."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = inputs.get("input_ids")
        if new is not None and new.shape[1] == input_ids.shape[1]:
            picture = {"images": images, "pre_image_length": pre_image_length, "image_features": image_features}
            inputs |= {name: value for name, value in picture.items() if value is not None}
        return inputs


for name in ("VisualGLMForCausalLM", "VisualGLMForConditionalGeneration"):
    register_checkpoint_conversion_mapping(name, published_names(), overwrite=True)
