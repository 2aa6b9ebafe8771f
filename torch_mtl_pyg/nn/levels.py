"""Nodes, edges and graphs: what a task predicts for, and the embedding of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.nn.resolver import aggregation_resolver

from ..ops._checks import check_range
from ..task import Task

Pool = str | Aggregation | Callable[..., Tensor] | None
Edge = str | Callable[[Tensor, Tensor], Tensor]


def _mean(source: Tensor, target: Tensor) -> Tensor:
    return (source + target) / 2


_EDGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul,
    "add": torch.add,
    "mean": _mean,
}


def checked_pool(pool: object) -> Any:
    """What pools: a module of PyG, a callable, or None.

    Raises:
        TypeError: It is neither, nor the name of one.
        ValueError: PyG has no aggregation of this name.
    """
    if pool is None or callable(pool):
        return pool
    if not isinstance(pool, str):
        raise TypeError(
            f"pool: expected the name of an aggregation, an Aggregation, a callable or None, got {type(pool).__name__}."
        )
    try:
        return aggregation_resolver(pool)
    except ValueError as error:
        raise ValueError(f"pool: expected the name of one of PyG's aggregations, got {pool!r}.") from error
    except TypeError as error:
        raise ValueError(
            f"pool: expected an aggregation that takes no arguments, got {pool!r}; give the Aggregation itself."
        ) from error


def checked_edge(edge: object) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes the embedding of an edge from those of its two ends."""
    if isinstance(edge, str):
        if edge not in _EDGES:
            raise ValueError(f"edge: expected one of {', '.join(_EDGES)} or a callable, got {edge!r}.")
        return _EDGES[edge]
    if not callable(edge):
        raise TypeError(f"edge: expected a string or a callable, got {type(edge).__name__}.")
    return edge


def has_batch(data: Data) -> bool:
    """Whether nodes are assigned to graphs."""
    return isinstance(data, Batch) or getattr(data, "batch", None) is not None


def level_of(task: Task, data: Data, pools: bool) -> str:
    """What a task predicts for; ``pools``: whether the model pools nodes."""
    if task.level is not None:
        return task.level
    return "graph" if pools and has_batch(data) else "node"


def num_graphs(data: Data) -> int:
    """How many graphs there are, also where the last ones have no nodes."""
    if isinstance(data, Batch):
        return int(data.num_graphs)
    if not has_batch(data):
        return 1
    ptr = getattr(data, "ptr", None)
    if isinstance(ptr, Tensor):
        return int(ptr.shape[0]) - 1
    return int(data.batch.max()) + 1 if data.batch.shape[0] else 0


def graph_embedding(h: Tensor, batch: Tensor | None, count: int, pool: Any) -> Tensor:
    """``[G, D']`` from nodes ``[N, D]``; without pool, what the trunk returned is per graph already.

    Raises:
        TypeError: ``batch`` holds no integers.
        ValueError: The pool, or without one the trunk, gives another number of rows than there are graphs.
    """
    if pool is None:
        out, who = h, "trunk"
    else:
        who = "pool"
        if batch is None and count != 1:
            raise ValueError(f"data.batch: expected it, since there are {count} graphs, got none.")
        if batch is not None and batch.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"data.batch: expected an int64 tensor, got {batch.dtype}.")
        if batch is not None and batch.shape[0] != h.shape[0]:
            raise ValueError(f"data.batch: expected shape [{h.shape[0]}], one per node, got {list(batch.shape)}.")
        if batch is not None and batch.is_cpu and batch.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in batch.aminmax())
            if low < 0 or high >= count:
                raise ValueError(
                    f"data.batch: expected numbers of graphs in [0, {count}), got {low if low < 0 else high}."
                )
        out = pool(h, batch, dim_size=count) if isinstance(pool, Aggregation) else pool(h, batch, count)
    if out.shape[0] != count:
        raise ValueError(f"{who}: expected one row for each of {count} graphs, got shape {list(out.shape)}.")
    return out


def edge_embedding(h: Tensor, index: object, edge: Callable[[Tensor, Tensor], Tensor], argument: str) -> Tensor:
    """``[M, D]`` from nodes ``[N, D]`` and the two ends ``[2, M]`` of edges.

    Raises:
        TypeError: The ends are no int64 tensor.
        ValueError: They are not ``[2, M]``.
        IndexError: An end is not in ``[0, N)``.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.layout is not torch.strided:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{argument}: expected an int64 tensor [2, M], the ends of edges, got {kind}.")
    if index.dim() != 2 or index.shape[0] != 2:
        raise ValueError(f"{argument}: expected shape [2, M], got {list(index.shape)}.")
    for end in (0, 1):
        check_range(argument, "end", index[end], h.shape[0])
    return edge(h.index_select(0, index[0]), h.index_select(0, index[1]))
