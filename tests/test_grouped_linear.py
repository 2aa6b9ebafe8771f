"""The op grouped_linear: values, derivatives, determinism, registrations, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate, linear_terms
from torch import Tensor
from torch.nn import functional as F

from torch_mtl_pyg.ops import grouped_linear

SHAPES = (  # the groups' (N_t, F_t), C
    (((5, 3),), 4),
    (((0, 3), (7, 1), (193, 65), (1, 500), (0, 2)), 21),
    (((777, 33), (12, 385)), 33),
    (((0, 4), (0, 1)), 3),
    (tuple((i % 5, 1 + i % 37) for i in range(300)), 17),
    (((3, 0), (4, 2)), 5),
    (((2100, 300), (3, 300), (40, 7)), 193),
)
Inputs = tuple[list[Tensor], list[Tensor], Tensor]


def inputs(shapes: Sequence[tuple[int, int]], c: int, dtype: torch.dtype, requires_grad: bool = False) -> Inputs:
    xs = [torch.randn(n, f).to(dtype).requires_grad_(requires_grad) for n, f in shapes]
    weights = [(torch.randn(c, f) / max(1, f) ** 0.5).to(dtype).requires_grad_(requires_grad) for _, f in shapes]
    return xs, weights, torch.randn(len(shapes), c).to(dtype).requires_grad_(requires_grad)


def plain(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    biases = [None] * len(xs) if bias is None else list(bias)
    return torch.cat([F.linear(x, w, b) for x, w, b in zip(xs, weights, biases, strict=True)])


def check_values(xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, grad: Tensor) -> None:
    """Forward and all gradients against float64, through autograd."""
    xs = [x.detach().requires_grad_() for x in xs]
    weights = [w.detach().requires_grad_() for w in weights]
    bias = None if bias is None else bias.detach().requires_grad_()
    y = grouped_linear(xs, weights, bias)
    assert y.dtype == xs[0].dtype and y.is_contiguous()
    y.backward(grad)
    sizes = [x.shape[0] for x in xs]
    with torch.no_grad():
        parts = zip(xs, weights, y.split(sizes), grad.split(sizes), strict=True)
        for t, (x, w, own, g) in enumerate(parts):
            b = None if bias is None else bias[t]
            assert_accurate(own, *linear_terms(x, w, b), F.linear(x, w, b))
            wide = g.double()
            assert_accurate(x.grad, wide @ w.double(), wide.abs() @ w.double().abs(), g @ w)
            assert_accurate(w.grad, wide.t() @ x.double(), wide.t().abs() @ x.double().abs(), g.t() @ x)
            if bias is not None:
                assert_accurate(bias.grad[t], wide.sum(0), wide.abs().sum(0), g.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for shapes, c in SHAPES:
        arguments = inputs(shapes, c, dtype)
        check_values(*arguments, torch.randn(sum(n for n, _ in shapes), c).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(any_backend: str, dtype: torch.dtype) -> None:
    for shapes, c in SHAPES[:5]:
        xs, weights, _ = inputs(shapes, c, dtype)
        check_values(xs, weights, None, torch.randn(sum(n for n, _ in shapes), c).to(dtype))


def test_a_thousand_groups(any_backend: str) -> None:
    xs, weights, bias = inputs([(i % 4, 1 + i % 9) for i in range(1000)], 6, torch.float64)
    torch.testing.assert_close(grouped_linear(xs, weights, bias), plain(xs, weights, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(any_backend: str, dtype: torch.dtype) -> None:
    xs, weights, bias = inputs(((40, 30), (205, 7), (6, 12)), 9, dtype)
    xs[0] = xs[0].t().contiguous().t()
    xs[1] = torch.randn(410, 21).to(dtype)[::2, ::3]
    xs[2] = xs[2][:1].expand(6, 12)
    weights[0] = weights[0].t().contiguous().t()
    weights[1] = torch.randn(9, 8).to(dtype)[:, 1:]
    bias = bias.t().contiguous().t()
    check_values(xs, weights, bias, torch.randn(9, 251).to(dtype).t())
    # One value everywhere, and small integers: otherwise all roundings would go the same way.
    whole = inputs(((40, 30), (205, 7), (6, 12)), 9, dtype)
    check_values(*whole[:2], None, torch.ones(1, 1, dtype=dtype).expand(251, 9))


def test_bitwise_equal_at_any_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    shapes: Any = (
        ((5000, 64), (3, 300), (40, 500), (0, 9), (2000, 8)),
        tuple((30 + i % 50, 20 + i % 90) for i in range(120)),
        ((1031, 300), (1031, 300), (1031, 300)),
    )
    try:
        for dtype in DTYPES:
            for groups in shapes:
                xs, weights, bias = inputs(groups, 65, dtype)
                grad = torch.randn(sum(n for n, _ in groups), 65).to(dtype)
                every = [True] * len(groups)
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    y = grouped_linear(xs, weights, bias)
                    dxs, dws, db = torch.ops.torch_mtl_pyg.grouped_linear_backward(
                        grad, xs, weights, every, every, True
                    )
                    results.append((y, *dxs, *dws, db))
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, groups)
    finally:
        torch.set_num_threads(before)


def test_a_group_does_not_depend_on_the_others(isa: str) -> None:
    xs, weights, bias = inputs(((30, 20), (500, 77), (3, 400)), 33, torch.float32)
    xs[0][3, 4] = float("nan")
    parts = grouped_linear(xs, weights, bias).split([30, 500, 3])
    for t in (1, 2):
        assert torch.equal(parts[t], grouped_linear(xs[t : t + 1], weights[t : t + 1], bias[t : t + 1]))
    assert parts[0][3].isnan().all() and parts[0][:3].isfinite().all() and parts[0][4:].isfinite().all()


# ---- Derivatives.


def doubles() -> tuple[Tensor, ...]:
    xs, weights, bias = inputs(((3, 2), (0, 4), (1, 5)), 3, torch.float64, requires_grad=True)
    return (bias, *xs, *weights)


def flat(bias: Tensor, *others: Tensor) -> Tensor:
    return grouped_linear(others[:3], others[3:], bias)


def test_gradients_of_first_and_second_order(any_backend: str) -> None:
    assert torch.autograd.gradcheck(flat, doubles())
    assert torch.autograd.gradgradcheck(flat, doubles())


def test_gradients_of_the_registered_op(fused: None) -> None:
    def registered(bias: Tensor, *others: Tensor) -> Tensor:
        result: Tensor = torch.ops.torch_mtl_pyg.grouped_linear(list(others[:3]), list(others[3:]), bias)
        return result

    assert torch.autograd.gradcheck(registered, doubles())
    assert torch.autograd.gradgradcheck(registered, doubles())


def test_third_derivative(any_backend: str) -> None:
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 3)))

    def second(x: Tensor, weight: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(grouped_linear([x], [weight]).pow(3).sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        return again

    assert torch.autograd.gradcheck(second, (x, weight))


@pytest.mark.parametrize("wanted", range(1, 32, 3))
def test_only_the_gradients_asked_for(any_backend: str, wanted: int) -> None:
    xs, weights, bias = inputs(((9, 6), (4, 3)), 5, torch.float64)
    tensors = (bias, *xs, *weights)
    for i, t in enumerate(tensors):
        t.requires_grad_(bool(wanted >> i & 1))
    grouped_linear(xs, weights, bias).sin().sum().backward()
    copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    plain(copies[1:3], copies[3:], copies[0]).sin().sum().backward()
    for t, copy in zip(tensors, copies, strict=True):
        assert (t.grad is None) == (copy.grad is None)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, copy.grad)


def test_no_graph_without_need(any_backend: str) -> None:
    xs, weights, bias = inputs(((4, 3),), 2, torch.float32, requires_grad=True)
    with torch.no_grad():
        assert not grouped_linear(xs, weights, bias).requires_grad
    assert not grouped_linear([xs[0].detach()], [weights[0].detach()], bias.detach()).requires_grad
    with torch.inference_mode():
        assert grouped_linear(xs, weights, bias).is_inference()


def test_saved_tensors_are_checked_for_changes(any_backend: str) -> None:
    xs, weights, bias = inputs(((4, 3), (2, 2)), 2, torch.float32, requires_grad=True)
    y = grouped_linear(xs, weights, bias).sum()
    with torch.no_grad():
        weights[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_transforms_of_torch_func(any_backend: str) -> None:
    xs, weights, bias = inputs(((4, 3), (2, 2)), 2, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return grouped_linear([x, xs[1]], weights, bias).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and jvp loads it
        expected = torch.autograd.functional.jacobian(loss, xs[0])
        torch.testing.assert_close(torch.func.grad(loss)(xs[0]), expected, check_stride=False)
        tangent = torch.func.jvp(loss, (xs[0],), (xs[0],))[1]
        torch.testing.assert_close(tangent, (expected * xs[0]).sum(), check_stride=False)
        many = torch.randn(5, 4, 3, dtype=torch.float64)
        stacked = torch.stack([loss(one) for one in many])
        torch.testing.assert_close(torch.func.vmap(loss)(many), stacked)


def test_batched_gradients(any_backend: str) -> None:
    xs, weights, bias = inputs(((4, 3), (2, 2)), 2, torch.float64, requires_grad=True)
    y = grouped_linear(xs, weights, bias)
    grads = torch.randn(7, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, weights[0], grads, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, weights[0], g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(batched, torch.stack(alone))


# ---- What PyTorch knows of the ops.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fused: None, dtype: torch.dtype) -> None:
    ops = torch.ops.torch_mtl_pyg
    for shapes, c in (SHAPES[0], (((2, 3), (0, 2), (5, 7)), 4)):
        xs, weights, bias = inputs(shapes, c, dtype, requires_grad=True)
        plain_xs = [x.detach() for x in xs]
        grad = torch.randn(sum(n for n, _ in shapes), c).to(dtype)
        torch.library.opcheck(ops.grouped_linear.default, (xs, weights, bias))
        torch.library.opcheck(ops.grouped_linear.default, (plain_xs, weights, None))
        weights = [w.detach() for w in weights]
        for need in (True, False):
            needs = [need] * len(shapes)
            torch.library.opcheck(
                ops.grouped_linear_backward.default, (grad, plain_xs, weights, needs, [True] * len(shapes), not need)
            )


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compiles_to_one_graph(any_backend: str, compiler: str) -> None:
    torch._dynamo.reset()

    def step(xs: list[Tensor], weights: list[Tensor], bias: Tensor) -> Tensor:
        return torch.relu(grouped_linear([x * 2 for x in xs], weights, bias)).sum()

    from torch._inductor import config

    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, fullgraph=True, dynamic=compiler == "aot_eager", backend=compiler)
        for n in (5, 9) if compiler == "aot_eager" else (5,):
            xs, weights, bias = inputs(((n, 4), (3, 2)), 3, torch.float64, requires_grad=True)
            xs[1].requires_grad_(False)
            tensors = (xs[0], *weights, bias)
            ours = torch.autograd.grad(compiled(xs, weights, bias), tensors)
            theirs = torch.autograd.grad(step(xs, weights, bias), tensors)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(any_backend: str, dtype: torch.dtype) -> None:
    xs, weights, bias = inputs(((8, 6), (3, 2)), 5, torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = grouped_linear(xs, weights, bias)
        z = plain(xs, weights, bias)
        assert grouped_linear([xs[0].to(dtype), xs[1]], weights, bias).dtype == dtype
        wide = [t.double() for t in xs], [t.double() for t in weights]
        assert grouped_linear(*wide, bias.double()).dtype == torch.float64
        if any_backend == "fused":
            assert torch.equal(torch.ops.torch_mtl_pyg.grouped_linear(xs, weights, bias), y)
    assert y.dtype == z.dtype == dtype
    torch.testing.assert_close(y, z, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert xs[0].grad is not None and xs[0].grad.dtype == torch.float32


def test_meta_tensors(fused: None) -> None:
    xs, weights, bias = inputs(((8, 6), (3, 2)), 5, torch.float32)
    with torch.device("meta"):
        y = grouped_linear([x.to("meta") for x in xs], [w.to("meta") for w in weights], bias.to("meta"))
    assert y.shape == (11, 5)


# ---- Bad input.

BAD: list[tuple[str, type[Exception], str, Any]] = [
    ("xs a tensor", TypeError, r"xs: expected a sequence of tensors \[N_t, F_t\], got Tensor",
     lambda x, w, b: (x[0], w, b)),
    ("weights a dict", TypeError, "weights: expected a sequence of tensors .*, got dict", lambda x, w, b: (x, {}, b)),
    ("no group", ValueError, "weights: expected at least one group", lambda x, w, b: ([], [], None)),
    ("numbers", ValueError, "xs: expected 2 groups, as many as weights, got 1", lambda x, w, b: (x[:1], w, b)),
    ("no tensor", TypeError, r"xs\[1\]: expected a tensor \[N_t, 2\], got list", lambda x, w, b: ([x[0], [1.0]], w, b)),
    ("too narrow", ValueError, r"xs\[0\]: expected shape \[N_t, 4\], got \[3, 3\]",
     lambda x, w, b: ([x[0][:, 1:], x[1]], w, b)),
    ("integers", TypeError, r"xs\[0\]: expected one of the dtypes", lambda x, w, b: ([x[0].long(), x[1]], w, b)),
    ("rows of weights", ValueError, r"weights\[1\]: expected 3 rows, as weights\[0\] has, got shape \[2, 2\]",
     lambda x, w, b: (x, [w[0], w[1][1:]], b)),
    ("weight 1-D", ValueError, r"weights\[0\]: expected shape \[C, F_t\]", lambda x, w, b: (x, [w[0][0], w[1]], b)),
    ("dtype of x", TypeError, r"xs\[1\]: expected the dtype of weights\[1\]",
     lambda x, w, b: ([x[0], x[1].double()], w, b)),
    ("dtype of weights", TypeError, r"weights\[1\]: expected the dtype of weights\[0\]",
     lambda x, w, b: ([x[0], x[1].double()], [w[0], w[1].double()], b)),
    ("bias width", ValueError, r"bias: expected shape \[T, 3\], got \[2, 2\]", lambda x, w, b: (x, w, b[:, 1:])),
    ("bias rows", ValueError, r"bias: expected 2 rows, one per group, got shape \[1, 3\]",
     lambda x, w, b: (x, w, b[:1])),
    ("bias dtype", TypeError, r"bias: expected the dtype of weights\[0\]", lambda x, w, b: (x, w, b.half())),
    ("devices", ValueError, r"xs\[0\]: expected the device of weights\[0\], cpu, got meta",
     lambda x, w, b: ([x[0].to("meta"), x[1]], w, b)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    with pytest.raises(error, match=message):
        grouped_linear(*change(*inputs(((3, 4), (5, 2)), 3, torch.float32)))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("xs: expected at least one group", lambda g, x, w, n: (g, [], [], [], [])),
        ("weights: number of groups: expected 2, got 1", lambda g, x, w, n: (g, x, w[:1], n, n)),
        ("weights: size of dimension 1: expected 4, got 3", lambda g, x, w, n: (g, x, [w[0][:, 1:], w[1]], n, n)),
        ("weights: size of dimension 0: expected 3, got 2", lambda g, x, w, n: (g, x, [w[0], w[1][1:]], n, n)),
        ("grad: size of dimension 0: expected 8, got 7", lambda g, x, w, n: (g[1:], x, w, n, n)),
        ("grad: size of dimension 1: expected 3, got 2", lambda g, x, w, n: (g[:, 1:], x, w, n, n)),
        ("need_xs: number of groups: expected 2, got 1", lambda g, x, w, n: (g, x, w, n[:1], n)),
        ("need_weights: number of groups: expected 2, got 3", lambda g, x, w, n: (g, x, w, n, [True] * 3)),
        ("xs: expected the dtype of x", lambda g, x, w, n: (g, [x[0], x[1].double()], w, n, n)),
        ("xs: expected a matrix, got 1 dim", lambda g, x, w, n: (g, [x[0], x[1][0]], w, n, n)),
    ],
)
def test_direct_calls_stay_in_bounds(fused: None, message: str, change: Any) -> None:
    xs, weights, _ = inputs(((3, 4), (5, 2)), 3, torch.float32)
    arguments = change(torch.randn(8, 3), xs, weights, [True, True])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_mtl_pyg.grouped_linear_backward(*arguments, True)
    if arguments[1] and "grad" not in message and "need" not in message:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.torch_mtl_pyg.grouped_linear(*arguments[1:3], None)


def test_direct_calls_check_the_bias(fused: None) -> None:
    xs, weights, bias = inputs(((3, 4), (5, 2)), 3, torch.float32)
    for wrong in (bias[:1], bias[:, 1:], bias[0], bias.double()):
        with pytest.raises(RuntimeError, match="bias: "):
            torch.ops.torch_mtl_pyg.grouped_linear(xs, weights, wrong)
