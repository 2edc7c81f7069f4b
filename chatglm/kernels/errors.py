"""The errors and warnings of the kernels."""

from __future__ import annotations


class KernelUnavailable(RuntimeError):
    """This backend cannot be used on this machine; the message says why and, where something helps, what to do."""


class KernelWarning(UserWarning):
    """Plain torch is used where our kernels would be faster: issued once per device, with what to do about it."""


class KernelMismatch(RuntimeError):
    """The compiled C code and the Python code that calls it are of different versions: a broken installation."""
