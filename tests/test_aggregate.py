"""group_edges, aggregate and aggregate_linear: against loops and dense products, their derivatives, and bad input."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate
from conv_common import graph, without_duplicates
from torch import Tensor

from torch_mtl_pyg.adjacency import Adjacency
from torch_mtl_pyg.ops import aggregate, aggregate_linear

N, M, F = 17, 11, 7


def counts(adjacency: Adjacency, weight: Tensor | None = None) -> Tensor:
    """``[N_dst, N_src]``: the sum of the weights of the edges between two nodes."""
    values = torch.ones(adjacency.num_edges, dtype=torch.float64) if weight is None else weight.double()
    zeros = torch.zeros(adjacency.num_dst, adjacency.num_src, dtype=torch.float64)
    return zeros.index_put((adjacency.target, adjacency.source), values, accumulate=True)


def dense(x: Tensor, adjacency: Adjacency, weight: Tensor | None, reduce: str) -> tuple[Tensor, Tensor]:
    """The result in float64, and the magnitude of its terms."""
    x = x.double()
    if reduce in ("max", "min"):
        out = torch.zeros(adjacency.num_dst, x.shape[1], dtype=torch.float64)
        for i in range(adjacency.num_dst):
            rows = x[adjacency.source[adjacency.target == i]]
            if len(rows):
                out[i] = rows.amax(0) if reduce == "max" else rows.amin(0)
        return out, out.abs()
    degree = counts(adjacency).sum(1, keepdim=True).clamp(min=1) if reduce == "mean" else 1.0
    magnitude = counts(adjacency, None if weight is None else weight.abs()) @ x.abs()
    return counts(adjacency, weight) @ x / degree, magnitude / degree


def make(num_dst: int = M, dtype: torch.dtype = torch.float64, weighted: bool = False) -> Any:
    edge_index = graph(N, num_dst=num_dst)
    weight = torch.randn(edge_index.shape[1]).to(dtype) if weighted else None
    return torch.randn(N, F).to(dtype), Adjacency.of(edge_index, N, num_dst), weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("reduce", "weighted"),
    [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False), ("min", False)],
)
def test_against_dense_products(any_backend: str, dtype: torch.dtype, reduce: str, weighted: bool) -> None:
    x, adjacency, weight = make(dtype=dtype, weighted=weighted)
    for given in (x, torch.stack((x, x), dim=2)[:, :, 0], x.t().contiguous().t()):
        out = aggregate(given, adjacency, weight, reduce)
        assert out.dtype == dtype and out.is_contiguous()
        assert_accurate(out, *dense(x, adjacency, weight, reduce))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("reduce", "weighted"), [("sum", True), ("mean", False), ("max", False)])
@pytest.mark.parametrize("blocks", ([(5, 7)], [(2, 3), (1, 1), (4, 3)]))
@pytest.mark.parametrize("roots", (None, [(7, 4)], [(3, 1), (4, 2)]))
def test_projected(any_backend: str, dtype: torch.dtype, reduce: str, weighted: bool, blocks: Any, roots: Any) -> None:
    x, adjacency, weight = make(dtype=dtype, weighted=weighted)
    total = sum(c for c, _ in blocks)
    if roots is not None:
        roots = [(total - sum(c for c, _ in roots[1:]), roots[0][1]), *roots[1:]]
    weights = [torch.randn(shape).to(dtype) for shape in blocks]
    root_weights = None if roots is None else [torch.randn(shape).to(dtype) for shape in roots]
    root = None if roots is None else torch.randn(M, sum(f for _, f in roots)).to(dtype)
    bias = torch.randn(total).to(dtype)
    out = aggregate_linear(x, adjacency, weights, bias, weight, reduce, root, root_weights)
    assert out.dtype == dtype and out.shape == (M, total) and out.is_contiguous()
    whole, magnitude = dense(x, adjacency, weight, reduce)
    block = torch.block_diag(*[w.double() for w in weights])
    exact, terms = whole @ block.t() + bias.double(), magnitude @ block.abs().t() + bias.double().abs()
    if root is not None and root_weights is not None:
        block = torch.block_diag(*[w.double() for w in root_weights])
        exact, terms = exact + root.double() @ block.t(), terms + root.double().abs() @ block.abs().t()
    # In 16 bits, the aggregated features may be rounded on the way.
    assert_accurate(out, exact, terms, None, terms)


@pytest.mark.parametrize(("reduce", "weighted"), [("sum", True), ("mean", True), ("sum", False), ("max", False)])
def test_derivatives(any_backend: str, reduce: str, weighted: bool) -> None:
    edge_index = graph(5, 6)
    adjacency = Adjacency.of(edge_index, 5)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    root = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    shapes = ((2, 1), (1, 2), (3, 2), (3,))
    w1, w2, v, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight = torch.randn(edge_index.shape[1], dtype=torch.float64, requires_grad=True) if weighted else None

    def run(x: Tensor, w1: Tensor, w2: Tensor, v: Tensor, bias: Tensor, root: Tensor, weight: Tensor | None) -> Tensor:
        return aggregate_linear(x, adjacency, [w1, w2], bias, weight, reduce, root, [v])

    inputs = (x, w1, w2, v, bias, root, weight)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(lambda x, weight: aggregate(x, adjacency, weight, reduce), (x, weight))
    for i in range(len(inputs)):  # each alone
        only = [t if t is None else t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        if only[i] is None:
            continue
        (a,) = torch.autograd.grad(run(*only).sin().sum(), only[i])
        (b,) = torch.autograd.grad(run(*inputs).sin().sum(), inputs[i])
        torch.testing.assert_close(a, b)


def test_shares_of_a_maximum(any_backend: str) -> None:
    adjacency = Adjacency.of(torch.tensor([[0, 1, 2, 0, 2], [0, 0, 0, 1, 1]]), 3)
    x = torch.tensor([[0.0, 2.0], [0.0, 2.0], [-1.0, 2.0]], requires_grad=True)
    out = aggregate(x, adjacency, reduce="max")
    assert out.tolist() == [[0.0, 2.0], [0.0, 2.0], [0.0, 0.0]]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    third = 1 / 3
    torch.testing.assert_close(gradient, torch.tensor([[1.5, third + 0.5], [0.5, third], [0.0, third + 0.5]]))
    infinite = torch.tensor([[-float("inf")], [float("nan")], [float("inf")]])
    out = aggregate(infinite, Adjacency.of(torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2]]), 3), reduce="max")
    assert out[0] == -float("inf") and out[1].isnan() and out[2] == float("inf")


@pytest.mark.parametrize(("n", "m", "width"), [(0, 0, 3), (4, 0, 3), (0, 4, 3), (4, 4, 0), (4, 4, 3)])
@pytest.mark.parametrize("reduce", ("sum", "mean", "max", "min"))
def test_empty(any_backend: str, n: int, m: int, width: int, reduce: str) -> None:
    adjacency = Adjacency.of(torch.empty(2, 0, dtype=torch.int64), n, m)
    x = torch.randn(n, width, requires_grad=True)
    out = aggregate(x, adjacency, reduce=reduce)
    assert out.shape == (m, width) and not out.any()
    weight = torch.randn(2, width, requires_grad=True)
    bias = torch.randn(2)
    projected = aggregate_linear(x, adjacency, [weight], bias, reduce=reduce)
    assert torch.equal(projected, bias.expand(m, 2))
    for gradient in torch.autograd.grad(projected.sum(), (x, weight)):
        assert not gradient.any()


def test_transforms(any_backend: str) -> None:
    """vmap, jvp and batched gradients: what torch.func and is_grads_batched do."""
    x, adjacency, weight = make(weighted=True)
    several = torch.randn(3, N, F, dtype=torch.float64)
    batched = torch.func.vmap(lambda x: aggregate(x, adjacency, weight, "mean"))(several)
    torch.testing.assert_close(batched[1], aggregate(several[1], adjacency, weight, "mean"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, tangent = torch.func.jvp(lambda x: aggregate(x, adjacency, weight, "mean"), (x,), (several[0],))
    torch.testing.assert_close(tangent, aggregate(several[0], adjacency, weight, "mean"))
    w = torch.randn(4, F, dtype=torch.float64, requires_grad=True)
    out = aggregate_linear(x, adjacency, [w], None, weight, "mean")
    eye = torch.eye(4, dtype=torch.float64)
    (rows,) = torch.autograd.grad(out.sum(0), w, eye, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(out[:, 2].sum(), w)
    torch.testing.assert_close(rows[2], one)


def test_autocast(any_backend: str) -> None:
    x, adjacency, weight = make(dtype=torch.float32, weighted=True)
    w, bias = torch.randn(4, F, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert aggregate(x, adjacency, weight).dtype == torch.float32
        assert aggregate(x.bfloat16(), adjacency, weight).dtype == torch.bfloat16
        out = aggregate_linear(x, adjacency, [w], bias, weight)
        assert out.dtype == torch.bfloat16
        assert aggregate_linear(x.bfloat16(), adjacency, [w], bias, weight).dtype == torch.bfloat16
        double = aggregate_linear(x.double(), adjacency, [w.double()], None, weight)
        assert double.dtype == torch.float64
    (gradient,) = torch.autograd.grad(out.float().sum(), w)
    assert gradient.dtype == torch.float32


def test_meta(any_backend: str) -> None:
    adjacency = Adjacency.of(torch.empty(2, 9, dtype=torch.int64, device="meta"), 5, 3)
    x, weight = torch.empty(5, 4, device="meta"), torch.empty(2, 4, device="meta")
    assert aggregate(x, adjacency).shape == (3, 4)
    assert aggregate_linear(x, adjacency, [weight]).shape == (3, 2)


# ---- Bad input.

A = Adjacency.of(without_duplicates(graph(5, 6)), 5)
X, W, R = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 2)
E = torch.randn(A.num_edges)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[:4], A), ValueError, r"x: expected 5 rows, the sources of adjacency, got shape \[4, 4\]"),
        ((X[0], A), ValueError, r"x: expected shape \[N_src, D\], got \[4\]"),
        ((X.long(), A), TypeError, "x: expected one of the dtypes .* got int64"),
        ((None, A), TypeError, r"x: expected a tensor \[N_src, D\], got NoneType"),
        ((X, graph()), TypeError, "adjacency: expected an Adjacency, got Tensor"),
        ((X.to("meta"), A), ValueError, "adjacency: expected the device of x, meta, got cpu"),
        ((X, A, E[1:]), ValueError, r"edge_weight: expected shape \[\d+\], one weight per edge, got"),
        ((X, A, E[:, None]), ValueError, r"edge_weight: expected shape \[E\], got"),
        ((X, A, E.double()), TypeError, "edge_weight: expected the dtype of x, torch.float32, got torch.float64"),
        ((X, A, E.to("meta")), ValueError, "edge_weight: expected the device of x, cpu, got meta"),
        ((X, A, 2.0), TypeError, r"edge_weight: expected a tensor \[E\], got float"),
        ((X, A, E, "max"), ValueError, "edge_weight: expected None with reduce='max', got a tensor"),
        ((X, A, None, "median"), ValueError, "reduce: expected one of 'sum', 'mean', 'max', 'min', got 'median'"),
        ((X, A, None, None), TypeError, "reduce: expected one of .* got NoneType"),
    ],
)
def test_bad_aggregate(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        aggregate(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": W}, TypeError, r"weights: expected a sequence of tensors \[C_b, F_b\], got Tensor"),
        ({"weights": []}, ValueError, "weights: expected at least one block, got none"),
        ({"weights": [W, W]}, ValueError, r"x: expected 8 columns, those of weights, got shape \[5, 4\]"),
        ({"weights": [W[0]]}, ValueError, r"weights\[0\]: expected shape \[C_b, F_b\], got \[4\]"),
        (
            {"weights": [W.double()]},
            TypeError,
            r"weights\[0\]: expected the dtype of x, torch.float32, got torch.float64",
        ),
        ({"weights": [W.to("meta")]}, ValueError, r"weights\[0\]: expected the device of x, cpu, got meta"),
        ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \[3\], the rows of weights, got \[4\]"),
        ({"bias": torch.randn(3).double()}, TypeError, "bias: expected the dtype of x"),
        ({"root": X[:, :2]}, ValueError, "root_weights: expected one, since root is given, got None"),
        ({"root_weights": [R]}, ValueError, "root: expected one, since root_weights is given, got None"),
        ({"root": X, "root_weights": [R]}, ValueError, r"root: expected 2 columns, those of root_weights, got shape"),
        ({"root": X[:4, :2], "root_weights": [R]}, ValueError, "root: expected 5 rows, the targets of adjacency"),
        ({"root": X[:, :2], "root_weights": [R[:2]]}, ValueError, "root_weights: expected 3 rows in all, .* got 2"),
        ({"root": X[:, :2].double(), "root_weights": [R]}, TypeError, "root: expected the dtype of x"),
        ({"root": X[:, :2], "root_weights": [R.double()]}, TypeError, r"root_weights\[0\]: expected the dtype of x"),
        ({"edge_weight": E, "reduce": "min"}, ValueError, "edge_weight: expected None with reduce='min'"),
        ({"edge_weight": 1.0}, TypeError, r"edge_weight: expected a tensor \[E\], got float"),
        ({"adjacency": None}, TypeError, "adjacency: expected an Adjacency, got NoneType"),
    ],
)
def test_bad_aggregate_linear(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        aggregate_linear(**{"x": X, "adjacency": A, "weights": [W], **arguments})


# ---- Grouping.

KEY, OTHER = torch.tensor([[0, 1, 2], [1, 2, 0]])
