"""MultiTaskConv where inputs depend on each other, change in between, or cost more one way than the other."""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_common import formats, graph, without_duplicates
from torch import Tensor
from torch_geometric import EdgeIndex

import torch_mtl_pyg as mtl
from torch_mtl_pyg.adjacency import Adjacency
from torch_mtl_pyg.ops import _aggregate_linear, aggregate, aggregate_linear
from torch_mtl_pyg.ops._edges import Edges

N = 10


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_gradients(loss: Tensor, inputs: list[Tensor]) -> None:
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    recorded = torch.autograd.grad(loss, inputs, create_graph=True)
    for a, b in zip(plain, recorded, strict=True):
        torch.testing.assert_close(a, b)


def test_first_gradients_are_the_same_with_and_without_a_graph(any_backend: str) -> None:
    """Inputs that depend on each other: the targets are sources too, a layer is applied twice, weights come from x."""
    x, edge_index = random(N, 8), graph(N, 30)
    conv = mtl.MultiTaskConv((8, 8), {"a": 3, "b": 2}).double()
    between = edge_index[:, edge_index[1] < 4]
    same_gradients(conv.packed((x, x[:4]), between).sin().sum(), [x, *conv.parameters()])
    twice = mtl.MultiTaskConv(8, {"a": 8}).double()
    same_gradients(twice.packed(twice.packed(x, edge_index), edge_index).sin().sum(), [x, *twice.parameters()])
    weight = (x[edge_index[0]] * x[edge_index[1]]).sum(1)
    for aggr in ("sum", "mean"):
        out = aggregate(x, Adjacency.of(edge_index, N), weight, aggr)
        same_gradients(out.sin().sum(), [x])
        conv = mtl.MultiTaskConv(8, {"a": 3}, aggr=aggr).double()
        same_gradients(conv.packed(x, edge_index, weight).sin().sum(), [x, *conv.parameters()])


FORMATS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda e: e,
    "tensor in order": lambda e: e[:, e[1].argsort()].contiguous(),
    "EdgeIndex": lambda e: EdgeIndex(e, sparse_size=(N, N)),
    "EdgeIndex in order": lambda e: EdgeIndex(e[:, e[1].argsort()].contiguous(), sparse_size=(N, N), sort_order="col"),
}


@pytest.mark.parametrize("itself", (True, False))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("aggr", ("mean", "max"))
def test_edges_changed_before_the_backward_are_an_error(any_backend: str, form: str, aggr: str, itself: bool) -> None:
    conv, x = mtl.MultiTaskConv(8, {"a": 3}, aggr=aggr), torch.randn(N, 8, requires_grad=True)
    edge_index = FORMATS[form](graph(N, 30))
    for packed in (lambda: conv.packed(x, edge_index), lambda: aggregate(x, Adjacency.of(edge_index, N), None, aggr)):
        loss = packed().relu_().sum()
        indices = edge_index if itself or not isinstance(edge_index, EdgeIndex) else edge_index.as_tensor()
        indices[0, 0] = (int(indices[0, 0]) + 1) % N
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    packed().sum().backward()


def test_a_graph_does_not_keep_its_edge_index() -> None:
    edge_index = EdgeIndex(graph(N, 30), sparse_size=(N, N))
    kept, adjacency = weakref.ref(edge_index), Adjacency.of(edge_index, N)
    assert pickle.loads(pickle.dumps(adjacency)).num_edges == adjacency.num_edges
    del edge_index
    assert kept() is None
    aggregate(torch.randn(N, 8, requires_grad=True), adjacency).sum().backward()


def test_the_gradient_of_a_weight_need_not_fit_16_bits_on_the_way(any_backend: str) -> None:
    """<g, W x> is 320, while W x is beyond float16."""
    adjacency = Adjacency.of(torch.tensor([[0], [0]]), 1)
    x, w = torch.full((1, 64), 80.0).half(), torch.full((1, 64), 20.0).half()
    edge_weight = torch.zeros(1).half().requires_grad_()
    out = aggregate_linear(x, adjacency, [w], edge_weight=edge_weight)
    (gradient,) = torch.autograd.grad(out, edge_weight, torch.full((1, 1), 0.003125).half())
    torch.testing.assert_close(gradient, torch.tensor([320.0]).half(), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ((5, 3.7), TypeError, r"size: expected integers or None, got 3.7"),
        ((5, True), TypeError, r"size: expected integers or None, got True"),
        ((5.0, 3), TypeError, r"size: expected integers or None, got 5.0"),
        ((5, "3"), TypeError, r"size: expected integers or None, got '3'"),
        ((None, -1), ValueError, r"size: expected numbers of nodes of at least 0, got -1"),
        ((4, 3), ValueError, r"size: expected \(5, 3\), the rows of x, got \(4, 3\)"),
    ],
)
def test_bad_sizes(any_backend: str, size: Any, error: type[Exception], message: str) -> None:
    conv = mtl.MultiTaskConv((8, 8), {"a": 3})
    with pytest.raises(error, match=message):
        conv((torch.randn(5, 8), None), torch.empty(2, 0, dtype=torch.int64), size=size)


@pytest.mark.parametrize(
    "register",
    ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
)
def test_hooks_on_the_aggregation_are_called(any_backend: str, register: str) -> None:
    conv, calls = mtl.MultiTaskConv(8, {"a": 3}), []
    getattr(conv.aggr_module, register)(lambda *_: calls.append(1))
    conv.packed(torch.randn(N, 8, requires_grad=True), graph(N, 30)).sum().backward()
    assert calls


def test_the_plan_goes_by_cost(fused: None) -> None:
    def plan(d: int, k: int, num_src: int, num_dst: int, edges: int, *, x_grad: bool, records: bool = True) -> Any:
        edge_index = torch.stack((torch.randint(num_src, (edges,)), torch.randint(num_dst, (edges,))))
        x = torch.empty(num_src, d, requires_grad=x_grad)
        args = _aggregate_linear.Arguments(x, None, (torch.empty(k, d, requires_grad=True),), None, (), None)
        return _aggregate_linear.plan(args, Edges.of(Adjacency.of(edge_index, num_src, num_dst)), 0, records)

    # Wide features to few columns: project first. Few to many: aggregate first, and keep for the backward.
    assert plan(500, 4, 1000, 1000, 5000, x_grad=True) == (True, False)
    assert plan(4, 500, 1000, 1000, 5000, x_grad=True) == (False, True)
    # Features that need no gradient: no gathering in the backward.
    assert plan(64, 64, 1000, 1000, 5000, x_grad=False) == (False, True)
    assert plan(64, 64, 1000, 1000, 5000, x_grad=True) == (False, False)
    # A sampled layer reads few of its sources: the backward goes by the targets.
    assert plan(128, 32, 100_000, 500, 1000, x_grad=False) == (False, True)
    assert plan(64, 64, 1000, 1000, 5000, x_grad=False, records=False) == (False, False)


@pytest.mark.parametrize("blocks", ([(2, 0), (3, 7)], [(0, 3), (2, 4)], [(2, 0)]))
def test_blocks_without_rows_or_columns(any_backend: str, blocks: Any) -> None:
    adjacency = Adjacency.of(torch.tensor([[0, 1, 2], [1, 0, 0]]), 3)
    x = random(3, sum(f for _, f in blocks))
    weights, bias = [random(*shape) for shape in blocks], random(sum(c for c, _ in blocks))
    out = aggregate_linear(x, adjacency, weights, bias)
    assert out.shape == (3, sum(c for c, _ in blocks))
    same_gradients(out.sin().sum(), [x, bias, *weights])


@pytest.mark.parametrize(("aggr", "weighted"), [("sum", True), ("mean", True), ("max", False)])
def test_hubs_both_ways(fused: None, aggr: str, weighted: bool) -> None:
    """A node that receives from all and sends to all, in float32, for few and for many columns, against float64."""
    n = 3000
    others = torch.arange(n)
    edge_index = torch.cat(
        (torch.stack((others, torch.full_like(others, 5))), torch.stack((torch.full_like(others, 5), others))), dim=1
    )
    weight = torch.rand(2 * n, dtype=torch.float64) if weighted else None
    for d, k in ((40, 3), (3, 40)):
        conv = mtl.MultiTaskConv(d, {"a": k}, aggr=aggr).double()
        x, results = torch.randn(n, d, dtype=torch.float64), []
        for backend, dtype in (("reference", torch.float64), ("fused", torch.float32)):
            with mtl.use_backend(backend):
                conv = conv.to(dtype)
                given = x.to(dtype).requires_grad_()
                own = None if weight is None else weight.to(dtype).requires_grad_()
                out = conv.packed(given, edge_index, own)
                wanted = [given, *conv.parameters(), *([] if own is None else [own])]
                grad = torch.linspace(0.5, 1, out.numel(), dtype=dtype).view_as(out)
                results.append([out, *torch.autograd.grad(out, wanted, grad)])
        for exact, got in zip(*results, strict=True):
            assert (got.double() - exact).norm() <= 2e-6 * exact.norm()


def test_long_sums_of_shares(fused: None) -> None:
    """The maximum of a million nodes is one node's value: its gradient is a sum of a million terms."""
    n = 1_000_000
    edge_index = torch.stack((torch.zeros(n, dtype=torch.int64), torch.arange(n)))
    x = torch.ones(1, 3, requires_grad=True)
    out = aggregate(x, Adjacency.of(edge_index, 1, n), reduce="max")
    (gradient,) = torch.autograd.grad(out, x, torch.full_like(out, 0.1))
    torch.testing.assert_close(gradient, torch.full((1, 3), 1e5), rtol=3e-5, atol=0)


@pytest.mark.parametrize("dynamic", (None, True))
def test_compiled_once_for_graphs_of_all_sizes(fused: None, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    compilations = []

    def backend(module: Any, _: Any) -> Any:
        compilations.append(1)
        return module.forward

    conv = mtl.MultiTaskConv(8, {"a": 3, "b": 2})
    run = torch.compile(conv.packed, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (10, 23, 41, 57, 80):
        x, edge_index = torch.randn(n, 8), torch.randint(n, (2, 4 * n))
        torch.testing.assert_close(run(x, edge_index), conv.packed(x, edge_index))
    assert len(compilations) <= 3


def test_gradients_through_the_values_of_a_matrix(any_backend: str) -> None:
    dense = torch.rand(6, 6, dtype=torch.float64) * (torch.rand(6, 6) < 0.5)
    x, conv = random(6, 8), mtl.MultiTaskConv(8, {"a": 3}, aggr="sum").double()
    expected = conv.packed(x, dense.to_sparse_coo())
    values = dense.to_sparse_csr().values().clone().requires_grad_()
    csr = dense.to_sparse_csr()
    matrix = torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), values, size=(6, 6))
    out = conv.packed(x, matrix)
    torch.testing.assert_close(out, expected)
    (of_values,) = torch.autograd.grad(out.sin().sum(), values)
    edges = dense.nonzero().t()
    weight = dense[edges[0], edges[1]].requires_grad_()
    (of_weights,) = torch.autograd.grad(conv.packed(x, edges.flip(0), weight).sin().sum(), weight)
    torch.testing.assert_close(of_values, of_weights)


def test_values_made_in_inference_mode(any_backend: str) -> None:
    with torch.inference_mode():
        matrix = torch.eye(4).to_sparse_csr()
    conv = mtl.MultiTaskConv(8, {"a": 3})
    conv.packed(torch.randn(4, 8, requires_grad=True), matrix).sum().backward()
    assert conv.weight.grad is not None


def test_direct_calls_can_be_differentiated_twice(fused: None) -> None:
    ptr, index = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1])
    x, w, weight = random(2, 3), random(2, 3), random(3)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.torch_mtl_pyg.aggregate(x, ptr, index, None, weight, None, 1)
        return out

    def projected(x: Tensor, w: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.torch_mtl_pyg.aggregate_linear(
            x, ptr, index, None, weight, [w], None, [], None, 1, False, False
        )[0]
        return out

    assert torch.autograd.gradgradcheck(plain, (x, weight))
    assert torch.autograd.gradgradcheck(projected, (x, w, weight))


def test_what_aggr_may_be() -> None:
    with pytest.raises(TypeError, match="aggr: expected a name, a list of them or an Aggregation, got int"):
        mtl.MultiTaskConv(8, {"a": 3}, aggr=3)


@pytest.mark.parametrize("layout", ("csr", "csc", "coo"))
def test_a_sparse_matrix_in_a_compiled_function(any_backend: str, layout: str) -> None:
    """A break in the graph, and the same numbers."""
    torch._dynamo.reset()
    conv, x = mtl.MultiTaskConv(8, {"a": 3, "b": 2}).double(), random(N, 8)
    matrix = formats(without_duplicates(graph(N, 30)), N)[layout]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about sparse matrices
        out = torch.compile(lambda x, a: conv.packed(x, a), backend="aot_eager")(x, matrix)
    expected = conv.packed(x, matrix)
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.sin().sum(), [x, *conv.parameters()]) for o in (out, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("aggr", ("mean", "sum", "max"))
def test_normalised_in_a_compiled_function(any_backend: str, aggr: str) -> None:
    """Former loops are dropped, or kept with a weight of 0: how many edges there are is a value."""
    torch._dynamo.reset()
    conv, x = mtl.MultiTaskConv(8, {"a": 3, "b": 2}, aggr=aggr, normalize="gcn").double(), random(N, 8)
    edge_index = graph(N, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(lambda x, e: conv.packed(x, e), fullgraph=True, backend="aot_eager")(x, edge_index)
    expected = conv.packed(x, edge_index)
    torch.testing.assert_close(out, expected)
    (got,), (wanted,) = (torch.autograd.grad(o.sin().sum(), x) for o in (out, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("aggr", ("lstm", "quantile"))
def test_aggregations_that_need_arguments(aggr: str) -> None:
    with pytest.raises(ValueError, match=f"aggr: expected '{aggr}' with its arguments in aggr_kwargs"):
        mtl.MultiTaskConv({"a": 8, "b": 8}, {"a": 1, "b": 1}, aggr=aggr)
