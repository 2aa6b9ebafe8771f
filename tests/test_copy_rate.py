"""The rate of copies: that it is a rate, and what is refused. Its value is the machine's."""

from __future__ import annotations

import pytest
import torch
from conftest import require_fused

from torch_mtl_pyg import _build

EMULATED = _build.emulation() == "cuda"


@pytest.fixture
def like(fused: None) -> torch.Tensor:
    if EMULATED:
        return torch.ones(1)
    if not torch.cuda.is_available() or "cuda" not in torch.ops.torch_mtl_pyg.devices():
        pytest.skip("needs CUDA kernels and a GPU; test_cuda_contract.py runs this file on emulated kernels")
    return torch.ones(1, device="cuda")


def test_rate(like: torch.Tensor) -> None:
    assert torch.ops.torch_mtl_pyg.copy_rate(like, 0.0) > 0
    assert torch.ops.torch_mtl_pyg.copy_rate(like, 0.01) > 0


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_wrong_time(like: torch.Tensor, seconds: float) -> None:
    with pytest.raises(RuntimeError, match="seconds: expected a number from 0 on"):
        torch.ops.torch_mtl_pyg.copy_rate(like, seconds)


@pytest.mark.skipif(EMULATED, reason="emulated kernels serve the CPU")
def test_not_for_the_cpu() -> None:
    require_fused()
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        torch.ops.torch_mtl_pyg.copy_rate(torch.ones(1), 0.0)
