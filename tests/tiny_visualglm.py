"""Tiny VisualGLMs with random weights, and pictures to show them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chatglm import VisualGLMConfig, VisualGLMForConditionalGeneration

EVA = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "inner_hidden_size": 64, "image_size": [28, 28],
    "patch_size": 14,
}  # fmt: skip
QFORMER = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "is_decoder": [True, False]}


def tiny_visualglm(tokenizer: Any, **changes: Any) -> VisualGLMForConditionalGeneration:
    """A model for a tokenizer of generation 1's vocabulary."""
    get = tokenizer.get_command
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
        "inner_hidden_size": 64, "max_sequence_length": 512, "bos_token_id": get("<sop>"),
        "eos_token_id": get("<eop>"), "mask_token_id": get("[MASK]"), "gmask_token_id": get("[gMASK]"),
        "pad_token_id": 3, "eva_config": EVA, "qformer_config": QFORMER,
    }  # fmt: skip
    torch.manual_seed(0)
    model = VisualGLMForConditionalGeneration(VisualGLMConfig(**sizes | changes)).float()
    with torch.no_grad():  # large enough that pictures change the answers
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.add_(torch.randn_like(parameter) * (0.3 if "image_encoder" in name else 0.1))
    return model.eval()


def picture_bytes(
    colour: Any = (200, 30, 30), size: tuple[int, int] = (20, 30), kind: str = "PNG", **options: Any
) -> bytes:
    """The file of a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


def picture_file(folder: Path, name: str = "red.png", **options: Any) -> Path:
    path = folder / name
    path.write_bytes(picture_bytes(**options))
    return path
