"""The ops in plain PyTorch: the fallback, the tests' oracle (in float64) and a baseline of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; shapes as in :func:`torch_mtl_pyg.ops.multi_head_linear`."""
    return F.linear(x, weight, bias)


def multi_head_linear_backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, ``weight`` and ``bias``; None where not needed. ``grads`` are columns."""
    grad = grads[0] if len(grads) == 1 else torch.cat(tuple(grads), dim=1)
    return (
        grad @ weight if need_x else None,
        grad.t() @ x if need_weight else None,
        grad.sum(0) if need_bias else None,
    )
