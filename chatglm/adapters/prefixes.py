"""P-tuning prefixes: creates them, and attaches them from files."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from ..checkpoints.adapters import Prefix, describe
from ..checkpoints.files import ModelLoadError
from ..network.prefix_encoder import PrefixEncoder
from .bases import fingerprint, same_base
from .switching import check_name


def add_prefix(
    model: PreTrainedModel, pre_seq_len: int, prefix_projection: bool = False, name: str = "default"
) -> PrefixEncoder:
    """Adds a fresh float32 prefix to train, on the device of the embeddings; makes it current and freezes all else.

    Args:
        pre_seq_len: number of prefix positions.
        prefix_projection: compute it with a small MLP from a narrower table.
        name: the prefix's name, used to switch to it.

    Raises:
        ValueError: the name is taken, or the length is not 1 or more.
    """
    if isinstance(pre_seq_len, bool) or int(pre_seq_len) != pre_seq_len or pre_seq_len < 1:
        raise ValueError(f"pre_seq_len must be 1 or more prefix positions, not {pre_seq_len!r}")
    check_name(model, name)
    encoder: PrefixEncoder = model.base_model.make_prefix_encoder(int(pre_seq_len), bool(prefix_projection))
    encoder.float()
    encoder.base_fingerprint = fingerprint(model)
    model.adapter_slots.add_prefix(name, encoder)
    return encoder


def attach_prefix(model: PreTrainedModel, prefix: Prefix, name: str) -> None:
    """Attaches a prefix that was read from its files. Raises ModelLoadError if it does not fit."""
    with torch.device("meta"):
        encoder: PrefixEncoder = model.base_model.make_prefix_encoder(prefix.length, prefix.projection)
    wanted = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in prefix.tensors.items()}
    if wanted != given:
        theirs = f", {describe(prefix.config)}" if prefix.config else ""
        raise ModelLoadError(
            f"the prefix {prefix.path} is for another model{theirs}: it has {given}, "
            f"this one ({describe(model.config.to_dict())}) needs {wanted}"
        )
    # Float32 even beside half-precision weights, as it was trained. A copy, because the file may be overwritten.
    copies = {key: tensor.to(torch.float32, copy=True) for key, tensor in prefix.tensors.items()}
    encoder.load_state_dict(copies, assign=True)
    ours, recorded = fingerprint(model), prefix.config.get("base_fingerprint")
    if not same_base(ours, recorded):
        base = prefix.config.get("base_model_name_or_path")
        warnings.warn(
            f"the prefix {prefix.path} was trained on other weights than these"
            + (f" ({base})" if base else "")
            + ": its answers may be much worse here",
            stacklevel=4,
        )
    encoder.base_fingerprint = recorded or ours
    model.adapter_slots.add_prefix(name, encoder)
