"""The config of a published folder as other engines read it, or the reason why they cannot run the model."""

from __future__ import annotations

from typing import Any, ClassVar

from ..configuration_chatglm import ChatGLMConfig
from ..exports.folders import stop_ids
from ..exports.glm_network import refuse_unfit
from ..tokenization_chatglm import ChatGLMTokenizer


class ServedConfig(ChatGLMConfig):
    """Stands for `ChatGLMConfig` in another engine: gives the config of the right generation, made fit for it."""

    #: Whether the engine's network has the positions of chatglm2-6b-32k.
    knows_stretched_positions: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `ChatGLMConfig.from_dict`. Raises ValueError, with the reason, for a model that the engine cannot run."""
        folder = kwargs.get("name_or_path")
        made = ChatGLMConfig.from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        _fit(config, folder)
        return made


def _fit(config: Any, folder: Any) -> None:
    refuse_unfit(config)
    if config.stretches_positions and config.rope_ratio != 1 and not ServedConfig.knows_stretched_positions:
        raise ValueError(
            "this engine does not stretch positions as chatglm2-6b-32k does: export the model with `python -m "
            "chatglm.export FOLDER OUT --to glm` and serve that"
        )
    if not config.multi_query_attention:
        raise ValueError(
            "multi_query_attention = False: vLLM and SGLang expect another order of the attention's rows; export the "
            "model with `python -m chatglm.export FOLDER OUT --to glm` and serve that"
        )
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"heads of {config.kv_channels} do not fill a hidden size of {config.hidden_size}, as vLLM and SGLang "
            "expect; export the model with `python -m chatglm.export FOLDER OUT --to glm` and serve that"
        )
    config.original_rope = True  # by False, vLLM means a layout of the rotary channels that no ChatGLM has
    if folder and not isinstance(config.eos_token_id, list):
        # ChatGLM3 ends an answer with the role that comes next, which its config.json does not say.
        config.eos_token_id = stop_ids(config, ChatGLMTokenizer.from_pretrained(folder))
