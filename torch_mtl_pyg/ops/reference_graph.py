"""The ops on graphs in plain PyTorch: the fallback, the tests' oracle and a baseline of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def group_edges(key: Tensor, other: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ptr``, ``index`` and ``perm`` as in :func:`torch_mtl_pyg.ops.group_edges`; values are not checked."""
    ordered, perm = torch.sort(key, stable=True)
    # Not bincount: the size of its result depends on values, which torch.compile takes for a break of the graph.
    ptr = torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=key.dtype, device=key.device))
    return ptr, other[perm].to(torch.int64), perm
