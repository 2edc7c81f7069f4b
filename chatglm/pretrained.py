"""What the networks of all generations share: how they meet transformers, initialise, and turn states into logits."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import zeros_
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from . import quantization
from .configuration_chatglm import ChatGLMConfig
from .rotary import RotaryTable


class ChatGLMPreTrainedModel(PreTrainedModel):
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Rotary buffers that the published checkpoints carry and that follow from the config.
    _keys_to_ignore_on_load_unexpected = [r"rotary_(pos_)?emb\.inv_freq"]
    # A freshly made prefix is trained; its absence from a base checkpoint is no fault.
    _keys_to_ignore_on_load_missing = [r"prefix_encoder\."]
    # P-tuning trains the prefix beside half-precision weights.
    _keep_in_fp32_modules_strict = ["prefix_encoder"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, with `device=` for `device_map=` as ChatGLM2's README has it."""
        device = kwargs.pop("device", None)
        if device is not None:
            kwargs.setdefault("device_map", device)
        kwargs.pop("empty_init", None)  # the originals' switch: weights that are loaded are never initialised first
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.pre_seq_len is not None:
            model._freeze_all_but_the_prefix()  # loading makes new parameters, which are trainable again
        return loaded

    def _freeze_all_but_the_prefix(self) -> None:
        """P-tuning trains the prefix, and the head of a classifier."""
        for name, parameter in self.named_parameters():
            if "prefix_encoder." not in name and not name.startswith("classifier_head."):
                parameter.requires_grad_(False)

    def post_init(self) -> None:
        """Ends every constructor: a config that names quantised weights gets the layers to load them into."""
        if self.config.quantization_bit:
            quantization.apply(self, quantization.stored_settings(self.config), empty=True)
        super().post_init()

    def quantize(self, bits: int, **options: Any) -> Any:
        """Quantises the weights to 4 or 8 bits in place and returns the model; 0 changes nothing.

        In any order with `.half()`, `.float()`, `.cuda()` and `.to()`. The options, those of the originals among them,
        are described at `chatglm.quantization.quantize`.
        """
        return quantization.quantize(self, bits, **options)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are computed with: the scales of quantised weights have a dtype of their own."""
        for name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not name.endswith("weight_scale"):
                return parameter.dtype
        return super().dtype

    # transformers refuses these two for quantised models; ours cast what is not quantised, as the originals do.
    def half(self, *args: Any) -> Any:
        return nn.Module.half(self, *args)

    def float(self, *args: Any) -> Any:
        return nn.Module.float(self, *args)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryTable):
            module.reset()
        elif isinstance(module, (quantization.QuantizedLinear, quantization.QuantizedEmbedding)):
            for parameter in module.parameters(recurse=False):
                zeros_(parameter)
        else:
            super()._init_weights(module)

    def _head_outputs(
        self,
        outputs: BaseModelOutputWithPast,
        head: nn.Module,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, kept tokens, vocabulary) and, with labels, the loss in float32."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
