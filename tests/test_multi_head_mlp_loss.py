"""The op multi_head_mlp_loss: losses, gradients and Gramian of all heads and of routed rows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from accuracy import DTYPES
from conftest import examples, require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import TASKS, labels_of
from mlp_cases import ACTS, HIDDEN, LOSSES_ONLY, ONE, SINGLE, SMOOTH, Problem, problem, random_problem
from mlp_oracle import check_losses, names_of
from torch import Tensor

import torch_mtl_pyg as mtl
from torch_mtl_pyg import backend
from torch_mtl_pyg.labels import LabelError
from torch_mtl_pyg.ops import multi_head_mlp_loss

SHAPES = ((0, 4), (1, 5), (2, 0), (7, 16), (33, 3), (130, 65), (391, 20))
MANY = {f"t{i}": mtl.Task(1 + i % 3, loss="cross_entropy") for i in range(70)}
WIDE = {"wide": mtl.Task(1000, loss="cross_entropy"), "b": mtl.Task(1, loss="bce")}
HOWS = ("total", "scaled", "per task", "both")


def run(p: Problem, how: str = "total", gramian: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and gradients of a scalar of the losses, and the weights of the tasks in it."""
    own = [t.detach().requires_grad_() for t in p.tensors]
    depth = len(p.weights)
    per_task, total, count, product = multi_head_mlp_loss(
        own[0], own[1 : depth + 1], own[depth + 1 :], p.labels, p.layout, p.hidden, p.route, gramian
    )
    fixed = torch.tensor([t.weight for t in p.tasks.values()], dtype=total.dtype)
    other = torch.linspace(0.5, 1.5, len(p.tasks), dtype=total.dtype)
    scalar, weights = {
        "total": (total, fixed),
        "scaled": (total * 4, fixed * 4),
        "per task": ((per_task * other).sum(), other),
        "both": (total + (per_task * other).sum(), fixed + other),
    }[how]
    scalar.backward()
    got = {"per_task": per_task.detach(), "total": total.detach(), "count": count}
    got |= {n: t.grad for n, t in zip(names_of(depth, p.biases), own, strict=True)}
    if product is not None:
        assert not product.requires_grad
        got["gramian"] = product
    return got, weights


def check_values(p: Problem, how: str = "total", gramian: bool = False) -> None:
    got, weights = run(p, how, gramian)
    plain, fused = None, backend.choice() == "fused"
    if fused and p.x.itemsize > 2:
        with backend.use_backend("reference"):
            plain, _ = run(p, how, gramian)
    check_losses(p, got, weights, plain, rounds=p.x.itemsize == 2 and not fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for i, (n, d) in enumerate(SHAPES):
        p = problem(n, d, dtype, TASKS, HIDDEN[i % 5], ACTS[i % 5], bias=n != 33)
        check_values(p, HOWS[i % 4], gramian=n in (0, 1, 130))
        p = problem(n, d, dtype, LOSSES_ONLY, HIDDEN[i % 5], ACTS[i % 5], bias=n != 33, route="random")
        check_values(p, HOWS[i % 4], gramian=n in (0, 1, 130))
    for tasks in (WIDE, MANY, ONE, SINGLE):
        for route in (None, "random"):
            check_values(problem(200, 24, dtype, tasks, (6,), "gelu", route=route), gramian=tasks is not WIDE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_reference(dtype: torch.dtype) -> None:
    with backend.use_backend("reference"):
        for i, (n, d) in enumerate(SHAPES[:-1]):
            for route in (None, "random"):
                tasks = {k: v for k, v in SMOOTH.items() if route is None or v.loss is not None}
                p = problem(n, d, dtype, tasks, HIDDEN[i % 5], ACTS[i % 5], bias=n != 33, route=route)
                check_values(p, HOWS[i % 4], gramian=n == 7)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("route", (None, "random"))
def test_every_way_back(any_backend: str, how: str, dtype: torch.dtype, route: str | None) -> None:
    for gramian in (False, True):
        for dropout in (0.0, 0.4):
            tasks = TASKS if route is None else LOSSES_ONLY
            check_values(problem(57, 10, dtype, tasks, (8,), "silu", dropout=dropout, route=route), how, gramian)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("hidden", ((), *HIDDEN), ids=str)
def test_gramian_is_that_of_the_jacobian(any_backend: str, act: str, hidden: tuple[int, ...]) -> None:
    check_values(problem(61, 9, torch.float64, TASKS, hidden, act, dropout=0.25), gramian=True)
    check_values(problem(61, 9, torch.float64, LOSSES_ONLY, hidden, act, route="random"), gramian=True)


@pytest.mark.parametrize("share", (0.0, 0.5, 0.97, 1.0))
@pytest.mark.parametrize("kind", ("natural", "float", "integer"))
def test_missing_labels_and_kinds_of_labels(any_backend: str, share: float, kind: str) -> None:
    for n in (1, 40, 301):
        check_values(problem(n, 6, torch.float64, TASKS, (5,), "tanh", share=share, kind=kind), gramian=n == 40)
        check_values(problem(n, 6, torch.float64, LOSSES_ONLY, (5,), "tanh", share=share, route="random"))


@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool), ids=str)
def test_labels_of_every_integer_type(any_backend: str, dtype: torch.dtype) -> None:
    tasks = {"c": TASKS["two"], "b": TASKS["toxic"], "m": mtl.Task(1, loss="mse")}
    p = problem(30, 6, torch.float64, tasks, (4,))
    y = {name: torch.randint(0, 2, (30,)) for name in tasks}
    expected, _ = run(p.but(labels=y))
    got, _ = run(p.but(labels={name: t.to(dtype) for name, t in y.items()}))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    matrix, _ = run(p.but(labels=torch.stack(list(y.values()), 1).to(dtype)))
    assert all(torch.equal(matrix[name], expected[name]) for name in expected)


def test_a_matrix_of_labels_is_a_dict_of_columns(any_backend: str) -> None:
    tasks = {n: t for n, t in TASKS.items() if t.loss == "cross_entropy" or t.out_channels == 1}
    p = problem(83, 9, torch.float64, tasks, (6, 3), kind="float")
    expected, _ = run(p)
    matrix = torch.stack([y.reshape(-1).float() for y in p.labels.values()], 1)
    for y in (matrix, matrix.double(), matrix.t().contiguous().t(), torch.stack([matrix, matrix], 2)[:, :, 0]):
        got, _ = run(p.but(labels=y))
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_layouts(isa: str) -> None:
    for route in (None, "random"):
        p = problem(205, 30, torch.float32, SINGLE, (9, 4), "tanh", route=route)
        transposed = [w.t().contiguous().t() for w in p.weights]
        for x, weights in (
            (p.x.t().contiguous().t(), transposed),
            (torch.randn(410, 90)[::2, ::3], p.weights),
            (p.x[:1].expand(205, 30), [w.flip(0) for w in p.weights]),
        ):
            check_values(p.but(x=x, weights=weights), gramian=True)
        strided = [torch.stack((b, b), 1)[:, 0] for b in p.biases]
        labels: Any = {n: torch.stack((y, y), 1)[:, 0] for n, y in p.labels.items()} if route is None else p.labels.flip(0).contiguous().flip(0)  # fmt: skip  # noqa: E501
        check_values(p.but(biases=strided, labels=labels))


@settings(max_examples=examples(25), deadline=None)
@given(
    n=st.integers(0, 200),
    d=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    routed=st.booleans(),
    how=st.sampled_from(HOWS),
    gramian=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_heads(n: int, d: int, dtype: torch.dtype, routed: bool, how: str, gramian: bool, seed: int) -> None:
    require_fused()
    with backend.use_backend("fused"):
        check_values(random_problem(seed, n, d, dtype, routed), how, gramian)


def test_a_gradient_beyond_float16_is_infinite(fused: None) -> None:
    """The exact one is 65,815: only there, and with its sign."""
    p = random_problem(2014, 25, 1, torch.float16, False)
    check_values(p, "scaled")
    got, _ = run(p, "scaled")
    assert sum(int(g.isinf().sum()) for g in got.values()) == 1


def test_tasks_without_labels(any_backend: str) -> None:
    tasks = {"a": TASKS["classes"], "b": TASKS["mse"], "c": TASKS["weighted"]}
    p = problem(9, 4, torch.float32, tasks, (5,), share=1.0)
    p.labels["b"] = None
    p.labels["c"] = torch.full((9,), 2)  # a class of weight 0: nothing to take a mean of
    got, _ = run(p, gramian=True)
    for name, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)) or name == "count"
    assert got["count"].tolist() == [0, 0, 9]


@pytest.mark.parametrize("route", (None, "random"))
def test_a_missing_label_hides_a_bad_row(any_backend: str, route: str | None) -> None:
    p = problem(20, 3, torch.float32, SINGLE, (6, 4), "relu", route=route, share=0.0)
    p.x[7] = float("nan")
    if route:
        p.labels[7] = float("nan")
    else:
        for name, task in SINGLE.items():
            p.labels[name][7] = task.ignore_index if task.loss == "cross_entropy" else float("nan")
    got, _ = run(p)
    assert got["per_task"].isfinite().all() and torch.equal(got["x"][7], torch.zeros(3))
    assert all(got[f"bias{layer}"].isfinite().all() for layer in range(3))  # weights get 0 * NaN, as in PyTorch


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_are_passed_on(any_backend: str, value: float) -> None:
    for act in ACTS:
        p = problem(20, 3, torch.float32, {"a": mtl.Task(2, "cross_entropy"), "b": mtl.Task(1, "mse")}, (4,), act,
                    share=0.0)  # fmt: skip
        p.x[7] = value
        got, _ = run(p)
        others = [i for i in range(20) if i != 7]
        if value != value:
            assert got["per_task"].isnan().all() and got["x"][7].isnan().all()
        assert got["x"][others].isfinite().all()


def test_bitwise_equal_at_any_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for n, d, tasks, hidden in ((3000, 20, SINGLE, (16, 8)), (500, 130, MANY, (24,)), (5, 600, ONE, (300,))):
                for route in (None, "random"):
                    p = problem(n, d, dtype, tasks, hidden, "gelu", dropout=0.2, route=route)
                    results = []
                    for threads in (1, 2, 3, 5):
                        torch.set_num_threads(threads)
                        results.append([*run(p, "total")[0].values(), *run(p, "per task", gramian=True)[0].values()])
                    for other in results[1:]:
                        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, n, route)
    finally:
        torch.set_num_threads(before)


def test_a_loss_scale_saves_small_float16_gradients(any_backend: str) -> None:
    """Rounded to float16 before the scale, these gradients would be zero."""
    tasks = {"t": mtl.Task(3, loss="mse")}
    p = problem(4000, 8, torch.float64, tasks, (4,), "tanh")
    p = p.but(
        x=p.x.half(),
        weights=[p.weights[0].half(), (p.weights[1] * 1e-3).half()],
        biases=[],
        labels={"t": torch.zeros(4000, 3)},
    )
    x = p.x.clone().requires_grad_()
    total = multi_head_mlp_loss(x, p.weights, [], p.labels, p.layout, p.hidden)[1]
    (scaled,) = torch.autograd.grad(total * 2.0**16, x)
    own = p.x.double().requires_grad_()
    out = torch.tanh(own @ p.weights[0].double().t()) @ p.weights[1].double().t()
    (exact,) = torch.autograd.grad(out.square().mean(), own)
    assert exact.abs().max() < 2.0**-23
    assert float((scaled.double() / 2**16 - exact).norm() / exact.norm()) < 0.03


def test_bad_labels(any_backend: str) -> None:
    p = problem(9, 4, torch.float32, SINGLE, (3,))
    for name, value, message in (
        ("classes", 7, r"y\['classes'\]: expected classes in \[0, 7\).*got 7 in row 4"),
        ("toxic", 1.5, r"y\['toxic'\]: expected labels in \[0, 1\].*got 1.5 in row 4"),
        ("degree", float("inf"), r"y\['degree'\]: expected finite numbers.*got inf in row 4"),
    ):
        y = labels_of(SINGLE[name], 9, 0.0)
        assert y is not None
        y[4] = value
        for grad in (True, False):
            x = p.x.clone().requires_grad_(grad)
            with pytest.raises(LabelError, match=message):
                multi_head_mlp_loss(x, p.weights, p.biases, {**p.labels, name: y}, p.layout, p.hidden)


def test_peak_memory_is_that_of_a_tile(fused: None) -> None:
    """Neither the hidden units [N, T h] (300,000 KiB) nor their gradients are made: x and its gradient grow."""
    program = """
import resource, torch, torch_mtl_pyg as mtl
torch.set_num_threads(2)
heads = mtl.MultiTaskHeads(8, {f"t{i}": mtl.Task(2, loss="cross_entropy") for i in range(12)}, hidden_channels=64)
def step(n, task):
    x = torch.randn(n, 8, requires_grad=True)
    y = torch.randint(0, 2, (n, 12), dtype=torch.int8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if task == "outputs":
        sum(o.sum() for o in heads(x).values()).backward()
    elif task == "routed":
        heads.loss(x, y[:, 0], task=torch.arange(n) % 12).total.backward()
    else:
        heads.loss(x, y, gramian=task == "gramian").total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
for task in ("loss", "routed", "gramian", "outputs"):
    step(3000, task)
    print(step(100_000, task))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loss, routed, gramian, outputs = map(int, done.stdout.split())
    assert max(loss, routed, gramian) < 30_000, done.stdout
    assert outputs < 60_000, done.stdout  # the outputs [N, 24] and their gradients are 9,400 each
