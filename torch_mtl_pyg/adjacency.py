"""The edges of a graph, as the ops take them, from any of PyG's formats."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils.weak import WeakTensorKeyDictionary
from torch_geometric import EdgeIndex
from torch_geometric.index import ptr2index
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, remove_self_loops

from .ops._checks import check_range, has_values
from .ops.group_edges import group_edges
from .ops.reference_graph import group_edges as group_known_edges
from .ops.reference_graph import pointers

FLOWS = ("source_to_target", "target_to_source")
# What gcn normalisation does about the self-loops that are there: PyG does as many different things.
Loops = Literal["remaining", "added", "replaced"]
Grouping = tuple[Tensor, Tensor, Tensor | None]
# Groupings of one graph for different numbers of nodes; more than a few are no longer worth their memory.
_MOST = 8
# By the EdgeIndex: what its memory held then, and the graphs made from it. Not an attribute of the EdgeIndex, which
# would travel into the files it is saved to.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Adjacency:
    """The edges of a graph: their ends, and, once asked for, the same grouped by either end.

    Made by :meth:`of`. Messages go from ``source`` to ``target``, whatever the flow of the layer.

    Attributes:
        num_src: Number of nodes messages come from, ``N_src``.
        num_dst: Number of nodes messages go to, ``N_dst``.
        num_edges: Number of edges, ``E``.
        device: Where the indices lie.
        edge_weight: ``[E]``, the values of a sparse matrix, differentiable; None for other formats.
        loops: How :func:`normalized` adds self-loops, as PyG does for this format:
            ``"remaining"``: where there is none; ``"added"``: to those there are; ``"replaced"``: in their place.
    """

    def __init__(
        self,
        ends: tuple[Tensor | None, Tensor | None],
        num_src: int,
        num_dst: int,
        *,
        by_target: Grouping | None = None,
        by_source: Grouping | None = None,
        edge_weight: Tensor | None = None,
        loops: Loops = "remaining",
    ) -> None:
        self._source, self._target = ends
        self.num_src = num_src
        self.num_dst = num_dst
        self.edge_weight = edge_weight
        self.loops = loops
        some = self._source if self._source is not None else self._target
        assert some is not None
        self.num_edges = some.shape[0]
        self.device = some.device
        self._by_target = by_target
        self._by_source = by_source
        # Of an EdgeIndex, whose changes count on itself, not on its indices.
        self.origin: weakref.ref[EdgeIndex] | None = None
        # Made by normalized(), by dtype.
        self.normalized: dict[torch.dtype, tuple[Adjacency, Tensor]] = {}

    def given(self) -> tuple[Tensor | None, ...]:
        """The indices as they came, which groupings are made from later, and the EdgeIndex that holds them."""
        return (self._source, self._target, None if self.origin is None else self.origin())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None}

    @property
    def source(self) -> Tensor:
        """``[E]`` int64, where each edge starts, in the order in which the edges came."""
        if self._source is None:
            assert self._by_source is not None
            self._source = ptr2index(self._by_source[0], output_size=self.num_edges)
        return self._source

    @property
    def target(self) -> Tensor:
        """``[E]`` int64, where each edge ends, in the order in which the edges came."""
        if self._target is None:
            assert self._by_target is not None
            self._target = ptr2index(self._by_target[0], output_size=self.num_edges)
        return self._target

    def by_target(self) -> Grouping:
        """The edges that end in each node: ``(ptr [N_dst + 1], index [E], perm [E] or None)``.

        Those of node ``i`` lie at ``ptr[i]`` to ``ptr[i + 1]``; ``index`` holds their sources, and ``perm`` where they
        lay before, or None where they lie so already. int64, made once.
        """
        if self._by_target is None:
            self._by_target = _grouped(self.target, self.source, self.num_dst, self.num_src)
        return self._by_target

    def by_source(self) -> Grouping:
        """The edges that start in each node, as :meth:`by_target`; ``index`` holds their targets."""
        if self._by_source is None:
            self._by_source = _grouped(self.source, self.target, self.num_src, self.num_dst)
        return self._by_source

    @classmethod
    def of(cls, edge_index: Any, num_src: int, num_dst: int | None = None, flow: str = "source_to_target") -> Adjacency:
        """Reads a graph from one of PyG's formats.

        The groupings of an ``EdgeIndex`` are made once and kept while it lives, as long as it is not changed; changes
        through other tensors that PyG cut from it (``EdgeIndex(e)``, ``e[0]``) are not seen, neither here nor by its
        own caches. Those of other formats are made anew each time.

        Args:
            edge_index: ``[2, E]`` int64 or int32, as tensor or ``EdgeIndex``; or the transposed adjacency matrix
                ``[N_dst, N_src]``, whose values are edge weights: ``torch.sparse`` (CSR, CSC, or COO, whose repeated
                entries are summed) or ``torch_sparse.SparseTensor``.
            num_src: Number of nodes messages come from.
            num_dst: Number of nodes messages go to; None: what ``edge_index`` says, or else ``num_src``.
            flow: Where messages go: ``"source_to_target"``, from ``edge_index[0]`` to ``edge_index[1]``, or
                ``"target_to_source"``, not for a matrix.

        Raises:
            TypeError: ``edge_index`` is none of these, or its dtype is not one of indices.
            ValueError: A shape does not fit, ``flow`` is none of these, or goes backwards through a matrix.
            IndexError: An edge has an end that is no node. In a compiled function the error is PyTorch's assertion.
        """
        if flow not in FLOWS:
            raise ValueError(f"flow: expected one of {', '.join(map(repr, FLOWS))}, got {flow!r}.")
        if isinstance(edge_index, EdgeIndex) and not torch.compiler.is_compiling():
            return _known_or_new(edge_index, num_src, num_dst, flow)
        if isinstance(edge_index, Tensor) and edge_index.layout is torch.strided:
            return _from_coo(edge_index, num_src, num_dst, flow)
        if not isinstance(edge_index, Tensor) and not _is_sparse_tensor(edge_index):
            raise TypeError(
                "edge_index: expected a tensor [2, E], an EdgeIndex or a sparse matrix, "
                f"got {type(edge_index).__name__}."
            )
        if flow == "target_to_source":
            raise ValueError(
                "edge_index: expected indices [2, E] with flow='target_to_source', got a sparse matrix; "
                "transpose it instead."
            )
        if torch.compiler.is_compiling() or callable(get_eval_frame_callback()):  # a skipped frame, too
            result: Adjacency = _outside_of_dynamo(edge_index, num_src, num_dst)
            return result
        return _from_matrix(edge_index, num_src, num_dst)

    def __repr__(self) -> str:
        return f"Adjacency(num_src={self.num_src}, num_dst={self.num_dst}, num_edges={self.num_edges})"


def _grouped(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> Grouping:
    # In inference mode the results could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        # Looking costs a fraction of sorting; on other devices the answer would have to be waited for.
        if key.device.type == "cpu" and _in_order(key):
            return pointers(key, num_keys), other, None
        if key.is_cuda:  # the ends are known to be nodes, and to look again would be to wait again
            return group_known_edges(key, other, num_keys)
        return group_edges(key, other, num_keys, num_others)


def _in_order(key: Tensor) -> bool:
    if torch.compiler.is_compiling() or not has_values(key):
        return False
    return bool((key[1:] >= key[:-1]).all())


# ---- Indices.


def _from_coo(edge_index: Tensor, num_src: int, num_dst: int | None, flow: str) -> Adjacency:
    num_rows, num_cols = None, None
    if isinstance(edge_index, EdgeIndex):
        num_rows, num_cols = edge_index.sparse_size()
        edge_index = edge_index.as_tensor()
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index: expected int64 indices, got {edge_index.dtype}.")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index: expected shape [2, E], got {list(edge_index.shape)}.")
    forward = flow == "source_to_target"
    known_src, known_dst = (num_rows, num_cols) if forward else (num_cols, num_rows)
    if num_dst is None:
        num_dst = known_dst if known_dst is not None else num_src
    if (known_src is not None and known_src != num_src) or (known_dst is not None and known_dst != num_dst):
        wanted = (num_src, num_dst) if forward else (num_dst, num_src)
        raise ValueError(
            f"edge_index: expected sparse_size={wanted}, the numbers of nodes, got {(num_rows, num_cols)}."
        )
    source, target = _ends(edge_index, forward)
    check_range("edge_index", "source", source, num_src)
    check_range("edge_index", "target", target, num_dst)
    return Adjacency((source, target), num_src, num_dst)


def _ends(edge_index: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    edge_index = _ordinary(edge_index.to(torch.int64))
    return (edge_index[0], edge_index[1]) if forward else (edge_index[1], edge_index[0])


def _ordinary(index: Tensor) -> Tensor:
    """Not a tensor of the inference mode, which no backward could save."""
    if torch.compiler.is_compiling() or not index.is_inference():
        return index
    with torch.inference_mode(False):
        return index.clone()


def _known_or_new(edge_index: EdgeIndex, num_src: int, num_dst: int | None, flow: str) -> Adjacency:
    data = edge_index.as_tensor()
    # What an inference tensor holds may change unseen, and fake tensors hold nothing.
    if not has_values(data) or data.is_inference() or edge_index.is_inference():
        return _from_coo(edge_index, num_src, num_dst, flow)
    # Changes of the EdgeIndex count on itself, those of the tensor inside it on that one.
    state = (data, data._version, edge_index._version, edge_index.sparse_size())
    held = _known.get(edge_index)
    if held is None or held[0][0] is not data or held[0][1:] != state[1:]:
        held = (state, {})
        _known[edge_index] = held
    graphs: dict[Any, Adjacency] = held[1]
    key = (num_src, num_dst, flow)
    adjacency = graphs.get(key)
    if adjacency is None:
        with torch.inference_mode(False):
            adjacency = _from_coo(edge_index, num_src, num_dst, flow)
        adjacency.origin = weakref.ref(edge_index)
        if not has_values(adjacency.source):  # computed under a fake mode
            return adjacency
        if len(graphs) >= _MOST:
            graphs.clear()
        graphs[key] = adjacency
    return adjacency


# ---- Matrices.


def _is_sparse_tensor(matrix: object) -> bool:
    """``torch_sparse.SparseTensor``, which need not be installed."""
    return all(callable(getattr(matrix, name, None)) for name in ("csr", "sparse_sizes", "has_value"))


def _from_matrix(matrix: Any, num_src: int, num_dst: int | None) -> Adjacency:
    loops: Loops = "added"
    if not isinstance(matrix, Tensor):
        size, loops = tuple(matrix.sparse_sizes()), "replaced"
    elif matrix.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo):
        size = tuple(matrix.shape)
    else:
        raise TypeError(f"edge_index: expected a sparse matrix in CSR, CSC or COO, got layout {matrix.layout}.")
    if num_dst is None and len(size) == 2:
        num_dst = size[0]
    if num_dst is None or size != (num_dst, num_src):
        shown = "N_dst" if num_dst is None else num_dst
        raise ValueError(
            f"edge_index: expected a sparse matrix [N_dst, N_src] = [{shown}, {num_src}], got {list(size)}."
        )
    if not isinstance(matrix, Tensor):
        ptr, index, weight = matrix.csr()
    elif matrix.layout is torch.sparse_csr:
        ptr, index, weight = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    elif matrix.layout is torch.sparse_csc:
        ptr, index, weight = matrix.ccol_indices(), matrix.row_indices(), matrix.values()
    else:
        # Before summing: an index outside would pass for another one inside.
        check_range("edge_index", "target", matrix._indices()[0], num_dst)
        check_range("edge_index", "source", matrix._indices()[1], num_src)
        matrix = matrix.coalesce()
        ptr, index, weight = None, None, matrix.values()
    weight = None if weight is None else _ordinary(weight)
    if weight is not None and weight.dim() != 1:
        raise ValueError(
            f"edge_index: expected a sparse matrix with one number per entry, got values of shape {list(weight.shape)}."
        )
    if ptr is None:
        target, source = (_ordinary(index) for index in matrix.indices().detach())
        return Adjacency((source, target), num_src, num_dst, edge_weight=weight, loops=loops)
    if isinstance(matrix, Tensor) and matrix.layout is torch.sparse_csc:
        grouping = _compressed(ptr, index, num_src, num_dst, "target")
        ends = (None, grouping[1])
        return Adjacency(ends, num_src, num_dst, by_source=grouping, edge_weight=weight, loops=loops)
    grouping = _compressed(ptr, index, num_dst, num_src, "source")
    return Adjacency((grouping[1], None), num_src, num_dst, by_target=grouping, edge_weight=weight, loops=loops)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_of_dynamo(matrix: Any, num_src: int, num_dst: int | None) -> Adjacency:
    """The same, a break in the graph. Dynamo can hold no views of a sparse matrix: these are copies."""
    made = _from_matrix(matrix, num_src, num_dst)

    def copied(t: Tensor | None) -> Any:
        return None if t is None else t.clone()

    ends = (copied(made._source), copied(made._target))
    by_target, by_source = (
        None if g is None else (copied(g[0]), copied(g[1]), copied(g[2])) for g in (made._by_target, made._by_source)
    )
    return Adjacency(
        ends,
        made.num_src,
        made.num_dst,
        by_target=by_target,
        by_source=by_source,
        edge_weight=copied(made.edge_weight),
        loops=made.loops,
    )


def _compressed(ptr: Tensor, index: Tensor, num_keys: int, num_others: int, other: str) -> Grouping:
    ptr, index = _ordinary(ptr.detach().to(torch.int64)), _ordinary(index.detach().to(torch.int64))
    check_range("edge_index", other, index, num_others)
    if not torch.compiler.is_compiling() and has_values(ptr):
        ends = (int(ptr[0]), int(ptr[-1])) if ptr.shape[0] else (0, 0)
        if ptr.shape != (num_keys + 1,) or ends != (0, index.shape[0]) or not _in_order(ptr):
            order = "" if _in_order(ptr) else ", and some fall"
            raise ValueError(
                f"edge_index: expected {num_keys + 1} pointers that rise from 0 to {index.shape[0]}, the number of "
                f"entries, got {list(ptr.shape)} from {ends[0]} to {ends[1]}{order}."
            )
    return ptr, index, None


# ---- What layers need besides.


def edge_index_of(adjacency: Adjacency, flow: str) -> Tensor:
    """``[2, E]``: the edges as PyG's layers take them with this flow."""
    ends = (adjacency.source, adjacency.target)
    return torch.stack(ends if flow == "source_to_target" else ends[::-1])


def normalized(
    adjacency: Adjacency, edge_weight: Tensor | None, dtype: torch.dtype, reduce: str = "sum"
) -> tuple[Adjacency, Tensor]:
    r"""The graph with self-loops, and its symmetrically normalised weights, as ``GCNConv`` makes them.

    :math:`w_{ij} / \sqrt{d_i d_j}` with the degrees :math:`d_i = \sum_j w_{ij}`, loops counted; see ``loops`` for
    which are added. Without weights the result is kept, so that for an ``EdgeIndex`` it is made once.

    Args:
        adjacency: A square graph.
        edge_weight: ``[E]``, or None: the values of the matrix, or else 1.
        dtype: Dtype of the weights where there is no ``edge_weight``.
        reduce: In a compiled function, ``"sum"`` keeps former loops as edges of weight 0, so that the graph's size is
            known; for other values, they have to be dropped, which is a break in the graph.

    Returns:
        The graph with loops, and ``[E']`` weights of ``dtype``, differentiable in ``edge_weight``.

    Raises:
        ValueError: The graph is not square.
    """
    if adjacency.num_src != adjacency.num_dst:
        raise ValueError(
            "edge_index: expected as many sources as targets with normalize='gcn', "
            f"got {adjacency.num_src} and {adjacency.num_dst}."
        )
    if edge_weight is None:
        edge_weight = adjacency.edge_weight
    if edge_weight is not None:
        return _normalized(adjacency, edge_weight, dtype, reduce)
    known = adjacency.normalized.get(dtype)
    if known is None:
        with torch.inference_mode(False), torch.no_grad():
            known = _normalized(adjacency, None, dtype, reduce)
        adjacency.normalized[dtype] = known
    return known


def _normalized(
    adjacency: Adjacency, edge_weight: Tensor | None, dtype: torch.dtype, reduce: str
) -> tuple[Adjacency, Tensor]:
    # Degrees are sums: in 16 bits they would stop growing.
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    edge_weight = None if edge_weight is None else edge_weight.to(sums)
    edge_index, n = edge_index_of(adjacency, "source_to_target"), adjacency.num_dst
    add = adjacency.loops == "remaining"
    if adjacency.loops == "replaced":
        edge_index, edge_weight = remove_self_loops(edge_index, edge_weight)
    if not add:
        edge_index, edge_weight = add_self_loops(edge_index, edge_weight, 1.0, n)
    elif torch.compiler.is_compiling() and reduce == "sum":
        edge_index, edge_weight = _with_loops(edge_index, edge_weight, n, sums)
        add = False
    edge_index, weight = gcn_norm(edge_index, edge_weight, n, False, add, "source_to_target", sums)
    return Adjacency((edge_index[0], edge_index[1]), n, n), weight.to(dtype)


def _with_loops(edge_index: Tensor, edge_weight: Tensor | None, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``add_remaining_self_loops`` with shapes that do not depend on how many loops there are."""
    source, target = edge_index
    is_loop = source == target
    if edge_weight is None:
        edge_weight = torch.ones(edge_index.shape[1], dtype=dtype, device=edge_index.device)
    place = torch.where(is_loop, target, n)
    loops = edge_weight.new_ones(n + 1).index_put((place,), edge_weight)[:n]
    nodes = torch.arange(n, device=edge_index.device).expand(2, -1)
    return torch.cat((edge_index, nodes), dim=1), torch.cat((torch.where(is_loop, 0.0, edge_weight), loops))
