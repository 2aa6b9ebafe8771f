"""The ops in plain PyTorch: the fallback, the tests' oracle (in float64) and a baseline of the benchmarks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def multi_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; shapes as in :func:`torch_mtl_pyg.ops.multi_head_linear`."""
    return F.linear(x, weight, bias)
