"""What a config says about quantisation, and configs that contradict their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

import chatglm
from chatglm import ChatGLMQuantizationConfig
from quantized import folder_of, logits_of, quantized_layers


@pytest.mark.parametrize(
    ("values", "words"),
    [({"bits": 3}, "bits is 3"), ({"quantize_head": 2}, "bits is 2"), ({"precision": "fp8"}, "precision is 'fp8'")],
)
def test_settings_that_mean_nothing(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChatGLMQuantizationConfig(**values)


def test_a_config_that_only_claims_to_be_quantised() -> None:
    """Float weights are never read into INT8 layers."""
    message = r"to quantise one, load it with quantization_config=ChatGLMQuantizationConfig"
    config = AutoConfig.from_pretrained(folder_of(3))
    config.quantization_bit = 8
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder_of(3), config=config)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder_of(3), quantization_bit=8)
    config = type(config)(**(config.to_dict() | {"quantization_config": None}))
    with pytest.raises(ValueError, match=r"says that this checkpoint is quantised, but .* give quantization_config"):
        AutoModel.from_pretrained(folder_of(3), config=config)


def test_a_config_makes_a_quantised_model() -> None:
    """The constructor, as the originals' does, with the config of a quantised checkpoint."""
    config = AutoConfig.from_pretrained(folder_of(1))
    config = type(config)(**(config.to_dict() | {"quantization_bit": 4, "quantization_embeddings": True}))
    model = chatglm.ChatGLM1ForConditionalGeneration(config)
    assert len(quantized_layers(model)) == 4 * config.num_layers + 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    done = AutoModel.from_pretrained(folder_of(1), dtype=torch.float32).quantize(4, quantize_embeddings=True)
    model.load_state_dict(done.state_dict())
    assert torch.equal(logits_of(model.eval()), logits_of(done))
