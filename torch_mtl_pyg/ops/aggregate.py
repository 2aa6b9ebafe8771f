r"""Features aggregated over the neighbours of each node.

.. math::
    \text{sum:}\quad y_i = \sum_{e \,:\, t_e = i} w_e x_{s_e} \qquad
    \text{mean:}\quad y_i = \frac{1}{\max(1, |\{e : t_e = i\}|)} \sum_{e \,:\, t_e = i} w_e x_{s_e} \qquad
    \text{max:}\quad y_{id} = \max_{e \,:\, t_e = i} x_{s_e d}

with the source :math:`s_e` and the target :math:`t_e` of each edge, and ``min`` as ``max``. The mean divides by the
number of edges, not by the sum of their weights. A node without an edge gets 0, and passes no gradient. The gradient of
a maximum is shared equally by all edges that attain it; NaN is passed on. An edge that occurs twice counts twice.

Sums of float32, bfloat16 and float16 are taken in float32, those of float64 in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import _aggregate, reference_graph
from ._checks import check_floating, check_same
from ._dispatch import autocasts, runs_fused, transformed
from ._edges import CODES, Edges, watched

if TYPE_CHECKING:
    from ..adjacency import Adjacency

REDUCES = tuple(CODES)


def aggregate(x: Tensor, adjacency: Adjacency, edge_weight: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Aggregates the rows of ``x`` over the edges.

    Args:
        x: Features of the sources ``[N_src, D]``, any strides. float32, float64, bfloat16 or float16.
        adjacency: The edges.
        edge_weight: ``[E]``, in the order in which the edges came, of the dtype and device of ``x``; or None: 1. Under
            autocast it is cast to the dtype of ``x``.
        reduce: ``"sum"``, ``"mean"``, ``"max"`` or ``"min"``; the last two without ``edge_weight``.

    Returns:
        ``[N_dst, D]``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes or devices do not fit, there is no such ``reduce``, or one of max and min meets
            ``edge_weight``.
    """
    check_floating("x", x, 2, "[N_src, D]")
    edge_weight = check_graph(x, adjacency, edge_weight, reduce)
    if runs_fused(x.device.type, "aggregate") and not transformed():
        return _aggregate.aggregate(x, Edges.of(adjacency), edge_weight, CODES[reduce])
    return watched(reference_graph.aggregate(x, adjacency, edge_weight, reduce), adjacency)


def check_graph(x: Tensor, adjacency: Adjacency, edge_weight: Tensor | None, reduce: str) -> Tensor | None:
    """Checks what the ops on graphs have in common. Returns ``edge_weight`` as they take it."""
    from ..adjacency import Adjacency  # here, since it is built on an op itself

    if not isinstance(adjacency, Adjacency):
        raise TypeError(f"adjacency: expected an Adjacency, got {type(adjacency).__name__}.")
    if not isinstance(reduce, str):
        raise TypeError(f"reduce: expected one of {', '.join(map(repr, REDUCES))}, got {type(reduce).__name__}.")
    if reduce not in REDUCES:
        raise ValueError(f"reduce: expected one of {', '.join(map(repr, REDUCES))}, got {reduce!r}.")
    if x.shape[0] != adjacency.num_src:
        raise ValueError(f"x: expected {adjacency.num_src} rows, the sources of adjacency, got shape {list(x.shape)}.")
    if adjacency.device != x.device:
        raise ValueError(f"adjacency: expected the device of x, {x.device}, got {adjacency.device}.")
    if edge_weight is None:
        return None
    if reduce in ("max", "min"):
        raise ValueError(f"edge_weight: expected None with reduce={reduce!r}, got {_kind(edge_weight)}.")
    return check_edge_weight(edge_weight, adjacency, x)


def check_edge_weight(edge_weight: Tensor, adjacency: Adjacency, x: Tensor) -> Tensor:
    """Checks weights against the edges and the features; under autocast, casts them to the dtype of ``x``."""
    check_floating("edge_weight", edge_weight, 1, "[E]")
    if edge_weight.shape[0] != adjacency.num_edges:
        raise ValueError(
            f"edge_weight: expected shape [{adjacency.num_edges}], one weight per edge, got {list(edge_weight.shape)}."
        )
    if autocasts(x.device.type):
        edge_weight = edge_weight.to(x.dtype)
    check_same("edge_weight", edge_weight, "x", x)
    return edge_weight


def _kind(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
