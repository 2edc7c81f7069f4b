"""The backend for NVIDIA GPUs: CUDA code (`kernels.cu`) that is compiled at first use (`compile.py`), launched by the
driver (`driver.py`) and called with tensors (`backend.py`)."""

from .backend import FUSED_ROWS, CUDABackend, load

__all__ = ["FUSED_ROWS", "CUDABackend", "load"]
