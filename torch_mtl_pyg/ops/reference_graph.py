"""The ops on graphs in plain PyTorch: the fallback, the tests' oracle (in float64) and a baseline of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import wide

if TYPE_CHECKING:
    from ..adjacency import Adjacency


def group_edges(key: Tensor, other: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ptr``, ``index`` and ``perm`` as in :func:`torch_mtl_pyg.ops.group_edges`; values are not checked."""
    ordered, perm = torch.sort(key, stable=True)
    return pointers(ordered, num_keys), other.index_select(0, perm).to(torch.int64), perm


def pointers(ordered: Tensor, num_keys: int) -> Tensor:
    """``[num_keys + 1]``: where each key begins in a sorted vector, and where the last one ends."""
    # Not bincount: the size of its result depends on values, which torch.compile takes for a break of the graph.
    return torch.searchsorted(ordered, torch.arange(num_keys + 1, dtype=ordered.dtype, device=ordered.device))


def aggregate(x: Tensor, adjacency: Adjacency, edge_weight: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """``[N_dst, D]``: the sum, mean, maximum or minimum over the edges of a node; as the op."""
    edges = (adjacency.source, adjacency.target, adjacency.num_dst)
    return reduce_edges(wide(x), *edges, edge_weight, reduce).to(x.dtype)


def aggregate_linear(
    x: Tensor,
    adjacency: Adjacency,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    edge_weight: Tensor | None = None,
    reduce: str = "sum",
    root: Tensor | None = None,
    root_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """``[N_dst, K]``: aggregation, then a projection of each block; as :func:`torch_mtl_pyg.ops.aggregate_linear`."""
    edges = (adjacency.source, adjacency.target, adjacency.num_dst)
    return project(reduce_edges(wide(x), *edges, edge_weight, reduce), weights, bias, root, root_weights).to(x.dtype)


def project(
    h: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    root: Tensor | None,
    root_weights: Sequence[Tensor] | None,
) -> Tensor:
    """The same from aggregated features ``h``, in the dtype of sums."""
    out = block_linear(h, [wide(w) for w in weights])
    if root is not None and root_weights is not None:
        out = out + block_linear(wide(root), [wide(w) for w in root_weights])
    return out if bias is None else out + wide(bias)


def block_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``[N, sum C_b]``: block ``b`` reads its ``F_b`` columns of ``x`` and writes its ``C_b`` columns."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    columns = x.split([weight.shape[1] for weight in weights], dim=1)
    return torch.cat([F.linear(own, weight) for own, weight in zip(columns, weights, strict=True)], dim=1)


def reduce_edges(x: Tensor, source: Tensor, target: Tensor, n: int, edge_weight: Tensor | None, reduce: str) -> Tensor:
    """``[n, D]`` from the rows ``x[source]``, each to its ``target``."""
    messages = x.index_select(0, source)
    if edge_weight is not None:
        messages = messages * wide(edge_weight).unsqueeze(1)
    if reduce in ("max", "min"):
        count = target.new_zeros(n).index_add(0, target, torch.ones_like(target))
        # What the rows start from equals no message, so that it has no share of their gradient: NaN, and 0 where no
        # edge arrives.
        start = x.new_zeros(n, x.shape[1]).masked_fill((count > 0).unsqueeze(1), float("nan"))
        index = target.unsqueeze(1).expand(-1, x.shape[1])
        return start.scatter_reduce(0, index, messages, f"a{reduce}", include_self=False)
    out = x.new_zeros(n, x.shape[1]).index_add(0, target, messages)
    if reduce == "mean":
        count = target.new_zeros(n).index_add(0, target, torch.ones_like(target))
        out = out / count.clamp(min=1).to(x.dtype).unsqueeze(1)
    return out
