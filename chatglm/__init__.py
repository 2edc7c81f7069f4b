"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B on current transformers.

Importing this package registers the family with transformers: from then on `AutoConfig`, `AutoModel` and
`AutoTokenizer` load the original folders and hub ids with the code here, with or without `trust_remote_code`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .program import is_own_program, leave_at_ctrl_c

__version__ = "0.1.0"

if TYPE_CHECKING or not is_own_program():
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
else:
    # `cli_demo.py --help` waits for no torch, and the doctor has to start where torch cannot be imported.
    leave_at_ctrl_c()

    def __getattr__(name: str) -> Any:
        is_module = not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None
        if is_module or (name.startswith("_") and name != "__all__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".public", __name__), name)
