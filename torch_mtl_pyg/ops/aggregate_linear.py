r"""Neighbours aggregated once, and projected to all tasks in the same pass.

With the aggregation :math:`A(X)` of :mod:`torch_mtl_pyg.ops.aggregate`, the columns of :math:`X` in blocks
:math:`X = [X_1 | \dots | X_B]`, a weight :math:`W_b` of shape ``[C_b, F_b]`` for each block, and the features :math:`R`
of the targets, whose blocks are projected by :math:`V_c`:

.. math::
    Y = \big[A(X_1) W_1^\top \,|\, \dots \,|\, A(X_B) W_B^\top\big]
      + \big[R_1 V_1^\top \,|\, \dots \,|\, R_{B'} V_{B'}^\top\big] + \mathbf{1} b^\top.

One block, ``[K, F]``, is the shared case: every task reads the same features. One block per task is the case in which
every task has its own. The two sides are cut independently: shared neighbours may meet targets of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from . import _aggregate_linear, reference_graph
from ._checks import check_floating, check_same
from ._dispatch import autocast_to, autocasts, runs_fused, transformed
from ._edges import CODES, Edges, watched
from .aggregate import check_graph

if TYPE_CHECKING:
    from ..adjacency import Adjacency


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
    """Aggregates the rows of ``x`` over the edges, projects each block, and adds the projected targets and the bias.

    Args:
        x: Features of the sources ``[N_src, sum F_b]``, any strides. float32, float64, bfloat16 or float16.
        adjacency: The edges.
        weights: ``[C_b, F_b]`` for each block of columns, of the dtype and device of ``x``; their rows sum to ``K``.
        bias: ``[K]``, or None.
        edge_weight: ``[E]``, in the order in which the edges came, or None: 1.
        reduce: ``"sum"``, ``"mean"``, ``"max"`` or ``"min"``; the last two without ``edge_weight``.
        root: Features of the targets ``[N_dst, sum R_c]``, or None.
        root_weights: ``[C_c, R_c]`` for each block of columns of ``root``; their rows sum to ``K``. Given with
            ``root``, and only then.

    Under autocast, floating-point arguments but for float64 are cast to its dtype first, as for a linear layer.

    Returns:
        ``[N_dst, K]``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError: An argument has the wrong type, or the dtypes differ.
        ValueError: Shapes or devices do not fit, there is no such ``reduce``, or one of max and min meets
            ``edge_weight``.
    """
    check_floating("x", x, 2, "[N_src, sum of F_b]")
    weights = _checked_blocks("weights", weights, "x", x)
    if (root is None) != (root_weights is None):
        given, missing = ("root", "root_weights") if root_weights is None else ("root_weights", "root")
        raise ValueError(f"{missing}: expected one, since {given} is given, got None.")
    if root is not None and root_weights is not None:
        check_floating("root", root, 2, "[N_dst, sum of R_c]")
        root_weights = _checked_blocks("root_weights", root_weights, "root", root)
    total = sum(weight.shape[0] for weight in weights)
    if bias is not None:
        check_floating("bias", bias, 1, "[K]")
        if bias.shape[0] != total:
            raise ValueError(f"bias: expected shape [{total}], the rows of weights, got {list(bias.shape)}.")
    edge_weight = check_graph(x, adjacency, edge_weight, reduce)
    device = x.device.type
    if autocasts(device):
        x, bias, edge_weight, root = autocast_to(device, x, bias, edge_weight, root)  # type: ignore[assignment]
        weights = autocast_to(device, *weights)  # type: ignore[assignment]
        root_weights = None if root_weights is None else autocast_to(device, *root_weights)  # type: ignore[assignment]
    if root is not None and root_weights is not None:
        check_same("root", root, "x", x)
        if root.shape[0] != adjacency.num_dst:
            raise ValueError(
                f"root: expected {adjacency.num_dst} rows, the targets of adjacency, got shape {list(root.shape)}."
            )
        rows = sum(weight.shape[0] for weight in root_weights)
        if rows != total:
            raise ValueError(f"root_weights: expected {total} rows in all, as weights has, got {rows}.")
    for name, others in (("weights", weights), ("root_weights", root_weights or ())):
        for i, weight in enumerate(others):
            check_same(f"{name}[{i}]", weight, "x", x)
    if bias is not None:
        check_same("bias", bias, "x", x)
    if runs_fused(device, "aggregate_linear") and not transformed():
        args = _aggregate_linear.Arguments(x, edge_weight, tuple(weights), root, tuple(root_weights or ()), bias)
        return _aggregate_linear.aggregate_linear(args, Edges.of(adjacency), CODES[reduce])
    out = reference_graph.aggregate_linear(x, adjacency, weights, bias, edge_weight, reduce, root, root_weights)
    return watched(out, adjacency)


def _checked_blocks(name: str, weights: object, of: str, x: Tensor) -> Sequence[Tensor]:
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{name}: expected a sequence of tensors [C_b, F_b], got {type(weights).__name__}.")
    if not weights:
        raise ValueError(f"{name}: expected at least one block, got none.")
    for i, weight in enumerate(weights):
        check_floating(f"{name}[{i}]", weight, 2, "[C_b, F_b]")
    columns = sum(weight.shape[1] for weight in weights)
    if columns != x.shape[1]:
        raise ValueError(f"{of}: expected {columns} columns, those of {name}, got shape {list(x.shape)}.")
    return weights
