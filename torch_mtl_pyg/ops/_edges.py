"""The edges as the compiled ops take them: grouped by target for the forward, by source for the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch_geometric.index import ptr2index

from ._dispatch import transformed
from .group_edges import group_edges

if TYPE_CHECKING:
    from ..adjacency import Adjacency

# By name and as the kernels number them (csrc/common/graph.h).
CODES = {"sum": 0, "mean": 1, "max": 2, "min": 3}
SUM, MEAN = CODES["sum"], CODES["mean"]


class Edges:
    """``(ptr, index, place)`` by target, and by source once it is asked for.

    Of a graph whose groupings are kept, if there is one; else from those by target alone, as in compiled functions.
    """

    def __init__(
        self, ptr: Tensor, index: Tensor, place: Tensor | None, num_src: int, adjacency: Adjacency | None = None
    ) -> None:
        self.ptr, self.index, self.place = ptr, index, place
        self.num_src = num_src
        self.adjacency = adjacency

    @staticmethod
    def of(adjacency: Adjacency) -> Edges:
        return Edges(*adjacency.by_target(), adjacency.num_src, adjacency)

    def saved(self) -> tuple[Tensor | None, ...]:
        """What a backward reads, to be saved for it: then a change in between is an error, as for other tensors."""
        given = () if self.adjacency is None else self.adjacency.given()
        return (self.ptr, self.index, self.place, *given)

    def by_source(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.adjacency is not None:
            return self.adjacency.by_source()
        target = self.target()
        ptr, index, perm = group_edges(self.index, target, self.num_src, self.ptr.shape[0] - 1)
        return ptr, index, perm if self.place is None else self.place[perm]

    def target(self) -> Tensor:
        """``[E]``, the target of each edge in the order of ``index``."""
        target: Tensor = ptr2index(self.ptr, output_size=self.index.shape[0])
        return target

    def shares(self, like: Tensor) -> Tensor:
        """``[N_dst]``: one over the number of edges of each target, in the dtype of sums."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.ptr.diff().clamp_(min=1).to(dtype).reciprocal_()


def watched(out: Tensor, adjacency: Adjacency) -> Tensor:
    """The same; its backward is an error where the graph's EdgeIndex has changed, which plain PyTorch does not see."""
    given = None if adjacency.origin is None else adjacency.origin()
    if given is None or not out.requires_grad or transformed():
        return out
    origin, version = adjacency.origin, given._version

    def check(grad: Tensor) -> None:
        now = None if origin is None else origin()
        if now is not None and now._version != version:
            raise RuntimeError("edge_index: expected that of the forward, got one modified by an inplace operation.")

    out.register_hook(check)
    return out


def rows(t: Tensor) -> Tensor:
    """The same with contiguous columns, which the kernels read."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def vector(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()
