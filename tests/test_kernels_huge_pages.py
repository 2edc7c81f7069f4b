"""Memory in huge pages is memory like any other."""

from __future__ import annotations

import copy
import mmap
import pickle

import pytest
import torch

from chatglm.kernels import huge_pages
from chatglm.quantization import quantize_weight

LARGE = (3000, 1001)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [LARGE, (4, 3), (0, 5)])
def test_a_tensor_as_torch_makes_them(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = huge_pages.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
    expected = torch.arange(tensor.numel()).remainder(100).to(dtype).view(shape)
    tensor.copy_(expected)
    for other in (tensor, tensor.clone(), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert torch.equal(other, expected)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")
def test_begins_with_a_page() -> None:
    assert huge_pages.empty(LARGE).data_ptr() % huge_pages.PAGE == 0
    with torch.device("meta"):  # the caller's default device does not matter
        assert huge_pages.empty(LARGE).device.type == "cpu"


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.empty(LARGE).zero_().sum() == 0


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = huge_pages.empty(LARGE).fill_(7)[1000:]
    others = [huge_pages.empty(LARGE).fill_(9) for _ in range(3)]
    assert (view == 7).all() and all((other == 9).all() for other in others)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_the_same_there(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3000, 1500)
    q, scale = quantize_weight(weight, bits)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    plain, plain_scale = quantize_weight(weight, bits)
    assert torch.equal(q, plain) and torch.equal(scale, plain_scale)
