"""Names of tensors in checkpoints: what training programs put in front of them, and what is not of the network."""

from __future__ import annotations

import re

#: What wrappers put into names, and what to replace it with: DataParallel and DDP, torch.compile, PEFT, trainers' own
#: modules; the last ones wrap single blocks too.
WRAPPERS = {
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model|model)\.)+": "",
    r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": ".",
}
#: The value head that RLHF with TRL trains beside the network; it takes no part in answering.
VALUE_HEAD = re.compile(r"^v_head\.")


def unwrapped(name: str) -> str:
    """The name of a tensor without what wrappers put into it."""
    for pattern, replacement in WRAPPERS.items():
        name = re.sub(pattern, replacement, name)
    return name


def first_few(names: list[str]) -> str:
    """At most three of the names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
