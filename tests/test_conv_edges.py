"""MultiTaskConv where inputs depend on each other, change in between, or cost more one way than the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_common import graph
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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("aggr", ("mean", "max"))
def test_edges_changed_before_the_backward_are_an_error(any_backend: str, form: str, aggr: str) -> None:
    conv, x = mtl.MultiTaskConv(8, {"a": 3}, aggr=aggr), torch.randn(N, 8, requires_grad=True)
    edge_index = FORMATS[form](graph(N, 30))
    loss = conv.packed(x, edge_index).sum()
    indices = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
    indices[0, 0] = (indices[0, 0] + 1) % N
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
