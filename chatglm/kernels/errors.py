"""What the kernels raise and warn with; in a file of its own so that backends need nothing else from the package."""

from __future__ import annotations


class KernelUnavailable(RuntimeError):
    """This backend cannot be used on this machine; the message is the reason and, where there is one, the cure."""


class KernelWarning(UserWarning):
    """Plain torch is used where a kernel of ours would be faster: said once per device, with the cure."""


class KernelMismatch(RuntimeError):
    """The compiled C code and the Python code that calls it are of different versions: a broken installation."""
