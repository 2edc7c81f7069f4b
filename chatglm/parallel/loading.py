"""Loads a model over processes: each reads only the rows that it holds, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizer

from ..adapters.attaching import attach
from ..adapters.switching import use_adapter
from ..checkpoints.adapters import Lora
from ..checkpoints.files import ModelLoadError, check_vocabulary, refuse_missing
from ..exports.source import Tensors, renamer
from ..loading.dtypes import choose_dtype
from ..loading.placement import skeleton
from ..loading.plan import Plan, make_plan
from ..loading.reading import cast, read_tokenizer
from ..network.rotary import RotaryTable
from ..quantization.layers import QuantizedLayer, QuantizedLinear
from .group import Group
from .layers import ShardedLinear


def load_parallel(
    path_or_id: str | os.PathLike[str] | None, group: Group, dtype: str | torch.dtype = "auto", **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """`chatglm.load` in the first process of a group; the others call `work` with the same arguments. CPU only.

    The network, embeddings, caches and prefixes are in this process, a share of every matrix in each.

    Args:
        options: `quantize`, `adapter`, `revision`, `chatglm_version` and `local_files_only` of `chatglm.load`.

    Raises:
        ValueError: an adapter is LoRA, or as `chatglm.load`.
        ParallelError: another process has ended.
        ModelLoadError: as `chatglm.load`.
    """
    plan = _plan(path_or_id, options)
    kind = choose_dtype(dtype, torch.device("cpu"), plan.weights)
    check_vocabulary(plan.folder, plan.config.chatglm_version)
    tokenizer = read_tokenizer(plan.folder, plan.config.chatglm_version)
    model: Any = skeleton(plan.config, plan.quantization)
    tensors = _tensors(plan, model)
    for index, (name, module) in enumerate(list(_matrices(model))):
        part = _share(tensors, name, module, group).to(kind).eval()
        parent, _, last = name.rpartition(".")
        # A bias is read by `_fill`: prefixes know their base by it.
        sharded = ShardedLinear(part, group, index, module.in_features, module.out_features, module.bias)
        setattr(model.get_submodule(parent), last, sharded)
    _fill(model, tensors)
    cast(model, kind)
    if (plan.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(plan.folder)
    model.name_or_path = str(plan.folder)
    attached = [attach(model, adapter, name) for name, adapter in plan.adapters]
    if attached:
        use_adapter(model, attached[0])
    group.wait()
    return model.eval(), tokenizer


def work(
    path_or_id: str | os.PathLike[str] | None, group: Group, dtype: str | torch.dtype = "auto", **options: Any
) -> None:
    """Holds this process's rows of the matrices and multiplies by them until the first process ends.

    Arguments and errors: as `load_parallel`.
    """
    plan = _plan(path_or_id, options)
    kind = choose_dtype(dtype, torch.device("cpu"), plan.weights)
    model = skeleton(plan.config, plan.quantization)
    tensors = _tensors(plan, model)
    layers = [_share(tensors, name, module, group).to(kind).eval() for name, module in _matrices(model)]
    group.wait()
    group.serve(layers)


def _plan(path_or_id: str | os.PathLike[str] | None, options: dict[str, Any]) -> Plan:
    plan = make_plan(path_or_id, **options)
    for _, adapter in plan.adapters:
        if isinstance(adapter, Lora):
            raise ValueError(
                f"{adapter.path} is a LoRA adapter, which tensor parallelism does not split: merge it first, with "
                "`python -m chatglm.export BASE OUT --to merged --adapter ADAPTER`"
            )
    return plan


def _tensors(plan: Plan, model: PreTrainedModel) -> Tensors:
    return Tensors(plan.folder, renamer(getattr(type(model), "other_names", {})))


def _matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """The matrices that processes share, in the same order in each: all but a prefix's, and a head that is tied."""
    for name, module in model.named_modules():
        prefix = name.startswith(f"{model.part_names.prefix}.")
        if isinstance(module, nn.Linear) and not prefix and f"{name}.weight" not in model.all_tied_weights_keys:
            yield name, module


def _share(tensors: Tensors, name: str, module: Any, group: Group) -> nn.Module:
    """The layer with this process's rows of a matrix. Quantised rows are those of the whole matrix: a scale is a row's.

    Raises:
        ModelLoadError: the checkpoint lacks the matrix.
    """
    first, last = group.bounds(module.out_features)

    def rows(part: str) -> torch.Tensor:
        return _tensor(tensors, f"{name}.{part}")[first:last].clone()

    share: Any
    if isinstance(module, QuantizedLinear):
        share = QuantizedLinear(
            module.in_features, last - first, False, bits=module.bits, precision=module.precision, device="meta"
        )
        _set_quantized(share, rows("weight"), lambda: rows("weight_scale"))
    else:
        share = type(module)(module.in_features, last - first, bias=False, device="meta")
        share.weight = nn.Parameter(rows("weight"), requires_grad=False)
    if module.bias is not None:
        share.bias = nn.Parameter(rows("bias"), requires_grad=False)
    return share


def _set_quantized(layer: QuantizedLayer, weight: torch.Tensor, scale: Any) -> None:
    """Puts weights in: packed ones with their scales as they are, others rounded here."""
    if weight.dtype == torch.int8:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale(), requires_grad=False)
    else:
        layer.set_weight(weight, "cpu")


def _fill(model: Any, tensors: Tensors) -> None:
    """Reads what the first process holds alone: embeddings, norms, biases, a prefix; computes rotary tables."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RotaryTable):
            module.to_empty(device="cpu")
            module.reset()
        elif isinstance(module, QuantizedLayer) and module.weight.is_meta:
            _set_quantized(
                module,
                _tensor(tensors, f"{name}.weight").clone(),
                lambda name=name: _tensor(tensors, f"{name}.weight_scale").clone(),
            )
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and name not in model.all_tied_weights_keys:
            parent, _, last = name.rpartition(".")
            whole = nn.Parameter(_tensor(tensors, name).clone(), requires_grad=False)
            if whole.shape != parameter.shape:
                raise ModelLoadError(f"{name} in {tensors.folder} does not have the shape that config.json says")
            setattr(model.get_submodule(parent), last, whole)
    model.tie_weights()


def _tensor(tensors: Tensors, name: str) -> torch.Tensor:
    refuse_missing(tensors.folder, [] if name in tensors else [name], ())
    return tensors[name]
