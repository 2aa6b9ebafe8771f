"""The compiled graph ops: every instruction set, dtype and width, hubs, thread counts, direct calls, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mtl_pyg.adjacency import Adjacency
from torch_mtl_pyg.ops import aggregate, aggregate_linear, reference_graph

# Around the widths of vectors, and where the ways of gathering change: one vector, two, four, eight, more.
WIDTHS = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 127, 130, 300)
REDUCES = ("sum", "mean", "max", "min")


def edges(num_src: int, num_dst: int, count: int, hub: int = 0) -> Tensor:
    """Random edges, `hub` more of them to the node in the middle, in any order."""
    source = torch.randint(num_src, (count + hub,))
    target = torch.cat((torch.randint(num_dst, (count,)), torch.full((hub,), num_dst // 2)))
    return torch.stack((source, target))[:, torch.randperm(count + hub)]


def expected(x: Tensor, adjacency: Adjacency, weight: Tensor | None, reduce: str) -> tuple[Tensor, Tensor]:
    """In float64, with the magnitude of the terms."""
    wide = None if weight is None else weight.double()
    exact = reference_graph.aggregate(x.double(), adjacency, wide, reduce)
    if reduce in ("max", "min"):
        return exact, exact.abs()
    return exact, reference_graph.aggregate(x.double().abs(), adjacency, None if wide is None else wide.abs(), reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduce", "weighted"), [("sum", True), ("mean", False), ("mean", True), ("max", False)])
def test_every_width(isa: str, dtype: torch.dtype, reduce: str, weighted: bool) -> None:
    adjacency = Adjacency.of(edges(40, 30, 300), 40, 30)
    weight = torch.randn(300).to(dtype) if weighted else None
    for width in WIDTHS:
        x = torch.randn(40, width).to(dtype)
        exact = expected(x, adjacency, weight, reduce)
        for view in (x, torch.cat((x, x), 1)[:, :width], x.t().contiguous().t()):
            assert_accurate(aggregate(view, adjacency, weight, reduce), *exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", REDUCES)
def test_hubs(isa: str, dtype: torch.dtype, reduce: str) -> None:
    """Rows above, at and below the number of edges that are shared out."""
    for hub in (511, 512, 513, 9000):
        target = torch.cat((torch.zeros(hub, dtype=torch.int64), torch.tensor([1, 2, 2])))
        adjacency = Adjacency.of(torch.stack((torch.randint(50, target.shape), target)), 50, 4)
        x = torch.randn(50, 20).to(dtype)
        assert_accurate(aggregate(x, adjacency, None, reduce), *expected(x, adjacency, None, reduce))


@pytest.mark.parametrize(("d", "k", "roots"), [(600, 3, True), (3, 600, True), (600, 3, False), (3, 600, False)])
def test_more_rows_than_are_summed_at_a_time(fused: None, d: int, k: int, roots: bool) -> None:
    """Both directions, as runs of rows where sums are not kept; two blocks, and a hub in each direction."""
    n = 15_000
    some = edges(n, n, 3000, hub=700)
    edge_index = torch.cat((some, some.flip(0)), 1)
    adjacency, weight = Adjacency.of(edge_index, n), torch.randn(edge_index.shape[1])
    x, bias, grad = torch.randn(n, d), torch.randn(k), torch.randn(n, k)
    shapes = [(k - 1, d - 2), (1, 2)]
    weights, root_weights = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes if roots]
    op = torch.ops.torch_mtl_pyg
    root = x if roots else None
    arguments = (*adjacency.by_target(), weight, weights, root, root_weights, bias, 1, False, False)
    out, _ = op.aggregate_linear(x, *arguments)
    shares = adjacency.by_target()[0].diff().clamp(min=1).float().reciprocal()
    backward = (*adjacency.by_source(), weight, shares, weights, root_weights, True, True)
    dx, dw = op.aggregate_linear_backward(grad, x, *backward)

    leaves = [t.double().requires_grad_() for t in (x, *weights, *root_weights)]
    blocks, own = leaves[1:3], leaves[3:] or None
    exact = reference_graph.aggregate_linear(
        leaves[0], adjacency, blocks, bias.double(), weight.double(), "mean", leaves[0] if roots else None, own
    )
    exact_dx, *parts = torch.autograd.grad(exact, leaves, grad.double())
    exact_dw = torch.cat([part.flatten() for part in parts])
    for ours, wanted in ((out, exact), (dx, exact_dx), (dw, exact_dw)):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def training(adjacency: Adjacency, tensors: Any, reduce: str) -> list[Tensor]:
    x, weight, v, bias, edge_weight = tensors
    root = x if adjacency.num_src == adjacency.num_dst else None
    own = None if reduce in ("max", "min") else edge_weight
    out = aggregate_linear(x, adjacency, [weight], bias, own, reduce, root, None if root is None else [v])
    plain = aggregate(x, adjacency, own, reduce)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + plain.sin().sum()
    wanted = [t for t in (x, weight, bias, v if root is not None else None, own) if t is not None]
    return [out, plain, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(("d", "k"), [(40, 12), (12, 40)])
def test_bitwise_equal_at_any_number_of_threads(isa: str, reduce: str, d: int, k: int) -> None:
    n = 2000
    edge_index = edges(n, n, 6000, hub=100_000)  # a hub with 100,000 neighbours, shared out between the threads
    shapes = ((n, d), (k, d), (k, d), (k,), (edge_index.shape[1],))
    tensors = [torch.randn(*shape).requires_grad_() for shape in shapes]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(training(Adjacency.of(edge_index, n), tensors, reduce))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=examples(60), deadline=None)
@given(
    num_src=st.integers(1, 40),
    num_dst=st.integers(1, 40),
    count=st.integers(0, 200),
    widths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    reduce=st.sampled_from(REDUCES),
    square=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_training_is_that_of_the_reference(
    num_src: int, num_dst: int, count: int, widths: Any, reduce: str, square: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    num_dst = num_src if square else num_dst
    adjacency = Adjacency.of(edges(num_src, num_dst, count), num_src, num_dst)
    shapes = [(c, f) for c, f in widths]
    d, k = sum(f for _, f in shapes), sum(c for c, _ in shapes)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    x, bias, weights, roots = leaf(num_src, d), leaf(k), [leaf(*s) for s in shapes], [leaf(*s) for s in shapes]
    edge_weight = leaf(count) if reduce in ("sum", "mean") else None
    # The root is x, and goes along with it, or a matrix of its own.
    root = x if square else leaf(num_dst, d)
    wanted = [t for t in (x, bias, edge_weight, None if square else root, *weights, *roots) if t is not None]
    results = []
    for function in (aggregate_linear, reference_graph.aggregate_linear):
        out = function(x, adjacency, weights, bias, edge_weight, reduce, root, roots)
        results.append([out, *torch.autograd.grad(out.sin().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduce", (0, 1, 2))
def test_opcheck(fused: None, reduce: int) -> None:
    ptr, index = torch.tensor([0, 2, 2, 5, 6]), torch.tensor([0, 1, 3, 3, 2, 0])
    place = torch.tensor([5, 0, 1, 4, 2, 3])
    x, w, v = (torch.randn(*shape, requires_grad=True) for shape in ((4, 5), (3, 5), (3, 5)))
    edge_weight = torch.randn(6, requires_grad=True) if reduce < 2 else None
    bias = torch.randn(3, requires_grad=True)
    ops = torch.ops.torch_mtl_pyg
    torch.library.opcheck(ops.aggregate.default, (x, ptr, index, place, edge_weight, None, reduce))
    for project_first, keep in ((False, False), (True, False), (False, True)):
        if reduce == 2 and not keep:
            continue
        arguments = (x, ptr, index, place, edge_weight, [w], x.detach(), [v], bias, reduce, project_first, keep)
        torch.library.opcheck(ops.aggregate_linear.default, arguments)


BAD = [
    ({"ptr": torch.tensor([0, 3, 2, 3])}, "ptr: expected numbers that rise from 0 to 3"),
    ({"ptr": torch.tensor([0, 1, 2, 2])}, "ptr: expected numbers that rise from 0 to 3"),
    ({"ptr": torch.tensor([-1, 1, 2, 3])}, "ptr: expected numbers that rise from 0 to 3"),
    ({"ptr": torch.empty(0, dtype=torch.int64)}, "ptr: expected at least one entry"),
    ({"index": torch.tensor([0, 1, 2], dtype=torch.int32)}, "index: expected a contiguous CPU vector of int64"),
    ({"place": torch.tensor([0, 1, 3]), "weight": torch.ones(3)}, "index: expected rows of x"),
    ({"place": torch.tensor([0, 1])}, "place: size: expected 3, got 2"),
    ({"weight": torch.ones(2)}, "edge_weight: size: expected 3, got 2"),
    ({"weight": torch.ones(3), "reduce": 2}, "edge_weight: expected none for max and min"),
    ({"reduce": 4}, "reduce: expected 0 to 3, got 4"),
    ({"x": torch.ones(4, 6).t()[:4]}, "x: expected contiguous columns"),
]
OUT_OF_RANGE = [{"index": torch.tensor([0, 1, bad])} for bad in (4, -1, 2**62, -(2**63))]
# The same where a row has so many edges that it is shared out.
OF_A_HUB = [
    {"index": torch.cat((change["index"], torch.zeros(9000, dtype=torch.int64))), "ptr": torch.tensor([0, 9003])}
    for change in OUT_OF_RANGE
]


@pytest.mark.parametrize(
    ("change", "message"), [*BAD, *((change, "index: expected rows of x") for change in OUT_OF_RANGE + OF_A_HUB)]
)
def test_direct_calls_never_read_out_of_bounds(fused: None, change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(4, 6), "ptr": torch.tensor([0, 1, 2, 3]), "index": torch.tensor([0, 1, 2])}
    given |= {"place": None, "weight": None, "reduce": 0} | change
    x, ptr, index, place, weight, reduce = (given[k] for k in ("x", "ptr", "index", "place", "weight", "reduce"))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_mtl_pyg.aggregate(x, ptr, index, place, weight, None, reduce)
    w = [torch.ones(2, 6)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_mtl_pyg.aggregate_linear(x, ptr, index, place, weight, w, None, [], None, reduce, False, False)


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(("d", "k"), [(9, 4), (4, 9)])
def test_compiled(fused: None, reduce: str, d: int, k: int) -> None:
    edge_index = edges(20, 20, 90)
    tensors = [torch.randn(*shape).requires_grad_() for shape in ((20, d), (k, d), (k, d), (k,), (90,))]

    def run(edge_index: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, v, bias, edge_weight = tensors
        adjacency = Adjacency.of(edge_index, x.shape[0])
        own = None if reduce in ("max", "min") else edge_weight
        out = aggregate_linear(x, adjacency, [weight], bias, own, reduce, x, [v])
        return out, aggregate(x, adjacency, own, reduce)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        out, plain = function(edge_index, *tensors)
        wanted = tensors[:4] if reduce in ("max", "min") else tensors
        results.append([out, plain, *torch.autograd.grad(out.sin().sum() + plain.cos().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_and_inf_stay_with_their_neighbours(isa: str) -> None:
    x = torch.randn(5, 20)
    x[1], x[3, 7] = float("nan"), float("inf")
    adjacency = Adjacency.of(torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 2, 3]]), 5)
    for reduce in REDUCES:
        out = aggregate(x, adjacency, None, reduce)
        assert out[0].isfinite().all() and out[1].isnan().all() and out[3].isfinite().all()
        assert out[2].isinf().sum() == (0 if reduce == "min" else 1)
