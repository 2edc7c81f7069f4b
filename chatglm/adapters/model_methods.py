"""Methods of a model for its adapters: ours, and those of transformers without its check of PEFT's version.

transformers 5.24 refuses every release of PEFT that there is for its adapter methods; PEFT's own functions work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..checkpoints.adapters import import_peft
from . import lora, switching


class AdapterMethods:
    """For a model: P-tuning prefixes and LoRA by name. A model has at most one adapter in use, for all threads."""

    @property
    def adapter_names(self) -> list[str]:
        """The P-tuning prefixes and LoRA adapters on this model, see `chatglm.adapters.load_adapter`."""
        return switching.adapter_names(self)

    @property
    def current_adapter(self) -> str | None:
        """The one of `adapter_names` in use; None for the base model alone."""
        return switching.current_adapter(self)

    def adapter(self, name: str | None) -> AbstractContextManager[Any]:
        """`with model.adapter("adverts"):` answers with this adapter, `with model.adapter(None):` with the base model.

        An answer that is streamed is computed when its steps are asked for: ask for them inside the block. To switch
        for good: `chatglm.adapters.use_adapter`.

        Raises:
            ValueError: there is none of this name.
        """
        return switching.using_adapter(self, name)

    def prefix(self, name: str | None) -> AbstractContextManager[Any]:
        """`adapter`, by the name that users of P-tuning look for."""
        return switching.using_adapter(self, name)

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
        """`chatglm.adapters.load_adapter`, under transformers' name. Options of the download are refused.

        `from_pretrained` calls it for the folder of a LoRA adapter, with `load_config` for how the base was loaded.
        """
        from .attaching import load_adapter  # attaching needs the networks' configs, which need this module's class

        unsupported |= {name: value for name, value in (adapter_kwargs or {}).items() if value not in (None, False)}
        if unsupported:
            raise TypeError(
                f"load_adapter() takes a local folder and a name, not {', '.join(sorted(unsupported))}: download the "
                "adapter first (huggingface_hub.snapshot_download)"
            )
        return load_adapter(self, peft_model_id, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """`chatglm.adapters.use_adapter`, under transformers' name. Raises ValueError for several at once."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise ValueError(f"one adapter is in use at a time, not {len(names)}: give one name")
        switching.use_adapter(self, names[0])

    def disable_adapters(self) -> None:
        """The base model alone, until `enable_adapters` or `set_adapter`. Raises ValueError without an adapter."""
        self._enable_lora(False)

    def enable_adapters(self) -> None:
        """The LoRA that was in use before `disable_adapters`. Raises ValueError without an adapter."""
        self._enable_lora(True)

    def _enable_lora(self, enabled: bool) -> None:
        layers = switching.lora_layers(self)
        if not layers:
            raise ValueError("this model has no LoRA adapter: load one first (chatglm.adapters.load_adapter)")
        for layer in layers:
            layer.enable_adapters(enabled)

    def active_adapters(self) -> list[str]:
        """The name of the LoRA in its layers, also while it is disabled. Raises ValueError without an adapter."""
        layers = switching.lora_layers(self)
        if not layers:
            raise ValueError("this model has no LoRA adapter: load one first (chatglm.adapters.load_adapter)")
        return list(layers[0].active_adapters)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of a LoRA adapter (by default of the one in its layers) under PEFT's names."""
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
