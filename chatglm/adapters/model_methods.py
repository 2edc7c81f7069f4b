"""A model's adapter methods: our own, and those of transformers without its check of PEFT's version.

The adapter methods of transformers 5.24 refuse every release of PEFT that exists; PEFT's own functions work with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..checkpoints.adapters import import_peft
from ..network.slots import AdapterSlots
from . import attaching, lora, switching


class AdapterMethods:
    """Mixin for models: P-tuning prefixes and LoRA by name. At most one adapter is in use, for all threads."""

    adapter_slots: AdapterSlots  # of ChatGLMPreTrainedModel

    @property
    def adapter_names(self) -> list[str]:
        """The P-tuning prefixes and LoRA adapters on this model, see `chatglm.adapters.load_adapter`."""
        return self.adapter_slots.names

    @property
    def current_adapter(self) -> str | None:
        """The name of the adapter in use; None for the base model alone."""
        return self.adapter_slots.current

    def adapter(self, name: str | None) -> AbstractContextManager[Any]:
        """`with model.adapter("adverts"):` answers with this adapter, `with model.adapter(None):` with the base model.

        A streamed answer is computed as its steps are consumed: consume them inside the block. To switch permanently,
        use `chatglm.adapters.use_adapter`.

        Raises:
            ValueError: there is no adapter of this name.
        """
        return self.adapter_slots.using(name)

    def prefix(self, name: str | None) -> AbstractContextManager[Any]:
        """`adapter`, under the name that users of P-tuning look for."""
        return self.adapter_slots.using(name)

    # ---- transformers' methods, for LoRA ---------------------------------------------------------------------------

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """`chatglm.adapters.add_lora`, under transformers' name."""
        lora.add_lora(self, adapter_config, adapter_name or "default")

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        adapter_kwargs: Mapping[str, Any] | None = None,
        load_config: Any = None,
        **unsupported: Any,
    ) -> str:
        """`chatglm.adapters.load_adapter`, under transformers' name. Download options are refused.

        `from_pretrained` calls it for the folder of a LoRA adapter; `load_config` then says how the base was loaded.
        """
        unsupported |= {name: value for name, value in (adapter_kwargs or {}).items() if value not in (None, False)}
        if unsupported:
            raise TypeError(
                f"load_adapter() takes a local folder and a name, not {', '.join(sorted(unsupported))}: download the "
                "adapter first (huggingface_hub.snapshot_download)"
            )
        return attaching.load_adapter(self, peft_model_id, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """`chatglm.adapters.use_adapter`, under transformers' name. Raises ValueError for several at once."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"one adapter is in use at a time, not {len(names)}: give one name")
        self.adapter_slots.use(names[0])

    def disable_adapters(self) -> None:
        """Uses the base model alone until `enable_adapters` or `set_adapter`. Raises ValueError without an adapter."""
        self._enable_lora(False)

    def enable_adapters(self) -> None:
        """Switches back to the LoRA in use before `disable_adapters`. Raises ValueError without an adapter."""
        self._enable_lora(True)

    def _enable_lora(self, enabled: bool) -> None:
        for layer in (*self._lora_layers(), *self.adapter_slots.saved_layers):
            layer.enable_adapters(enabled)

    def _lora_layers(self) -> list[Any]:
        layers = self.adapter_slots.lora_layers
        if not layers:
            raise ValueError("this model has no LoRA adapter: load one first (chatglm.adapters.load_adapter)")
        return layers

    def active_adapters(self) -> list[str]:
        """The name of the LoRA in the layers, even while it is disabled. Raises ValueError without an adapter."""
        return list(self._lora_layers()[0].active_adapters)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of a LoRA adapter (by default of the one in the layers) under PEFT's names."""
        name = adapter_name or self.active_adapters()[0]
        given = None if state_dict is None else dict(state_dict)
        tensors: dict[str, torch.Tensor] = import_peft().get_peft_model_state_dict(
            self, state_dict=given, adapter_name=name
        )
        return tensors

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """`chatglm.adapters.remove_adapter`, under transformers' name."""
        for name in [adapter_names] if isinstance(adapter_names, str) else list(adapter_names):
            switching.remove_adapter(self, name)
