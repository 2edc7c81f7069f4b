"""The network of ChatGLM2-6B and ChatGLM3-6B.

A pre-norm decoder: RMSNorm, multi-query attention with a fused projection, rotary positions on the first half of each
head, SwiGLU. Parameter names are those of the published checkpoints. Tensors are batch-first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from . import compat, cpu_attention
from .configuration_chatglm import ChatGLM2Config, ChatGLM3Config
from .prefix_encoder import PrefixEncoder, make_prefix_visible
from .pretrained import ChatGLMPreTrainedModel
from .quantization import QuantizedLinear
from .rotary import RotaryTable
from .single_token import BlockLayout, BlockRunner, sees_all

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]


def rotary_angles(length: int, dtype: torch.dtype, device: torch.device, *, config: ChatGLM2Config) -> torch.Tensor:
    """The angles of ChatGLM2 and 3; long-context variants differ in how `rope_ratio` enters."""
    half = config.kv_channels // 2
    base, stretch = 10000.0, 1.0
    if config.stretches_positions:
        stretch = config.rope_ratio  # chatglm2-6b-32k divides the positions
    else:
        base *= config.rope_ratio  # chatglm3-6b-32k and -128k raise the base
        dtype = torch.float32  # generation 3 computed its table in float32 from the start
    frequencies = 1.0 / (base ** (torch.arange(0, half, 2, dtype=dtype, device=device) / half))
    positions = torch.arange(length, dtype=dtype, device=device) / stretch
    return torch.outer(positions, frequencies).float()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs in the first dims of each head.

    Args:
        states: (batch, heads, tokens, head_dim)
        cos, sin: (batch, 1, tokens, rotated dims / 2)
    """
    rotated_dims = 2 * cos.shape[-1]
    even, odd = states[..., 0:rotated_dims:2], states[..., 1:rotated_dims:2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, states[..., rotated_dims:]), dim=-1)


def eager_attention(
    module: ChatGLM2Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain torch; returns (batch, tokens, heads, head_dim) and the weights."""
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(hidden_states.dtype)


def make_norm(config: ChatGLM2Config) -> nn.Module:
    norm = RMSNorm if config.rmsnorm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLM2Attention(nn.Module):
    """Multi-query attention: `multi_query_group_num` key/value heads serve all query heads."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        query_size = self.num_heads * self.head_dim
        key_size = self.num_key_value_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size, query_size + 2 * key_size, bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(query_size, config.hidden_size, bias=config.add_bias_linear)

    def split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, tokens, fused) -> query, key and value, each (batch, heads, tokens, head_dim)"""
        if self.config.multi_query_attention:
            sizes = [self.num_heads, self.num_key_value_heads, self.num_key_value_heads]
            parts = fused.unflatten(-1, (-1, self.head_dim)).split(sizes, dim=2)
        else:  # all three parts of one head stand together
            parts = fused.unflatten(-1, (self.num_heads, 3 * self.head_dim)).chunk(3, dim=-1)
        query, key, value = (part.transpose(1, 2) for part in parts)
        return query, key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: RotaryEmbedding,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split(self.query_key_value(hidden_states))
        cos, sin = (part.unsqueeze(1) for part in rotary)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if prefix_key is not None and prefix_value is not None:
            key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            # One token: the heads of a group become its queries. On a CPU that is 10 times faster than one query each.
            folded = query.view(len(query), self.num_key_value_heads, self.num_key_value_groups, self.head_dim)
            context = F.scaled_dot_product_attention(folded, key, value, attention_mask, scale=self.scaling)
            return self.dense(context.reshape(len(query), 1, -1)), None
        if implementation == "sdpa" and type(self.query_key_value) is QuantizedLinear:
            prompt = cpu_attention.attend(query, key, value, attention_mask, self.scaling, causal=True)
            if prompt is not None:
                return self.dense(prompt), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(context.flatten(2)), weights


class ChatGLM2MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202); the gate is the first half of the fused projection."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self._activate(self.dense_h_to_4h(hidden_states)))

    @staticmethod
    def _activate(fused: torch.Tensor) -> torch.Tensor:  # a function, so that `fused` is freed before the next product
        gate, up = fused.chunk(2, dim=-1)
        return F.silu(gate) * up


class ChatGLM2Block(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.dropout = config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = ChatGLM2MLP(config)

    def parts(self) -> tuple[nn.Module, ...]:
        """For `BlockRunner`."""
        attention, mlp = self.self_attention, self.mlp
        norms = self.input_layernorm, self.post_attention_layernorm
        return *norms, attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h, attention, mlp

    # The prefix is positional so that reentrant checkpointing carries its gradient; so is the cache, which
    # transformers takes away where it finds it among the keywords (see ChatGLMPreTrainedModel.cache_to_fill).
    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None = None,
        prefix_value: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        attention_mask: torch.Tensor | None,
        rotary: RotaryEmbedding,
        **kwargs: Any,
    ) -> torch.Tensor:
        dtype = rotary[0].dtype  # the residual stream may be wider: fp32_residual_connection
        normed = self.input_layernorm(hidden_states)
        residual = normed if self.residual_after_norm else hidden_states
        attended, _ = self.self_attention(
            normed.to(dtype), prefix_key, prefix_value, attention_mask, rotary, past_key_values, **kwargs
        )
        hidden_states = residual + F.dropout(attended, p=self.dropout, training=self.training)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.residual_after_norm else hidden_states
        return residual + F.dropout(self.mlp(normed.to(dtype)), p=self.dropout, training=self.training)


class Embedding(nn.Module):
    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


def block_layout(config: ChatGLM2Config) -> BlockLayout:
    """For `BlockRunner`: where `ChatGLM2Attention.split` finds its parts, and `apply_rotary` its pairs."""
    size, heads, kv_heads = config.kv_channels, config.num_attention_heads, config.num_key_value_heads
    apart = config.multi_query_attention
    return BlockLayout(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        query_step=size if apart else 3 * size,
        key_start=heads * size if apart else size,
        value_start=(heads + kv_heads) * size if apart else 2 * size,
        key_step=size if apart else 3 * size,
        distance=1,
        norm=RMSNorm if config.rmsnorm else nn.LayerNorm,
        gated=True,
        residual_normed=config.apply_residual_connection_post_layernorm,
    )


class Encoder(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChatGLM2Block(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()


class ChatGLM2PreTrainedModel(ChatGLMPreTrainedModel):
    config: ChatGLM2Config
    config_class = ChatGLM2Config
    _no_split_modules = ["ChatGLM2Block"]
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """Token ids to hidden states. Holds the output layer too, as the published checkpoints do."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryTable(
            partial(rotary_angles, config=config), config.seq_length, config.rope_precision
        )
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.run_blocks = BlockRunner(block_layout(config))
        self.prefix_encoder: PrefixEncoder | None = None
        if config.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder = self.make_prefix_encoder(config.pre_seq_len, config.prefix_projection)
        self.post_init()

    def make_prefix_encoder(self, pre_seq_len: int, projection: bool) -> PrefixEncoder:
        """A prefix for this network, not yet part of it."""
        config = self.config
        return PrefixEncoder(
            pre_seq_len,
            config.num_layers,
            config.num_key_value_heads,
            config.kv_channels,
            embedding_size=config.num_layers * 2 * config.num_key_value_heads * config.kv_channels,
            projection_size=config.hidden_size if projection else None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, tokens), or give `inputs_embeds` (batch, tokens, hidden).
            attention_mask: (batch, past + tokens), 1 for real tokens and 0 for padding; or a prepared 4-D mask.
            position_ids: (batch, tokens); if absent, counted from the cache's length, or by a mask's ones.
            past_key_values: any transformers `Cache`; the trained prefix is never in it.
            cache: another name of `past_key_values`, as transformers has it from 5.24 on.

        Raises:
            TypeError: a keyword is unknown (see `compat.FORWARD_KEYWORDS`).
        """
        compat.check_keywords("ChatGLM2Model.forward", kwargs, self.config._attn_implementation)
        past_key_values = self.cache_to_fill(compat.given_cache(past_key_values, cache), use_cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        if isinstance(attention_mask, torch.Tensor):  # of a split model, the embeddings may be elsewhere
            attention_mask = attention_mask.to(inputs_embeds.device)
        batch_size, tokens = inputs_embeds.shape[:2]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + past).unsqueeze(0)
            if attention_mask is not None and attention_mask.dim() == 2:
                # Left pads take no position: they would move the text away from a trained prefix, which has none.
                places = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                position_ids = places.gather(1, position_ids.expand(batch_size, -1))

        # position_ids stay out of it: transformers would read restarting positions as packed sequences.
        mask = compat.causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            past_key_values,
            allow_is_causal_skip=self.prefix_encoder is None or tokens == 1,
        )
        prefix: list[Any] = [(None, None)] * self.config.num_layers
        if self.prefix_encoder is not None:
            prefix = self.prefix_encoder(batch_size, inputs_embeds.dtype)
            mask = make_prefix_visible(mask, self.prefix_encoder.pre_seq_len)

        rotary = self.rotary_pos_emb(position_ids, inputs_embeds.dtype)
        hidden_states = inputs_embeds.float() if self.config.fp32_residual_connection else inputs_embeds
        hidden_states = self.run_blocks(
            self.encoder.layers,
            hidden_states,
            prefix,
            [rotary],
            sees_all(attention_mask, mask, past_key_values) and self.config._attn_implementation == "sdpa",
            attention_mask=mask,
            rotary=rotary,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        hidden_states = self.encoder.final_layernorm(hidden_states).to(inputs_embeds.dtype)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **compat.named_cache(past_key_values))


class ChatGLM2ForCausalLM(ChatGLM2PreTrainedModel, compat.ChatGLMGenerationMixin):
    """Token ids to logits over the vocabulary."""

    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}
    _tp_plan = {"transformer.output_layer": "colwise_gather_output"}
    _pp_plan = {"transformer.output_layer": (["hidden_states"], ["logits"])}

    def __init__(self, config: ChatGLM2Config, empty_init: bool = True) -> None:
        """`empty_init` is accepted for the originals' callers; weights are initialised when they are not loaded."""
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()
        if config.tie_word_embeddings:
            self._tp_plan.pop("transformer.output_layer", None)  # see ChatGLM1ForCausalLM

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.output_layer = new_embeddings

    def positions_from(
        self, input_ids: torch.Tensor, start: int, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Position ids of the tokens from index `start` on, given the whole sequences (batch, tokens)."""
        if attention_mask is None:
            return torch.arange(start, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]

    def reusable_prefix(self, input_ids: list[int], common: int) -> int:
        """How many of `common` cached leading tokens hold for `input_ids`: all, as no token sees a later one."""
        return common

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
        return_last_logit: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See `ChatGLM2Model.forward`.

        Args:
            labels: (batch, tokens), shifted inside; -100 is ignored.
            logits_to_keep: compute the head for the last n positions only (0 = all), or for the given indices.
            return_last_logit: the originals' name for `logits_to_keep=1`.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=compat.given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return self._head_outputs(
            outputs, self.transformer.output_layer, labels, 1 if return_last_logit else logits_to_keep, **kwargs
        )


class ChatGLM2ForSequenceClassification(ChatGLM2PreTrainedModel):
    """A classifier on the last real token of each sequence."""

    # The head for generation stays in the checkpoint but is not used here.
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLM2Config, empty_init: bool = True) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels, bias=True)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()

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
        """See `ChatGLM2Model.forward`; logits are (batch, num_labels), the loss follows `config.problem_type`."""
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
            # The originals take the last position, which right padding would make a padding token.
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


class ChatGLM3ForSequenceClassification(ChatGLM2ForSequenceClassification):
    """The same classifier for checkpoints of generation 3."""

    config: ChatGLM3Config
    config_class = ChatGLM3Config
