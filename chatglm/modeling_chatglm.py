"""The network of ChatGLM-6B, the first generation.

GLM blocks (https://arxiv.org/abs/2103.10360): tokens before `<sop>` attend to each other in both directions, tokens
after it only to earlier ones. Positions have two parts: the place in the context, and a count over the answer.
Residuals start from the normalised input (DeepNorm, https://arxiv.org/abs/2203.00555). Parameter names are those of the
published checkpoints. Tensors are batch-first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from . import cpu_path
from .adapters.model_methods import AdapterMethods
from .configuration_chatglm import ChatGLM1Config
from .cpu_path import BlockLayout, BlockParts, BlockRunner, sees_all
from .network import compat, glm
from .network.attribute_names import FromConfig
from .network.backbone import Backbone
from .network.packed import Packed, take_packed
from .network.pretrained import ChatGLMPreTrainedModel, PartNames
from .network.rotary import RotaryTable

#: (cos, sin) for the place in the context and, with 2-D positions, for the place in the answer.
RotaryEmbeddings = list[tuple[torch.Tensor, torch.Tensor]]

# The originals leave the block's depth at its default of 28 whatever num_layers is, so alpha is a constant.
RESIDUAL_SCALE = (2 * 28) ** 0.5


def rotary_angles(length: int, dtype: torch.dtype, device: torch.device, *, dim: int) -> torch.Tensor:
    # The published frequencies are float16 (a buffer of the checkpoint), whatever the model's dtype is.
    frequencies = (1.0 / (10000.0 ** (torch.arange(0, dim, 2, device=device).float() / dim))).half().to(dtype)
    return torch.outer(torch.arange(length, dtype=dtype, device=device), frequencies)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate dim i with dim i + half.

    Args:
        states: (batch, heads, tokens, dims)
        cos, sin: (batch, 1, tokens, dims / 2)
    """
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention(
    module: ChatGLM1Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain torch; returns (batch, tokens, heads, head_dim) and the weights."""
    # Deep layers have large scores: the depth is divided out before the half-precision product, as in the originals.
    depth = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / depth), key.transpose(2, 3)).float() * depth
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class ChatGLM1Attention(nn.Module):
    def __init__(self, config: ChatGLM1Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False  # the mask decides what is visible; without one, everything is
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        rotary: RotaryEmbeddings,
        past_key_values: Cache | None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)  # each (batch, heads, tokens, head_dim)
        query, key = self._rotate(query, rotary), self._rotate(key, rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if packed is not None:
            alone = partial(attend, self, dropout=0.0, scaling=self.scaling, **kwargs)
            apart = packed.attend(alone, (query, key, value), (prefix_key, prefix_value), attention_mask)
            return self.dense(apart.flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if prefix_key is not None and prefix_value is not None:
            key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        prompt = cpu_path.attend(self, query, key, value, attention_mask)
        if prompt is not None:
            return self.dense(prompt), None
        if self.config._attn_implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            attend = eager_attention  # for one token, torch's fused attention is three times slower on a CPU
        context, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.dense(context.flatten(2)), weights

    @staticmethod
    def _rotate(states: torch.Tensor, rotary: RotaryEmbeddings) -> torch.Tensor:
        """Rotates each share of a head by its own kind of position."""
        shares = states.chunk(len(rotary), dim=-1)
        rotated = [
            apply_rotary(share, cos.unsqueeze(1), sin.unsqueeze(1))
            for share, (cos, sin) in zip(shares, rotary, strict=True)
        ]
        return torch.cat(rotated, dim=-1)


class ChatGLM1MLP(nn.Module):
    def __init__(self, config: ChatGLM1Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLM1Block(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM1Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLM1Attention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLM1MLP(config)

    def parts(self) -> BlockParts:
        attention, mlp = self.attention, self.mlp
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
        rotary: RotaryEmbeddings,
        **kwargs: Any,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(
            normed, prefix_key, prefix_value, attention_mask, rotary, past_key_values, **kwargs
        )
        normed = self.post_attention_layernorm(normed * RESIDUAL_SCALE + attended)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


def block_layout(config: ChatGLM1Config) -> BlockLayout:
    """The layout for `BlockRunner`: heads as `ChatGLM1Attention` splits them, pairs as `apply_rotary` takes them."""
    size = config.head_dim
    return BlockLayout(
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=size,
        query_step=3 * size,
        key_start=size,
        value_start=2 * size,
        key_step=3 * size,
        distance=size // (4 if config.position_encoding_2d else 2),
        norm=nn.LayerNorm,
        gated=False,
        residual_normed=True,
        residual_scale=RESIDUAL_SCALE,
    )


class ChatGLM1PreTrainedModel(AdapterMethods, glm.GLMMethods, ChatGLMPreTrainedModel):
    config: ChatGLM1Config
    config_class = ChatGLM1Config
    part_names = PartNames(
        embeddings="transformer.word_embeddings",
        rotary="transformer.rotary_emb",
        prefix="transformer.prefix_encoder",
        final_norm="transformer.final_layernorm",
        heads=("lm_head",),
        blocks="transformer.layers",
    )
    _no_split_modules = ["ChatGLM1Block"]
    _supports_flash_attn = False  # flash attention takes no prefix-LM mask
    _can_record_outputs = {"hidden_states": ChatGLM1Block, "attentions": ChatGLM1Attention}


class ChatGLM1Model(ChatGLM1PreTrainedModel, Backbone):
    """Token ids to hidden states."""

    inner_hidden_size = FromConfig()

    def __init__(self, config: ChatGLM1Config) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = 2 if config.position_encoding_2d else 1
        self.rotary_emb = RotaryTable(
            partial(rotary_angles, dim=config.head_dim // kinds), config.max_sequence_length, config.rope_precision
        )
        self.layers = nn.ModuleList(ChatGLM1Block(config, layer_idx) for layer_idx in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.run_blocks = BlockRunner(block_layout(config))
        self.add_configured_prefix()
        self.post_init()

    @property
    def prefix_embedding_size(self) -> int:
        return self.config.hidden_size

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

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
        positions_behind_cache: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, tokens), or give `inputs_embeds` (batch, tokens, hidden), in which the embeddings of
                `[gMASK]` and `<sop>` are recognised.
            attention_mask: (batch, past + tokens), 0 for padding; or (batch, 1, tokens, keys), boolean with True =
                hidden as the original tokenizer makes it, or additive. Without one, the mask follows from `<sop>`.
            position_ids: (batch, 2, tokens), see `get_position_ids`; by default computed from `input_ids`, which then
                are whole texts. What a cache holds before them (the vectors of PEFT's prefix tuning) counts as context.
            positions_behind_cache: the same, but the place in the context counts from the end of the cache, and
                embeddings in front of the tokens are not counted yet. `generate` gives positions in this form.
            past_key_values: any transformers `Cache`; the trained prefix is never in it.
            cache: transformers' name for `past_key_values` since 5.24.
            kwargs: `cu_seq_lens_q` says where several examples in one row begin and end, see `network/packed.py`.

        Raises:
            TypeError: a keyword is unknown (see `compat.FORWARD_KEYWORDS`).
            ValueError: `[gMASK]` or `<sop>` is missing and the mask or the positions have to be computed from it.
        """
        inputs_embeds, attention_mask = self.embed(
            self.word_embeddings, input_ids, inputs_embeds, attention_mask, kwargs
        )
        given = compat.given_cache(past_key_values, cache)
        packed = take_packed(kwargs, inputs_embeds, attention_mask, given, self.config._attn_implementation)
        past_key_values = self.cache_to_fill(given, None, use_cache and packed is None)
        if input_ids is None:
            input_ids = glm.marks_in(inputs_embeds, self.word_embeddings, self.config)
        input_ids = input_ids.to(inputs_embeds.device)
        mask: Any
        if packed is not None:
            position_ids, mask = glm.of_packed(packed, input_ids, position_ids, inputs_embeds, self.config)
            kwargs["packed"] = packed
        else:
            if position_ids is None:
                position_ids = glm.positions_of_call(
                    input_ids, attention_mask, positions_behind_cache, past_key_values, self.config
                )
            mask = glm.additive_mask(
                input_ids, attention_mask, past_key_values, inputs_embeds, position_ids, self.config
            )
        prefix, mask = self.prefix_for(inputs_embeds, mask, packed, past_key_values)

        kinds = position_ids.unbind(1) if position_ids.dim() == 3 else (position_ids,)
        if len(kinds) != (2 if self.config.position_encoding_2d else 1):
            raise ValueError(
                f"position_ids of shape {tuple(position_ids.shape)}: ChatGLM-6B takes (batch, 2, tokens), the place in "
                "the context and in the answer; leave them out to have them computed, or see get_position_ids()."
            )
        rotary = [self.rotary_emb(kind, inputs_embeds.dtype) for kind in kinds]
        hidden_states = inputs_embeds
        hidden_states = self.run_blocks(
            self.layers,
            hidden_states,
            prefix,
            rotary,
            self.config._attn_implementation == "sdpa"
            and packed is None
            and (
                sees_all(attention_mask, mask, past_key_values)
                or (attention_mask is None and glm.continues(input_ids, past_key_values, position_ids, self.config))
            ),
            attention_mask=mask,
            rotary=rotary,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **compat.named_cache(past_key_values))


class ChatGLM1ForCausalLM(ChatGLM1PreTrainedModel, glm.GLMHead):
    """Token ids to logits over the vocabulary. The head is tied to the embeddings unless the config says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: ChatGLM1Config, empty_init: bool = True) -> None:
        """`empty_init` is accepted for the originals' callers; weights are initialised when they are not loaded."""
        super().__init__(config)
        self.transformer = ChatGLM1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.pre_seq_len is not None:
            self.lm_head.requires_grad_(False)
        self.post_init()
        if config.tie_word_embeddings:
            self._tp_plan.pop("lm_head", None)  # one tensor cannot be both whole, for the lookup, and split

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def positions_from(
        self, input_ids: torch.Tensor, start: int, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Position ids of the tokens from index `start` on, given the whole sequences (batch, tokens)."""
        return self.transformer.get_position_ids(input_ids, attention_mask)[..., start:]

    def reusable_prefix(self, input_ids: list[int], common: int) -> int:
        """How many of the first `common` cached tokens hold for `input_ids`: context tokens see the whole context, so
        none if that does not end among them, with `<sop>`."""
        return common if self.config.bos_token_id in input_ids[:common] else 0
