"""The names of the files in a checkpoint folder."""

from __future__ import annotations

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

#: The vocabulary of each generation.
VOCABULARIES = {1: "ice_text.model", 2: "tokenizer.model", 3: "tokenizer.model", 4: "tokenizer.model"}
VOCABULARIES[11] = VOCABULARIES[1]  # VisualGLM-6B

SAFETENSORS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"
INDEX = ".index.json"  # follows the name of weights that are in shards

LORA_CONFIG = "adapter_config.json"
LORA_SAFETENSORS = "adapter_model.safetensors"
LORA_WEIGHTS = (LORA_SAFETENSORS, "adapter_model.bin")
