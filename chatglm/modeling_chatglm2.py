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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from . import cpu_path
from .adapters.model_methods import AdapterMethods
from .configuration_chatglm import ChatGLM2Config
from .cpu_path import BlockLayout, BlockParts, BlockRunner, sees_all
from .network import compat
from .network.attribute_names import DecoderAttributes, FromConfig
from .network.backbone import Backbone
from .network.heads import CausalLMHead
from .network.layers import Embedding, RMSNorm, apply_rotary, eager_attention, make_norm
from .network.packed import Packed, take_packed
from .network.pretrained import ChatGLMPreTrainedModel, PartNames
from .network.rotary import RotaryTable

RotaryEmbedding = tuple[torch.Tensor, torch.Tensor]


def rotary_angles(length: int, dtype: torch.dtype, device: torch.device, *, config: ChatGLM2Config) -> torch.Tensor:
    """The angles of ChatGLM2 and ChatGLM3; their long-context variants use `rope_ratio` differently."""
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
        else:  # all three parts of one head are adjacent
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
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.split(self.query_key_value(hidden_states))
        cos, sin = (part.unsqueeze(1) for part in rotary)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        implementation = self.config._attn_implementation
        attend = partial(
            ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention),
            self,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if packed is not None:
            apart = packed.attend(attend, (query, key, value), (prefix_key, prefix_value), attention_mask)
            return self.dense(apart.flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if prefix_key is not None and prefix_value is not None:
            key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        if implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            # One token: the heads of a group become its queries. On a CPU that is 10 times faster than one query each.
            folded = query.view(len(query), self.num_key_value_heads, self.num_key_value_groups, self.head_dim)
            context = F.scaled_dot_product_attention(folded, key, value, attention_mask, scale=self.scaling)
            return self.dense(context.reshape(len(query), 1, -1)), None
        prompt = cpu_path.attend(self, query, key, value, attention_mask)
        if prompt is not None:
            return self.dense(prompt), None
        context, weights = attend(query, key, value, attention_mask)
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

    def parts(self) -> BlockParts:
        attention, mlp = self.self_attention, self.mlp
        return BlockParts(
            input_norm=self.input_layernorm,
            post_attention_norm=self.post_attention_layernorm,
            fused=attention.query_key_value,
            dense=attention.dense,
            up=mlp.dense_h_to_4h,
            down=mlp.dense_4h_to_h,
            attention=attention,
            mlp=mlp,
        )

    # The prefix is positional so that reentrant checkpointing carries its gradient. So is the cache, because
    # transformers drops one that is passed as a keyword (see Backbone.cache_to_fill).
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


def block_layout(config: ChatGLM2Config) -> BlockLayout:
    """The layout for `BlockRunner`: parts as `ChatGLM2Attention.split` finds them, pairs as `apply_rotary` does."""
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


class ChatGLM2PreTrainedModel(AdapterMethods, DecoderAttributes, ChatGLMPreTrainedModel):
    other_names = {r"^(?:transformer\.)?lm_head\.": "transformer.output_layer."}  # as in transformers' own models
    config: ChatGLM2Config
    config_class = ChatGLM2Config
    part_names = PartNames(
        embeddings="transformer.embedding.word_embeddings",
        rotary="transformer.rotary_pos_emb",
        prefix="transformer.prefix_encoder",
        final_norm="transformer.encoder.final_layernorm",
        heads=("transformer.output_layer", "lm_head"),
        blocks="transformer.encoder.layers",
    )
    _no_split_modules = ["ChatGLM2Block"]
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}


class ChatGLM2Model(ChatGLM2PreTrainedModel, Backbone):
    """Token ids to hidden states. Holds the output layer too, as the published checkpoints do."""

    multi_query_group_num, kv_channels, seq_length = FromConfig(), FromConfig(), FromConfig()

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryTable(
            partial(rotary_angles, config=config), config.seq_length, config.rope_precision
        )
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.run_blocks = BlockRunner(block_layout(config))
        self.add_configured_prefix()
        self.post_init()

    @property
    def prefix_embedding_size(self) -> int:
        return self.config.num_layers * 2 * self.config.num_key_value_heads * self.config.kv_channels

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
            position_ids: (batch, tokens); by default they continue from the cache's length, or count a mask's ones.
            past_key_values: any transformers `Cache`; the trained prefix is never in it.
            cache: transformers' name for `past_key_values` since 5.24.
            kwargs: `cu_seq_lens_q` says where several examples in one row begin and end, see `network/packed.py`.

        Raises:
            TypeError: a keyword is unknown (see `compat.FORWARD_KEYWORDS`).
        """
        inputs_embeds, attention_mask = self.embed(self.embedding, input_ids, inputs_embeds, attention_mask, kwargs)
        given = compat.given_cache(past_key_values, cache)
        packed = take_packed(kwargs, inputs_embeds, attention_mask, given, self.config._attn_implementation)
        past_key_values = self.cache_to_fill(given, None, use_cache and packed is None)
        batch_size, tokens = inputs_embeds.shape[:2]
        if position_ids is None and packed is not None:
            position_ids = packed.positions
        elif position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + past).unsqueeze(0)
            if attention_mask is not None and attention_mask.dim() == 2:
                # Left padding takes no position: it would move the text away from a trained prefix, which has none.
                places = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                position_ids = places.gather(1, position_ids.expand(batch_size, -1))

        # Without position_ids: transformers would take positions that restart for packed sequences.
        make_mask = partial(
            compat.causal_mask, self.config, allow_is_causal_skip=self.prefix_encoder is None or tokens == 1
        )
        mask: Any
        if packed is None:
            mask = make_mask(inputs_embeds, attention_mask, past_key_values)
        else:  # of the embeddings, only the shape matters
            mask = [make_mask(inputs_embeds.new_empty(*group.index.shape, 0), None, None) for group in packed.groups]
            kwargs["packed"] = packed
        prefix, mask = self.prefix_for(inputs_embeds, mask, packed, past_key_values)

        rotary = self.rotary_pos_emb(position_ids, inputs_embeds.dtype)
        hidden_states = inputs_embeds.float() if self.config.fp32_residual_connection else inputs_embeds
        hidden_states = self.run_blocks(
            self.encoder.layers,
            hidden_states,
            prefix,
            [rotary],
            self.config._attn_implementation == "sdpa"
            and packed is None
            and (attention_mask is None or sees_all(attention_mask, mask, past_key_values)),
            attention_mask=mask,
            rotary=rotary,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **kwargs,
        )
        hidden_states = self.encoder.final_layernorm(hidden_states).to(inputs_embeds.dtype)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **compat.named_cache(past_key_values))


class ChatGLM2ForCausalLM(ChatGLM2PreTrainedModel, CausalLMHead):
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
        """How many of the first `common` cached tokens hold for `input_ids`: all, as no token sees a later one."""
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
        """As `CausalLMHead.forward`. `return_last_logit` is the originals' name for `logits_to_keep=1`."""
        return self.logits_and_loss(
            labels, 1 if return_last_logit else logits_to_keep, kwargs, input_ids=input_ids,
            attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=compat.given_cache(past_key_values, cache), inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )  # fmt: skip
