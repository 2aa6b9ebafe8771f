"""Gradients times a number on the device: values, rounded once, and what is refused."""

from __future__ import annotations

import pytest
import torch

from torch_mtl_pyg import _build

EMULATED = _build.emulation() == "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def device(fused: None) -> torch.device:
    if EMULATED:
        return torch.device("cpu")
    if not torch.cuda.is_available() or "cuda" not in torch.ops.torch_mtl_pyg.devices():
        pytest.skip("needs CUDA kernels and a GPU; test_cuda_contract.py runs this file on emulated kernels")
    return torch.device("cuda")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, 0.0, float("nan")])
def test_values(device: torch.device, dtype: torch.dtype, factor: float) -> None:
    grads = [torch.randn(*shape, device=device).to(dtype) for shape in ((700, 33), (5, 33), (0,))]
    by = torch.tensor(factor, dtype=wide(dtype), device=device)
    expected = [(g.to(wide(dtype)) * by).to(dtype) for g in grads]
    torch.ops.torch_mtl_pyg.scale_gradients(grads, by)
    for got, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


def test_refused(device: torch.device) -> None:
    scale, one = torch.ops.torch_mtl_pyg.scale_gradients, torch.ones((), device=device)
    x = torch.ones(4, 4, device=device)
    for grads, factor, message in (
        ([], one, "grads: expected 1 to 3 tensors, got 0"),
        ([x] * 4, one, "grads: expected 1 to 3 tensors, got 4"),
        ([x, x.double()], one, "grads: expected contiguous tensors of one dtype"),
        ([x[:, ::2]], one, "grads: expected contiguous tensors of one dtype"),
        ([x], torch.ones(2, device=device), "factor: expected one number of the dtype of sums"),
        ([x], one.double(), "factor: expected one number of the dtype of sums"),
        ([x.bfloat16()], one.bfloat16(), "factor: expected one number of the dtype of sums"),
        ([x.long()], one, "grads: expected float32, float64, bfloat16 or float16"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            scale(grads, factor)
    assert torch.equal(x, torch.ones_like(x))
