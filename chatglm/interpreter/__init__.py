"""The code interpreter: a Jupyter kernel for each conversation, in a jail of bubblewrap with limits.

Off unless a user asks for it, never part of api.py. `isolation.py` builds the jail, `watcher.py` holds it to its
limits, `kernel.py` runs cells, `outputs.py` collects what they give, `cells.py` is what the loop of `chatglm.tools`
calls, and `pool.py` has one kernel for each conversation. Needs the libraries jupyter_client and ipykernel.
"""

from __future__ import annotations

from .cells import SYSTEM_PROMPT, CodeRunner, code_of
from .isolation import Isolation, NotIsolatedError, choose_isolation
from .kernel import Kernel, Result
from .outputs import Part, Picture
from .pool import KernelPool, KernelsBusyError
from .watcher import Limits

__all__ = [
    "SYSTEM_PROMPT",
    "CodeRunner",
    "Isolation",
    "Kernel",
    "KernelPool",
    "KernelsBusyError",
    "Limits",
    "NotIsolatedError",
    "Part",
    "Picture",
    "Result",
    "choose_isolation",
    "code_of",
]
