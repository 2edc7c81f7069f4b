"""Named slots of a network for P-tuning prefixes and LoRA adapters: which ones it has, and which one is in use.

Nothing here deals with files: `chatglm.adapters` reads, creates, saves and merges what the slots hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .prefix_encoder import PrefixEncoder

_STATE = "_adapter_slots"  # where a network keeps the state of its slots


@dataclass
class _State:
    prefixes: dict[str, PrefixEncoder] = field(default_factory=dict)
    token: object = None


class AdapterSlots:
    """The adapter slots of a model: at most one prefix or LoRA adapter is in use at a time, for all threads.

    The prefix in use is the network's submodule `prefix_encoder`. The others are parked: they are neither parameters
    of the network nor in its state dict, but follow its casts and moves. LoRA weights are in the layers that PEFT has
    wrapped.

    This is a view: the state is kept in the network, so that copies and pickles of a model have their own slots.

    Args:
        model: the network, alone or with a head.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._network = getattr(model, "base_model", model)

    @property
    def _state(self) -> _State:
        state: _State = self._network.__dict__.setdefault(_STATE, _State())
        return state

    # ---- which ones there are ----------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the prefixes, then of the LoRA adapters, each in the order in which they were added."""
        return [*self.prefixes, *self.loras]

    @property
    def prefixes(self) -> dict[str, PrefixEncoder]:
        """The prefixes by name; changed by `add_prefix` and `remove_prefix` only."""
        prefixes, encoder = self._state.prefixes, self._network.prefix_encoder
        if encoder is not None and all(one is not encoder for one in prefixes.values()):
            prefixes["default"] = encoder  # made by the constructor, for a config with pre_seq_len
        return prefixes

    @property
    def parked(self) -> list[PrefixEncoder]:
        """The prefixes that are not in use."""
        state = self._network.__dict__.get(_STATE)
        return [one for one in state.prefixes.values() if one is not self._network.prefix_encoder] if state else []

    @property
    def loras(self) -> dict[str, Any]:
        """PEFT's configurations of the LoRA adapters by name."""
        return getattr(self._model, "peft_config", {})

    @property
    def lora_layers(self) -> list[Any]:
        """The layers that PEFT has wrapped."""
        if not self.loras:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def saved_layers(self) -> list[Any]:
        """PEFT's wrappers around the layers that LoRA adapters replace as a whole (`modules_to_save`)."""
        if not any(getattr(config, "modules_to_save", None) for config in self.loras.values()):
            return []
        from peft.utils import ModulesToSaveWrapper

        return [module for module in self._model.modules() if isinstance(module, ModulesToSaveWrapper)]

    @property
    def stamp(self) -> object:
        """Changes with what no parameter shows: another LoRA in use, or an adapter added or removed."""
        layers = tuple(
            (layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters) for layer in self.lora_layers
        )
        saved = tuple((layer.disable_adapters, *layer.active_adapters) for layer in self.saved_layers)
        state = self._network.__dict__.get(_STATE)
        return layers, saved, state.token if state else None

    # ---- which one is in use -----------------------------------------------------------------------------------------

    @property
    def current(self) -> str | None:
        """The name of the adapter in use; None for the base model."""
        encoder = self._network.prefix_encoder
        for name, one in self.prefixes.items():
            if one is encoder:
                return name
        for layer in self.lora_layers:
            return None if layer.disable_adapters or not layer.active_adapters else layer.active_adapters[0]
        return None

    def use(self, name: str | None) -> None:
        """Makes an adapter the current one until further notice; None stands for the base model alone.

        Parameters stay trainable or frozen as they are.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name is not None:
            self.check_known(name)
        encoder = self.prefixes.get(name) if name is not None else None
        if self._network.prefix_encoder is not encoder:
            self._network.prefix_encoder = encoder
            for config in (self._model.config, self._network.config):  # saved checkpoints must be described right
                config.pre_seq_len = encoder.pre_seq_len if encoder is not None else None
                config.prefix_projection = encoder is not None and encoder.trans is not None
        lora = name if encoder is None else None
        for layer in (*self.lora_layers, *self.saved_layers):
            if lora is None and layer.disable_adapters:
                continue
            flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            if lora is None:
                layer.enable_adapters(False)
            else:
                has_it = lora in getattr(layer, "modules_to_save", (lora,))  # else the base's layer is used
                layer.set_adapter([lora] if has_it else [])
                layer.enable_adapters(True)
            for parameter, flag in flags:  # PEFT freezes and unfreezes them as it switches
                parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[Any]:
        """`use` for a `with` block, which restores the previously current adapter at its end."""
        before = self.current
        self.use(name)
        try:
            yield self._model
        finally:
            self.use(before if before in self.names else None)

    # ---- adding and removing -----------------------------------------------------------------------------------------

    def add_prefix(self, name: str, encoder: PrefixEncoder) -> None:
        """Puts a prefix into a new slot, on the device of the embeddings; makes it current and freezes all else."""
        encoder.to(self._input_device()).train(self._model.training)
        self.prefixes[name] = encoder
        self.note_change()
        self.use(name)
        self.freeze_base()

    def remove_prefix(self, name: str) -> bool:
        """Removes a prefix, which must not be current; returns False if no prefix has this name."""
        found = self.prefixes.pop(name, None) is not None
        if found:
            self.note_change()
        return found

    def loras_changed(self) -> None:
        """Call this after PEFT has added or deleted a LoRA adapter: once none is left, the layers are unwrapped."""
        self.note_change()
        if not self.loras:
            self.unwrap_loras()
        self._model._hf_peft_config_loaded = bool(self.loras)  # transformers' Trainer and save_pretrained check it

    def unwrap_loras(self) -> None:
        """Puts the layers that PEFT has wrapped back in their places, and forgets its adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        for parent in list(self._model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
                elif isinstance(child, ModulesToSaveWrapper):
                    setattr(parent, name, child.original_module)
        self._model.__dict__.pop("peft_config", None)
        self._model._hf_peft_config_loaded = False
        self.note_change()

    def note_change(self) -> None:
        """Changes `stamp`: a new prefix may have the same address as a removed one."""
        self._state.token = object()

    def freeze_base(self) -> None:
        """Freezes all but what P-tuning trains: the prefix in use, and the head of a classifier."""
        for name, parameter in self._model.named_parameters():
            if "prefix_encoder." not in name and not name.startswith("classifier_head."):
                parameter.requires_grad_(False)

    def check_known(self, name: str) -> None:
        """Raises ValueError if there is no adapter of this name."""
        names = self.names
        if name not in names:
            raise ValueError(f"there is no adapter {name!r} in this model, only {', '.join(names) or 'the base model'}")

    def _input_device(self) -> torch.device:
        embeddings: nn.Embedding = self._network.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)  # accelerate's: weights may be elsewhere until they are needed
        place = getattr(hook, "execution_device", None)
        return embeddings.weight.device if place is None else torch.device(place)
