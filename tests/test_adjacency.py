"""Adjacency: any format of a graph, grouped by either end, and normalised as by PyG."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from conv_common import adj_t, check_grouping, formats, graph, without_duplicates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from torch_mtl_pyg import MultiTaskConv
from torch_mtl_pyg import adjacency as module
from torch_mtl_pyg.adjacency import Adjacency, normalized

N, M = 17, 11


def check(adjacency: Adjacency, num_src: int, num_dst: int) -> None:
    assert (adjacency.num_src, adjacency.num_dst) == (num_src, num_dst)
    assert adjacency.num_edges == len(adjacency.source) == len(adjacency.target)
    check_grouping(adjacency.by_target(), adjacency.target, adjacency.source, num_dst)
    check_grouping(adjacency.by_source(), adjacency.source, adjacency.target, num_src)
    assert adjacency.by_target() is adjacency.by_target() and adjacency.by_source() is adjacency.by_source()


def edges_of(adjacency: Adjacency) -> list[tuple[int, int]]:
    return sorted(zip(adjacency.source.tolist(), adjacency.target.tolist(), strict=True))


@pytest.mark.parametrize("num_dst", (N, M))
def test_every_format_is_the_same_graph(num_dst: int) -> None:
    edge_index = without_duplicates(graph(N, num_dst=num_dst))
    edge_index = edge_index[:, torch.randperm(edge_index.shape[1])]
    expected = sorted(map(tuple, edge_index.t().tolist()))
    for name, given_as in formats(edge_index, N, num_dst).items():
        adjacency = Adjacency.of(given_as, N, num_dst)
        check(adjacency, N, num_dst)
        assert edges_of(adjacency) == expected, name
        matrix = name in ("coo", "csr", "csc")
        assert (adjacency.edge_weight is not None) == matrix
        assert adjacency.loops == ("added" if matrix else "remaining")


def test_order_of_edges_is_that_of_the_format() -> None:
    edge_index = without_duplicates(graph())
    weight = torch.randn(edge_index.shape[1], dtype=torch.float64)
    dense = adj_t(edge_index, N, weight)
    for sparse in (dense.to_sparse_coo(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        adjacency = Adjacency.of(sparse, N)
        assert adjacency.edge_weight is not None
        torch.testing.assert_close(adjacency.edge_weight, dense[adjacency.target, adjacency.source])
    e = graph()
    adjacency = Adjacency.of(e, N)
    assert torch.equal(adjacency.source, e[0]) and torch.equal(adjacency.target, e[1])
    back = Adjacency.of(e, N, flow="target_to_source")
    assert torch.equal(back.source, e[1]) and torch.equal(back.target, e[0])
    check(back, N, N)


def test_sorted_edges_need_no_permutation() -> None:
    edge_index = without_duplicates(graph())
    as_ = formats(edge_index, N)
    for name, by_target, by_source in (
        ("tensor by col", True, False),
        ("tensor by row", False, True),
        ("EdgeIndex by col", True, False),
        ("EdgeIndex by row", False, True),
        ("csr", True, False),
        ("coo", True, False),
        ("csc", False, True),
    ):
        adjacency = Adjacency.of(as_[name], N)
        assert (adjacency.by_target()[2] is None) == by_target, name
        assert (adjacency.by_source()[2] is None) == by_source, name


def test_a_wrong_sort_order_is_not_believed() -> None:
    lies = EdgeIndex(graph(), sparse_size=(N, N), sort_order="col")
    check(Adjacency.of(lies, N), N, N)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (5, 0), (0, 5), (5, 5)])
def test_no_edges_and_no_nodes(n: int, m: int) -> None:
    for empty in (
        torch.empty(2, 0, dtype=torch.int64),
        torch.zeros(m, n).to_sparse_csr(),
        torch.zeros(m, n).to_sparse(),
    ):
        adjacency = Adjacency.of(empty, n, m)
        check(adjacency, n, m)
        assert adjacency.num_edges == 0


def test_num_dst_from_what_the_format_knows() -> None:
    e = torch.tensor([[0, 4], [1, 2]])
    assert Adjacency.of(e, 5).num_dst == 5
    assert Adjacency.of(EdgeIndex(e, sparse_size=(5, 3)), 5).num_dst == 3
    assert Adjacency.of(EdgeIndex(e), 5).num_dst == 5
    assert Adjacency.of(EdgeIndex(e.flip(0), sparse_size=(3, 5)), 5, flow="target_to_source").num_dst == 3
    assert Adjacency.of(adj_t(e, 5, num_dst=3).to_sparse_csr(), 5).num_dst == 3


class SparseTensor:
    """The part of ``torch_sparse.SparseTensor`` that is used."""

    def __init__(self, csr: Tensor, with_values: bool = True) -> None:
        self.matrix = csr
        self.with_values = with_values

    def csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        values = self.matrix.values() if self.with_values else None
        return self.matrix.crow_indices(), self.matrix.col_indices(), values

    def sparse_sizes(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)  # type: ignore[return-value]

    def has_value(self) -> bool:
        return self.with_values


@pytest.mark.parametrize("with_values", (True, False))
def test_sparse_tensor_of_torch_sparse(with_values: bool) -> None:
    edge_index = without_duplicates(graph())
    adjacency = Adjacency.of(SparseTensor(adj_t(edge_index, N).to_sparse_csr(), with_values), N)
    check(adjacency, N, N)
    assert edges_of(adjacency) == sorted(map(tuple, edge_index.t().tolist()))
    assert (adjacency.edge_weight is not None) == with_values
    # fill_diag of torch_sparse: ones take the place of the loops there are.
    graph_with_loops, weight = normalized(adjacency, None, torch.float64)
    no_loops = edge_index[:, edge_index[0] != edge_index[1]]
    expected = gcn_norm(no_loops, None, N, dtype=torch.float64)
    assert edges_of(graph_with_loops) == sorted(map(tuple, expected[0].t().tolist()))
    torch.testing.assert_close(weight.sum(), expected[1].sum())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_the_real_sparse_tensor() -> None:
    torch_sparse = pytest.importorskip("torch_sparse")
    edge_index, weight = graph(), torch.rand(graph().shape[1], dtype=torch.float64)
    x = torch.randn(N, 4, dtype=torch.float64)
    for value in (None, weight):
        matrix = torch_sparse.SparseTensor(row=edge_index[1], col=edge_index[0], value=value, sparse_sizes=(N, N))
        conv = MultiTaskConv(4, {"a": 3, "b": 2}).double()
        torch.testing.assert_close(conv.packed(x, matrix), conv.packed(x, edge_index, value))
        conv = MultiTaskConv(4, {"a": 3, "b": 2}, normalize="gcn").double()
        for name, single in conv.to_modules().items():
            torch.testing.assert_close(conv(x, matrix)[name], single(x, matrix))


def test_repeated_entries_of_a_matrix_are_summed() -> None:
    index, values = torch.tensor([[1, 0, 1], [0, 2, 0]]), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    adjacency = Adjacency.of(torch.sparse_coo_tensor(index, values, (3, 3), check_invariants=True), 3)
    assert edges_of(adjacency) == [(0, 1), (2, 0)]
    assert adjacency.edge_weight is not None and adjacency.edge_weight.tolist() == [2.0, 4.0]
    (gradient,) = torch.autograd.grad((adjacency.edge_weight * torch.tensor([5.0, 7.0])).sum(), values)
    assert gradient.tolist() == [7.0, 5.0, 7.0]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=40),
    st.sampled_from(("tensor", "EdgeIndex", "by col", "by row", "int32")),
    st.sampled_from(("source_to_target", "target_to_source")),
)
@settings(max_examples=60, deadline=None)
def test_any_graph(pairs: list[tuple[int, int]], form: str, flow: str) -> None:
    e = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    if form.startswith("by"):
        e = e[:, torch.argsort(e[int(form == "by col")], stable=True)].contiguous()
    edge_index: Any = e
    if form != "tensor":
        order = form.removeprefix("by ") if form.startswith("by") else None
        edge_index = EdgeIndex(e.int() if form == "int32" else e, sparse_size=(7, 5), sort_order=order)
    forward = flow == "source_to_target"
    num_src, num_dst = (7, 5) if forward else (5, 7)
    adjacency = Adjacency.of(edge_index, num_src, num_dst, flow)
    check(adjacency, num_src, num_dst)
    assert torch.equal(torch.stack((adjacency.source, adjacency.target)), e if forward else e.flip(0))


# ---- What is kept with an EdgeIndex.


def edge_index() -> EdgeIndex:
    e = graph()
    return EdgeIndex(e[:, torch.argsort(e[1], stable=True)].contiguous(), sparse_size=(N, N), sort_order="col")


def test_an_edge_index_is_grouped_once() -> None:
    e = edge_index()
    first = Adjacency.of(e, N)
    assert Adjacency.of(e, N) is first
    assert Adjacency.of(e, N, N) is not None
    back = Adjacency.of(e, N, flow="target_to_source")
    assert back is not first and torch.equal(back.source, first.target)
    assert Adjacency.of(e, N, flow="target_to_source") is back
    assert Adjacency.of(e.clone(), N) is not first
    tensor = graph()
    assert Adjacency.of(tensor, N) is not Adjacency.of(tensor, N)
    a, b = normalized(first, None, torch.float64), normalized(Adjacency.of(e, N), None, torch.float64)
    assert a[0] is b[0] and a[1] is b[1]
    assert normalized(first, None, torch.float32)[1].dtype == torch.float32


def test_sizes_of_one_edge_index_are_told_apart() -> None:
    e = EdgeIndex(torch.tensor([[0, 1], [1, 0]]))
    for n in range(2, 30):
        check(Adjacency.of(e, n, n + 1), n, n + 1)
    assert Adjacency.of(e, 2, 3).num_dst == 3
    with pytest.raises(IndexError):
        Adjacency.of(e, 1, 3)


@pytest.mark.parametrize("change", ("of it", "of its tensor", "of a view", "data", "size"))
def test_changes_are_seen(change: str) -> None:
    e = EdgeIndex(torch.tensor([[0, 1, 2], [1, 2, 0]]))
    before = edges_of(Adjacency.of(e, 4))
    if change == "of it":
        e.add_(1)
    elif change == "of its tensor":
        e.as_tensor().add_(1)
    elif change == "of a view":
        e.as_tensor()[:, 1].add_(1)
    elif change == "data":
        e._data = e._data + 1
    else:
        e.sparse_resize_(5, 5)
        with pytest.raises(ValueError, match=r"expected sparse_size=\(4, 5\), .* got \(5, 5\)"):
            Adjacency.of(e, 4)
        return
    adjacency = Adjacency.of(e, 4)
    assert edges_of(adjacency) != before
    assert torch.equal(torch.stack((adjacency.source, adjacency.target)), e.as_tensor())


def test_what_is_kept_goes_with_its_edge_index() -> None:
    e = edge_index()
    kept = weakref.ref(Adjacency.of(e, N))
    held = len(module._known)
    for copied in (copy.copy(e), copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        check(Adjacency.of(copied, N), N, N)
    buffer = io.BytesIO()
    torch.save(e, buffer)
    assert b"adjacency" not in buffer.getvalue().lower()
    del e, copied
    gc.collect()
    assert kept() is None and len(module._known) < held


def test_kept_in_inference_mode_and_used_in_training() -> None:
    e = edge_index()
    with torch.inference_mode():
        first = Adjacency.of(e, N)
        first.by_target(), first.by_source(), normalized(first, None, torch.float64)
    again = Adjacency.of(e, N)
    assert again is first
    kept = [*again.by_target(), *again.by_source(), normalized(again, None, torch.float64)[1]]
    assert not any(t.is_inference() for t in kept if t is not None)
    with torch.inference_mode():
        inside = EdgeIndex(graph())
        raw = graph()
    for of_inference in (inside, raw):
        adjacency = Adjacency.of(of_inference, N)
        check(adjacency, N, N)
        assert not any(t.is_inference() for t in (adjacency.source, *adjacency.by_target()) if t is not None)
    with torch.inference_mode():
        inside.add_(-1).add_(1)
        check(Adjacency.of(inside, N), N, N)


def test_fake_tensors_are_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    e = edge_index()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Adjacency.of(e, N)
        assert isinstance(fake.by_target()[0], FakeTensor)
    check(Adjacency.of(e, N), N, N)
    with FakeTensorMode() as mode:
        adjacency = Adjacency.of(mode.from_tensor(graph()), N)
        assert adjacency.by_target()[0].shape == (N + 1,) and adjacency.by_source()[1].shape == graph()[0].shape


@pytest.mark.parametrize("name", ("tensor", "EdgeIndex by col", "EdgeIndex"))
def test_in_a_compiled_function(name: str) -> None:
    torch._dynamo.reset()
    given_as = formats(without_duplicates(graph()), N)[name]

    def run(edge_index: Any) -> tuple[Tensor, ...]:
        adjacency = Adjacency.of(edge_index, N)
        ptr, index, _ = adjacency.by_target()
        return ptr, index, adjacency.source, adjacency.by_source()[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(given_as)
    for a, b in zip(compiled, run(given_as), strict=True):
        assert torch.equal(a, b)
    if name == "tensor":
        with pytest.raises(RuntimeError, match=r"edge_index: expected every source to be one of the nodes"):
            torch.compile(run, fullgraph=True, backend="aot_eager")(given_as + 1)


# ---- Normalisation.


@pytest.mark.parametrize("weighted", (True, False))
@pytest.mark.parametrize("flow", ("source_to_target", "target_to_source"))
def test_normalisation_is_that_of_gcn(weighted: bool, flow: str) -> None:
    e = graph()
    weight = torch.rand(e.shape[1], dtype=torch.float64, requires_grad=True) if weighted else None
    adjacency, mine = normalized(Adjacency.of(e, N, flow=flow), weight, torch.float64)
    edge_index, theirs = gcn_norm(e, weight, N, flow=flow, dtype=torch.float64)
    assert torch.equal(module.edge_index_of(adjacency, flow), edge_index)
    torch.testing.assert_close(mine, theirs)
    if weighted:
        (a,) = torch.autograd.grad(mine.sin().sum(), weight)
        (b,) = torch.autograd.grad(theirs.sin().sum(), weight)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ("csr", "coo"))
def test_normalisation_of_a_matrix_is_that_of_gcn(name: str) -> None:
    matrix = formats(without_duplicates(graph()), N)[name]
    adjacency, weight = normalized(Adjacency.of(matrix, N), None, torch.float64)
    mine = torch.zeros(N, N, dtype=torch.float64).index_put(
        (adjacency.target, adjacency.source), weight, accumulate=True
    )
    torch.testing.assert_close(mine, gcn_norm(matrix, None, N, dtype=torch.float64)[0].to_dense())


@pytest.mark.parametrize("weighted", (True, False))
def test_normalisation_in_a_compiled_function(weighted: bool) -> None:
    torch._dynamo.reset()
    e = graph()
    weight = torch.rand(e.shape[1], dtype=torch.float64, requires_grad=True) if weighted else None

    def dense(e: Tensor, weight: Tensor | None) -> Tensor:
        adjacency, own = normalized(Adjacency.of(e, N), weight, torch.float64)
        return own.new_zeros(N, N).index_put((adjacency.target, adjacency.source), own, accumulate=True)

    got, expected = torch.compile(dense, fullgraph=True, backend="aot_eager")(e, weight), dense(e, weight)
    torch.testing.assert_close(got, expected)
    if weighted:
        (a,) = torch.autograd.grad(got.sin().sum(), weight)
        (b,) = torch.autograd.grad(expected.sin().sum(), weight)
        torch.testing.assert_close(a, b)


def test_degrees_of_16_bits_are_summed_in_32() -> None:
    e = torch.stack((torch.arange(1, 1000), torch.zeros(999, dtype=torch.int64)))
    weight = normalized(Adjacency.of(e, 1000), None, torch.bfloat16)[1]
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight[0].double(), torch.tensor(1000.0).double().rsqrt(), rtol=2.0**-8, atol=0)


# ---- Errors.


E = torch.tensor([[0, 1, 2], [1, 2, 0]])


def csr(ptr: list[int], index: list[int], size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(ptr, index, torch.ones(len(index)), size, check_invariants=False)


def coo(index: list[list[int]]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor(index), torch.ones(2), (3, 3), check_invariants=False)


@pytest.mark.parametrize(
    ("edge_index", "error", "message"),
    [
        (E.float(), TypeError, "edge_index: expected int64 indices, got torch.float32"),
        (E.bool(), TypeError, "edge_index: expected int64 indices, got torch.bool"),
        (E.to(torch.int16), TypeError, "edge_index: expected int64 indices, got torch.int16"),
        (E.t(), ValueError, r"edge_index: expected shape \[2, E\], got \[3, 2\]"),
        (E[0], ValueError, r"edge_index: expected shape \[2, E\], got \[3\]"),
        (E.tolist(), TypeError, "edge_index: expected a tensor .* got list"),
        (None, TypeError, "edge_index: expected a tensor .* got NoneType"),
        (torch.tensor([[0, 5], [0, 3]]), IndexError, r"edge_index: expected every source in \[0, 3\), got 5 at edge 1"),
        (
            torch.tensor([[0, 1], [-1, 3]]),
            IndexError,
            r"edge_index: expected every target in \[0, 3\), got -1 at edge 0",
        ),
        (EdgeIndex([[0, 3], [0, 1]]), IndexError, r"edge_index: expected every source in \[0, 3\), got 3 at edge 1"),
        (EdgeIndex(E, sparse_size=(4, 3)), ValueError, r"edge_index: expected sparse_size=\(3, 3\), .* got \(4, 3\)"),
        (
            torch.eye(4).to_sparse_csr(),
            ValueError,
            r"expected a sparse matrix .* = \[N_dst, 3\]|\[4, 3\], got \[4, 4\]",
        ),
        (
            csr([0, 1, 1, 2], [0, 7], (3, 3)),
            IndexError,
            r"edge_index: expected every source in \[0, 3\), got 7 at edge 1",
        ),
        (csr([0, 2, 1, 2], [0, 1], (3, 3)), ValueError, "edge_index: expected 4 pointers that rise from 0 to 2"),
        (csr([0, 1, 1, 5], [0, 1], (3, 3)), ValueError, "edge_index: expected 4 pointers that rise from 0 to 2"),
        (coo([[0, 1], [0, 3]]), IndexError, r"edge_index: expected every source in \[0, 3\), got 3 at edge 1"),
        (coo([[0, 3], [0, 1]]), IndexError, r"edge_index: expected every target in \[0, 3\), got 3 at edge 1"),
        (torch.ones(3, 3, 2).to_sparse_coo(), ValueError, "edge_index: expected a sparse matrix"),
        (torch.ones(4, 4).to_sparse_bsr((2, 2)), TypeError, "edge_index: expected a sparse matrix in CSR, CSC or COO"),
        (torch.ones(3, 3, 2).to_sparse(2), ValueError, r"expected a sparse matrix .* got \[3, 3, 2\]"),
    ],
)
def test_bad_edges(edge_index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Adjacency.of(edge_index, 3)


def test_bad_flow_and_shape() -> None:
    with pytest.raises(ValueError, match="flow: expected one of 'source_to_target', 'target_to_source', got 'up'"):
        Adjacency.of(E, 3, flow="up")
    with pytest.raises(ValueError, match="got a sparse matrix; transpose it instead"):
        Adjacency.of(torch.eye(3).to_sparse_csr(), 3, flow="target_to_source")
    with pytest.raises(ValueError, match="as many sources as targets with normalize='gcn', got 3 and 4"):
        normalized(Adjacency.of(E, 3, 4), None, torch.float32)
