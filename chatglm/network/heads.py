"""Heads that turn hidden states into logits and losses: language model and classifier of every generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from ..kernels import dense_linear
from ..quantization import DenseHead
from . import compat
from .attribute_names import HeadAttributes
from .pretrained import ChatGLMPreTrainedModel


def project(head: Any, hidden_states: torch.Tensor, answers: bool = False) -> torch.Tensor:
    """`head(hidden_states)`; a plain head on a CPU takes the kernel that is faster for few rows.

    Args:
        answers: see `CPUBackend.dense_rows`.
    """
    replaced = head._forward_pre_hooks or head._forward_hooks or "forward" in head.__dict__
    known = type(head) in (nn.Linear, DenseHead) and head.bias is None and type(head.weight) is nn.Parameter
    if known and not replaced and not torch.is_grad_enabled():
        return dense_linear(hidden_states, head.weight, answers)
    logits: torch.Tensor = head(hidden_states)
    return logits


class CausalLMHead(HeadAttributes, ChatGLMPreTrainedModel, compat.ChatGLMGenerationMixin):
    """A network, `transformer`, with the output head that `get_output_embeddings()` returns."""

    transformer: Any

    def tokens_at_once(self) -> int:
        """The most tokens, at any places in a KV cache, that a forward computes in one call of the CPU kernels, which
        reads the weights once; 0 where the modules run one after the other."""
        if self.config._attn_implementation != "sdpa":
            return 0
        blocks = self.get_submodule(self.part_names.blocks)
        return int(self.transformer.run_blocks.most_rows(blocks, self.device))

    @can_return_tuple
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids to logits; the other arguments are those of the network's `forward`.

        Args:
            labels: (batch, tokens), shifted inside; -100 is ignored.
            logits_to_keep: compute the head for the last n positions only (0 = all), or for the given indices; or for
                those where a mask (batch, tokens) of bool is True: the logits are then (positions, vocabulary).
        """
        return self.logits_and_loss(
            labels, logits_to_keep, kwargs, input_ids=input_ids, attention_mask=attention_mask,
            position_ids=position_ids, past_key_values=compat.given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds, use_cache=use_cache,
        )  # fmt: skip

    def logits_and_loss(
        self,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        keywords: Mapping[str, Any],
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, kept tokens, vocabulary) and, with labels, the loss in float32.

        Args:
            labels, logits_to_keep: see `forward`.
            keywords: the caller's other keywords, for the network and the loss.
            inputs: for the network.
        """
        cache = inputs.get("past_key_values")
        on_cpu = not torch.compiler.is_compiling() and self.device.type == "cpu"
        answers = on_cpu and cache is not None and int(cache.get_seq_length()) > 0
        outputs = self.transformer(**inputs, **keywords)
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:]
        elif logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
            hidden_states = hidden_states[logits_to_keep]
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = project(self.get_output_embeddings(), hidden_states, answers)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **keywords)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **compat.named_cache(compat.cache_of(outputs)),
        )


class ClassifierHead(HeadAttributes, ChatGLMPreTrainedModel):
    """A network, `transformer`, with dropout and a linear classifier on the last real token of each sequence."""

    transformer: Any
    classifier_head: nn.Linear
    dropout: nn.Dropout

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Token ids to logits (batch, num_labels); the other arguments are those of the network's `forward`.

        Args:
            labels: (batch,) or (batch, num_labels); the loss follows `config.problem_type`.
        """
        if "cu_seq_lens_q" in kwargs:
            raise ValueError("a classifier looks at the end of each row: give every example a row of its own")
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=compat.given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if attention_mask is not None and attention_mask.dim() == 2:
            # The originals take the last position, which is a padding token in a right-padded row.
            tokens = hidden_states.shape[1]
            last = (attention_mask[:, -tokens:].long() * torch.arange(tokens, device=hidden_states.device)).argmax(-1)
            pooled = hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), last]
        else:
            pooled = hidden_states[:, -1]
        logits = self.classifier_head(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **compat.named_cache(compat.cache_of(outputs)),
        )
