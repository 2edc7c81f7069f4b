"""Fresh P-tuning prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from chatglm import adapters
from tiny_adapters import VERSIONS, tiny


@pytest.mark.parametrize("version", VERSIONS)
def test_a_fresh_prefix_starts_as_the_originals(version: int, tmp_path: Path) -> None:
    """Torch's own initialisation, even through `from_pretrained`: the originals' learning rates assume it."""
    tiny(version).save_pretrained(tmp_path)
    for projection in (False, True):
        model = tiny(version)
        adapters.add_prefix(model, 64, projection)
        config = AutoConfig.from_pretrained(tmp_path, pre_seq_len=64, prefix_projection=projection)
        for one in (model, AutoModel.from_pretrained(tmp_path, config=config)):
            encoder = one.transformer.prefix_encoder
            assert 0.9 < encoder.embedding.weight.std() < 1.1
            for layer in encoder.trans or ():
                if isinstance(layer, torch.nn.Linear):
                    bound = layer.in_features**-0.5
                    assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
