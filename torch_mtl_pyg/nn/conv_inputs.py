"""Reading what a convolution is called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric.nn.aggr import Aggregation, MaxAggregation, MeanAggregation, MinAggregation, SumAggregation

from ..adjacency import Adjacency, normalized
from ..ops._checks import check_same, has_values
from ..ops._dispatch import autocasts
from ..ops.aggregate import check_edge_weight
from . import conv_parameters
from .features import Features, num_rows, read_features

if TYPE_CHECKING:
    from .conv import MultiTaskConv

# Aggregations the ops know; they do not mix columns.
REDUCES: dict[type[Aggregation], str] = {
    SumAggregation: "sum",
    MeanAggregation: "mean",
    MaxAggregation: "max",
    MinAggregation: "min",
}


class Inputs(NamedTuple):
    """What a convolution computes with.

    Attributes:
        sources: Features of the nodes that messages come from.
        targets: Features of those they go to, where ``weight_root`` reads them.
        x_dst: The latter as given; None: none, or the same as the sources.
        adjacency: The edges, with self-loops where they are normalised.
        edge_weight: ``[E]``, or None: 1.
    """

    sources: Features
    targets: Features | None
    x_dst: Any
    adjacency: Adjacency
    edge_weight: Tensor | None


def read_inputs(conv: MultiTaskConv, x: Any, edge_index: Any, edge_weight: Any, size: Any) -> Inputs:
    """Checks and reads the arguments of a call, and gives lazy parameters their shape.

    Raises:
        TypeError, ValueError, IndexError: As :meth:`MultiTaskConv.forward`.
    """
    x_src, x_dst = _pair(conv, x)
    names = ("x[0]", "x[1]") if isinstance(x, (tuple, list)) else ("x", "x")
    sources = read_features(names[0], x_src, conv.channels[0], conv.layout)
    num_src, num_dst = _sizes(sources, names[1], x_dst, size)
    targets = None
    if conv.root_weight and x_dst is not None:
        same = x_src is x_dst and conv.channels[0] == conv.channels[1]
        targets = sources if same else read_features(names[1], x_dst, conv.channels[1], conv.layout)
    conv_parameters.settle(conv, sources, targets)
    packed = sources.packed
    strict = not autocasts(packed.device.type)
    check_same(names[0], packed, "weight", conv_parameters.first(conv.weight), strict)
    if targets is not None:
        check_same(names[1], targets.packed, "weight_root", conv_parameters.first(conv.weight_root), strict)
    adjacency = Adjacency.of(edge_index, num_src, num_dst, conv.flow)
    if adjacency.device != packed.device:
        raise ValueError(f"edge_index: expected the device of x, {packed.device}, got {adjacency.device}.")
    reduce = REDUCES.get(type(conv.aggr_module), "")
    weight = _weight(adjacency, edge_weight, packed, reduce)
    if conv.normalize:
        adjacency, weight = normalized(adjacency, weight, packed.dtype, reduce)
    return Inputs(sources, targets, None if x_src is x_dst else x_dst, adjacency, weight)


def _pair(conv: MultiTaskConv, x: Any) -> tuple[Any, Any]:
    if not isinstance(x, (tuple, list)):
        return x, x
    if conv.normalize:
        raise ValueError("x: expected one set of features with normalize='gcn', got a pair.")
    if len(x) != 2:
        raise ValueError(f"x: expected features or a pair of them, got {len(x)}.")
    return x[0], x[1]


def _sizes(sources: Features, name: str, x_dst: Any, size: Any) -> tuple[int, int | None]:
    """How many nodes send and receive; None: what the edges say."""
    num_src = sources.packed.shape[0]
    num_dst = None if x_dst is None else num_rows(name, x_dst)
    if size is None:
        return num_src, num_dst
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size: expected a pair of numbers of nodes, got {size!r}.")
    for given in size:
        if given is not None and (not isinstance(given, (int, torch.SymInt)) or isinstance(given, bool)):
            raise TypeError(f"size: expected integers or None, got {given!r}.")
        if given is not None and given < 0:
            raise ValueError(f"size: expected numbers of nodes of at least 0, got {given}.")
    known = (num_src, size[1] if num_dst is None else num_dst)
    if any(given is not None and given != own for given, own in zip(size, known, strict=True)):
        raise ValueError(f"size: expected {known}, the rows of x, got {tuple(size)}.")
    return known


def _weight(adjacency: Adjacency, edge_weight: Any, x: Tensor, reduce: str) -> Tensor | None:
    values = adjacency.edge_weight
    if values is None:
        return None if edge_weight is None else check_edge_weight(edge_weight, adjacency, x)
    if edge_weight is not None:
        raise ValueError("edge_weight: expected None, since the values of edge_index are the weights, got one.")
    known = not torch.compiler.is_compiling() and not values.requires_grad and has_values(values)
    if reduce in ("max", "min") and known and bool((values == 1).all()):
        return None  # an unweighted maximum is fused
    return check_edge_weight(values, adjacency, x)
