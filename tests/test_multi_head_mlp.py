"""The op multi_head_mlp: outputs and gradients of all heads and of routed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate
from conftest import examples, require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_cases import ACTS, EQUAL, FEW, HIDDEN, ONE, RAGGED, SINGLE, Problem, problem, random_problem
from mlp_oracle import check_forward, names_of
from torch import Tensor

import torch_mtl_pyg as mtl
from torch_mtl_pyg import backend
from torch_mtl_pyg.ops import Hidden, multi_head_mlp, multi_head_mlp_split

SHAPES = ((0, 4), (1, 5), (2, 0), (3, 1), (7, 16), (33, 3), (130, 65), (391, 40))


def run(p: Problem, grad: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Outputs, the gradients of all tensors, and the gradient of the outputs they belong to."""
    own = [t.detach().requires_grad_() for t in p.tensors]  # aliases: strides are kept
    depth = len(p.weights)
    out = multi_head_mlp(own[0], own[1 : depth + 1], own[depth + 1 :], p.layout, p.hidden, p.route)
    grad = torch.randn(out.shape).to(out.dtype) if grad is None else grad
    out.backward(grad)
    return out.detach(), {n: t.grad for n, t in zip(names_of(depth, p.biases), own, strict=True)}, grad


def check_values(p: Problem, grad: Tensor | None = None) -> None:
    out, got, grad = run(p, grad)
    plain, fused = None, backend.choice() == "fused"
    if fused and p.x.itemsize > 2:
        with backend.use_backend("reference"):
            theirs, plain, _ = run(p, grad)
        plain = {**plain, "out": theirs}
    check_forward(p, out, grad, got, plain, rounds=p.x.itemsize == 2 and not fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for i, (n, d) in enumerate(SHAPES):
        route = ("random", None, "some")[i % 3]
        tasks = (RAGGED, EQUAL, FEW)[i % 3]
        check_values(problem(n, d, dtype, tasks, HIDDEN[i % 5], ACTS[i % 5], bias=n != 33, route=route))
    for hidden in HIDDEN:
        for route in (None, "random"):
            check_values(problem(70, 20, dtype, EQUAL, hidden, "gelu", route=route))
            check_values(problem(70, 20, dtype, RAGGED, hidden, "relu", route=route))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_reference(dtype: torch.dtype) -> None:
    with backend.use_backend("reference"):
        for i, (n, d) in enumerate(SHAPES):
            for route in (None, "random"):
                check_values(problem(n, d, dtype, RAGGED, HIDDEN[i % 5], ACTS[i % 5], bias=n != 33, route=route))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("route", (None, "random", "sorted", "reversed", "constant"))
def test_activations_and_routes(any_backend: str, act: str, route: str | None) -> None:
    for dtype in (torch.float32, torch.float64):
        for dropout in (0.0, 0.3):
            check_values(problem(97, 24, dtype, FEW, (12, 6), act, dropout=dropout, route=route))


@pytest.mark.parametrize("route", (None, "random", "sorted", "constant"))
def test_linear_heads(isa: str, route: str | None) -> None:
    """One layer: what routed rows of linear heads are."""
    for dtype in DTYPES:
        for n, d in ((0, 3), (1, 1), (50, 0), (300, 70)):
            check_values(problem(n, d, dtype, RAGGED, (), route=route, bias=n != 50))


def test_one_task_and_many(isa: str) -> None:
    many = {f"t{i}": mtl.Task(1 + i % 3) for i in range(300)}
    for tasks in (ONE, many):
        for n in (1, 40):
            for route in (None, "random"):
                check_values(problem(n, 6, torch.float32, tasks, (4, 3), "silu", route=route))
    check_values(problem(500, 6, torch.float32, many, (2,), "tanh", route="constant"))


def test_wide_layers(isa: str) -> None:
    """Around the sizes of tiles and panels, and above."""
    for dtype in (torch.float32, torch.bfloat16):
        for d, hidden, width in ((400, (33,), 50), (3, (400, 17), 3), (17, (8, 400), 200), (65, (129,), 1000)):
            tasks: dict[str, Any] = {"a": mtl.Task(width), "b": mtl.Task(1)}
            for route in (None, "random"):
                check_values(problem(45, d, dtype, tasks, hidden, "elu", route=route))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("route", (None, "random"))
def test_layouts(isa: str, dtype: torch.dtype, route: str | None) -> None:
    n, d = 205, 30
    p = problem(n, d, dtype, RAGGED, (9, 4), "tanh", route=route)
    grad = torch.randn(n, 19 if route else p.layout.total).to(dtype)
    transposed = [w.t().contiguous().t() for w in p.weights]
    strided = [torch.stack((w, w), 2).flatten(1)[:, ::2] for w in p.weights]
    biases = [torch.stack((b, b), 1)[:, 0] for b in p.biases]
    for x, weights, bias, g in (
        (p.x.t().contiguous().t(), transposed, biases, grad),
        (torch.randn(2 * n, 3 * d).to(dtype)[::2, ::3], strided, p.biases, grad.t().contiguous().t()),
        (p.x[:1].expand(n, d), p.weights, biases, grad[:, :1].expand_as(grad)),
        (p.x.flip(0), [w.flip(0) for w in p.weights], p.biases, grad[:1].expand_as(grad)),
    ):
        check_values(p.but(x=x, weights=weights, biases=bias), g)
    if p.route is not None:
        check_values(p.but(route=torch.stack((p.route, p.route), 1)[:, 0]), grad)
        check_values(p.but(route=torch.tensor(3).expand(n)), grad)


@settings(max_examples=examples(40), deadline=None)
@given(
    n=st.integers(0, 300),
    d=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    routed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_heads(n: int, d: int, dtype: torch.dtype, routed: bool, seed: int) -> None:
    require_fused()
    with backend.use_backend("fused"):
        check_values(random_problem(seed, n, d, dtype, routed))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_activations_over_their_range(isa: str, act: str, dtype: torch.dtype) -> None:
    """One unit of weight 1: the activation itself, and its slope; accurate relative to x, so also where x is tiny."""
    steps = torch.linspace(-120, 120, 4001, dtype=dtype)
    tiny = torch.tensor([10.0**-i for i in range(1, 38)], dtype=dtype)
    x = torch.cat((steps, steps / 40, tiny, -tiny, torch.tensor([0.0, -0.0, 1e30, -1e30], dtype=dtype))).unsqueeze(1)
    one = torch.ones(1, 1, dtype=dtype)
    p = Problem(x, [one, one], [], ONE, hidden=Hidden(act))
    out, got, _ = run(p, torch.ones_like(x))
    f = getattr(torch.nn.functional, act) if act != "tanh" else torch.tanh
    slopes = []
    for own in (x.double().clone().requires_grad_(), x.clone().requires_grad_()):
        f(own).sum().backward()
        slopes.append(own.grad)
    assert_accurate(out, f(x.double()), x.double().abs())
    wide = x.double()
    terms = wide.sigmoid() * (1 + wide.abs()) if act == "silu" else 0.0  # of s + s x - s^2 x
    assert_accurate(got["x"], slopes[0], torch.ones_like(wide) + terms, slopes[1])
    assert torch.equal(out[-4:-2], torch.zeros(2, 1, dtype=dtype))
    if act == "relu":
        assert torch.equal(got["x"], (x > 0).to(dtype))  # 0 at 0, as PyTorch has it


@pytest.mark.parametrize("route", (None, "random"))
@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_in_its_row(any_backend: str, act: str, route: str | None) -> None:
    p = problem(40, 6, torch.float32, EQUAL, (8, 5), act, route=route)
    p.x[7, 3], p.x[21, 0] = float("nan"), float("nan")
    out, got, _ = run(p, torch.ones(40, 2 if route else 12))
    others = [i for i in range(40) if i not in (7, 21)]
    assert out[7].isnan().all() and out[21].isnan().all() and out[others].isfinite().all()
    assert got["x"][others].isfinite().all()
    if p.route is not None:  # another head's parameters do not meet that row
        for layer in range(3):
            of_task = got[f"weight{layer}"].reshape(6, -1).isfinite().all(1)
            for task in range(6):
                assert of_task[task] == (task not in (p.route[7], p.route[21]))


def test_the_views_are_those_of_one_buffer(any_backend: str) -> None:
    p = problem(19, 6, torch.float64, RAGGED, (5,))
    whole = multi_head_mlp(p.x, p.weights, p.biases, p.layout, p.hidden)
    own = [t.detach().requires_grad_() for t in p.tensors]
    parts = multi_head_mlp_split(own[0], own[1:3], own[3:], p.layout, p.hidden)
    for part, columns in zip(parts, p.layout.slices.values(), strict=True):
        assert torch.equal(part, whole[:, columns])
        assert part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
    for used in (range(9), (1, 4), (0,), (8,)):  # heads that no loss used
        grads = [torch.randn_like(part) if i in used else torch.zeros_like(part) for i, part in enumerate(parts)]
        chosen = [parts[i] for i in used]
        got = torch.autograd.grad(chosen, own, [grads[i] for i in used], retain_graph=True)
        _, expected, _ = run(p, torch.cat(grads, 1))
        for a, b in zip(got, expected.values(), strict=True):
            torch.testing.assert_close(a, b)


def test_bitwise_equal_at_any_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for n, d, tasks, hidden in (
                (3000, 24, RAGGED, (16, 8)),
                (700, 130, EQUAL, (64,)),
                (5, 600, SINGLE, (300,)),
            ):
                for route in (None, "random"):
                    p = problem(n, d, dtype, tasks, hidden, "gelu", dropout=0.2, route=route)
                    grad = torch.randn(n, max(p.layout.widths) if route else p.layout.total).to(dtype)
                    results = []
                    for threads in (1, 2, 3, 5):
                        torch.set_num_threads(threads)
                        out, got, _ = run(p, grad)
                        results.append((out, *got.values()))
                    for other in results[1:]:
                        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, n, route)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    p = problem(300, 33, torch.float32, RAGGED, (20, 7), "silu", route="random")
    assert p.route is not None
    whole = multi_head_mlp(p.x, p.weights, p.biases, p.layout, p.hidden)
    routed = multi_head_mlp(p.x, p.weights, p.biases, p.layout, p.hidden, p.route)
    for rows in (slice(0, 1), slice(3, 200), slice(299, 300)):
        assert torch.equal(multi_head_mlp(p.x[rows], p.weights, p.biases, p.layout, p.hidden), whole[rows])
        got = multi_head_mlp(p.x[rows], p.weights, p.biases, p.layout, p.hidden, p.route[rows])
        assert torch.equal(got, routed[rows])


def test_empty_layout_of_rows(any_backend: str) -> None:
    """No rows: gradients are zeros of the right shapes."""
    for route in (None, "random"):
        p = problem(0, 5, torch.float32, EQUAL, (4,), route=route)
        out, got, _ = run(p)
        assert out.shape == (0, 2 if route else 12)
        for name, t in zip(names_of(2, p.biases), p.tensors, strict=True):
            assert torch.equal(got[name], torch.zeros_like(t)), name


# ---- Bad input.


def call(p: Problem, **changed: Any) -> Tensor:
    q = p.but(**changed)
    return multi_head_mlp(q.x, q.weights, q.biases, q.layout, q.hidden, q.route)


def swapped(tensors: list[Tensor], place: int, t: Any) -> list[Any]:
    return [t if i == place else other for i, other in enumerate(tensors)]


BAD: list[tuple[str, type[Exception], str, Any]] = [
    ("no layer", ValueError, "weights: expected at least one layer", lambda p: call(p, weights=[], biases=[])),
    ("two biases of three", ValueError, "as many biases or none, got 3 and 2", lambda p: call(p, biases=p.biases[:2])),
    ("x narrow", ValueError, r"x: expected shape \[N, 4\], got \[5, 3\]", lambda p: call(p, x=p.x[:, :3])),
    ("x of integers", TypeError, "x: expected one of the dtypes", lambda p: call(p, x=p.x.long())),
    ("x no tensor", TypeError, "x: expected a tensor", lambda p: call(p, x=[1.0])),
    ("dtypes", TypeError, "x: expected the dtype of weight, torch.float32, got torch.float64",
     lambda p: call(p, x=p.x.double())),
    ("dtype of a layer", TypeError, r"weights\[1\]: expected the dtype of weights\[0\]",
     lambda p: call(p, weights=swapped(p.weights, 1, p.weights[1].double()))),
    ("dtype of a bias", TypeError, r"biases\[2\]: expected the dtype of weights\[0\]",
     lambda p: call(p, biases=swapped(p.biases, 2, p.biases[2].half()))),
    ("hidden rows", ValueError, r"weights\[0\]: expected shape \[a multiple of 6, 4\], got \[17, 4\]",
     lambda p: call(p, weights=swapped(p.weights, 0, p.weights[0][:17]))),
    ("no hidden rows", ValueError, r"weights\[0\]: expected shape \[a multiple of 6, 4\], got \[0, 4\]",
     lambda p: call(p, weights=swapped(p.weights, 0, p.weights[0][:0]))),
    ("hidden columns", ValueError, r"weights\[1\]: expected shape \[.*, 3\], got \[12, 2\]",
     lambda p: call(p, weights=swapped(p.weights, 1, p.weights[1][:, :2]))),
    ("outputs", ValueError, r"weights\[2\]: expected shape \[12, 2\], got \[11, 2\]",
     lambda p: call(p, weights=swapped(p.weights, 2, p.weights[2][:11]))),
    ("one layer too few", ValueError, r"weights\[1\]: expected shape \[12, 3\], got", lambda p:
     call(p, weights=[p.weights[0], p.weights[1][:6]], biases=p.biases[:2])),
    ("a vector", ValueError, r"weights\[1\]: expected shape", lambda p:
     call(p, weights=swapped(p.weights, 1, p.weights[1][0]))),
    ("bias short", ValueError, r"biases\[1\]: expected shape \[12\], got \[11\]",
     lambda p: call(p, biases=swapped(p.biases, 1, p.biases[1][:11]))),
    ("bias None", TypeError, r"biases\[1\]: expected a tensor", lambda p: call(p, biases=swapped(p.biases, 1, None))),
    ("device", ValueError, r"weights\[2\]: expected the device of weights\[0\], cpu, got meta",
     lambda p: call(p, weights=swapped(p.weights, 2, p.weights[2].to("meta")))),
    ("route int32", TypeError, "task: expected int64", lambda p: call(p, route=p.route.int())),
    ("route short", ValueError, r"task: expected shape \[5\]", lambda p: call(p, route=p.route[:4])),
    ("route 6", IndexError, r"task: expected indices in \[0, 6\), got 6 in row 0",
     lambda p: call(p, route=torch.full((5,), 6))),
    ("route -1", IndexError, r"got -1 in row 4", lambda p: call(p, route=torch.tensor([0, 1, 2, 3, -1]))),
    ("route huge", IndexError, r"got 4611686018427387904 in row 0", lambda p: call(p, route=torch.full((5,), 2**62))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    p = problem(5, 4, torch.float32, EQUAL, (3, 2), route="random")
    with pytest.raises(error, match=message):
        change(p)
    own = p.but(x=p.x.requires_grad_())
    with pytest.raises(error, match=message):
        change(own)
