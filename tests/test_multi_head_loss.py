"""The op multi_head_loss: values, gradients, Gramian, determinism, registrations, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES
from conftest import examples, require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import TASKS, problem, random_tasks
from loss_oracle import Problem, check, expected
from torch import Tensor

import torch_mtl_pyg as mtl
from torch_mtl_pyg import backend
from torch_mtl_pyg.ops import multi_head_loss
from torch_mtl_pyg.ops.loss_table import loss_table
from torch_mtl_pyg.task import TaskLayout

SHAPES = ((0, 4), (1, 5), (2, 0), (7, 16), (33, 3), (130, 130), (391, 65), (600, 400))
SINGLES = {"wide": mtl.Task(1000, loss="cross_entropy")}
MANY = {f"t{i}": mtl.Task(1 + i % 3, loss="cross_entropy") for i in range(70)}
ONE = {"only": mtl.Task(1, loss="bce")}


def run(p: Problem, how: str = "total", gramian: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and gradients of a scalar of the losses, and the weights of the tasks in it."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in p[:3]]
    per_task, total, count, product = multi_head_loss(*tensors, p.labels, TaskLayout(p.tasks), gramian)
    fixed = torch.tensor([t.weight for t in p.tasks.values()], dtype=total.dtype)
    other = torch.linspace(0.5, 1.5, len(p.tasks), dtype=total.dtype)
    scalar, weights = {
        "total": (total, fixed),
        "scaled": (total * 4, fixed * 4),
        "per task": ((per_task * other).sum(), other),
        "proportional": ((per_task * fixed).sum() * 2, fixed * 2),
        "both": (total + (per_task * other).sum(), fixed + other),
    }[how]
    scalar.backward()
    got = {"per_task": per_task.detach(), "total": total.detach(), "count": count}
    got |= {name: t.grad for name, t in zip(("x", "weight", "bias"), tensors, strict=True) if t is not None}
    if product is not None:
        got["gramian"] = product
    return got, weights


def check_values(p: Problem, how: str = "total", gramian: bool = False) -> None:
    got, weights = run(p, how, gramian)
    with backend.use_backend("reference"):
        plain, _ = run(p, how, gramian)
    check(p, got, weights, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for n, d in SHAPES:
        check_values(problem(n, d, dtype, bias=n != 33), how="per task" if n % 2 else "total", gramian=n == 130)
    for tasks in (SINGLES, MANY, ONE):
        check_values(problem(230, 40, dtype, tasks), gramian=tasks is not SINGLES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_reference(dtype: torch.dtype) -> None:
    with backend.use_backend("reference"):
        for n, d in SHAPES:
            check_values(problem(n, d, dtype), gramian=n < 100)


@pytest.mark.parametrize("how", ("total", "scaled", "per task", "proportional", "both"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16), ids=str)
def test_every_way_back(any_backend: str, how: str, dtype: torch.dtype) -> None:
    for gramian in (False, True):
        check_values(problem(57, 20, dtype), how, gramian)


@pytest.mark.parametrize("share", (0.0, 0.5, 0.97, 1.0))
@pytest.mark.parametrize("kind", ("natural", "float", "integer"))
def test_missing_labels_and_kinds_of_labels(any_backend: str, share: float, kind: str) -> None:
    for n in (1, 40, 301):
        check_values(problem(n, 12, torch.float64, share=share, kind=kind), gramian=True)


def test_a_matrix_of_labels_is_a_dict_of_columns(any_backend: str) -> None:
    tasks = {name: task for name, task in TASKS.items() if task.loss == "cross_entropy" or task.out_channels == 1}
    tasks["nothing"] = mtl.Task(2)
    p = problem(83, 9, torch.float64, tasks, kind="float")
    nan = torch.full((83,), float("nan"))
    columns = [nan if y is None else y.reshape(-1).float() for y in p.labels.values()]
    matrix = torch.stack(columns, 1)
    expected, _ = run(p._replace(labels=dict(zip(tasks, columns[:-1], strict=False)) | {"nothing": None}))
    for y in (matrix, matrix.double(), matrix.t().contiguous().t(), torch.stack([matrix, matrix], 2)[:, :, 0]):
        got, _ = run(p._replace(labels=y))
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    short = matrix.to(torch.bfloat16)
    got, weights = run(p._replace(labels=short))
    check(p._replace(labels={n: short[:, i].double() for i, n in enumerate(tasks)} | {"nothing": None}), got, weights)
    classes = {name: task for name, task in tasks.items() if task.loss == "cross_entropy"}
    p = problem(40, 9, torch.float64, classes)
    expected, _ = run(p)
    got, _ = run(p._replace(labels=torch.stack(list(p.labels.values()), 1)))
    # ignore_index of "ignoring" is 1, of the others -100
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# Few and many tasks, narrow and wide ones side by side, columns that are a multiple of 4, of 2 and neither; more
# columns than fit a block.
COLUMNS = (
    *((40, 130, (20, 20, 20, 64)), (40, 130, (21, 33)), (13, 2, (1000,)), (70, 130, (3,) * 5), (41, 2, (2,) * 300)),
    *((13, 2, (1,) * 1501), (9, 2, (701, 800)), (2, 1, (3001, 2)), (0, 130, (40, 2)), (11, 2, (1100, 2))),
    *((40, 130, (40, 2, 3)), (40, 130, (40,)), (30, 20, (1,) * 40), (30, 20, (64, 2) * 8)),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("n", "d", "widths"), COLUMNS, ids=lambda v: str(v)[:20])
def test_values_of_few_and_many_columns(fused: None, n: int, d: int, widths: tuple[int, ...], dtype: Any) -> None:
    tasks = {f"t{i}": mtl.Task(c, loss="cross_entropy" if c > 1 else "bce") for i, c in enumerate(widths)}
    check_values(problem(n, d, dtype, tasks))
    if len(tasks) < 10 and sum(widths) <= 1000:
        check_values(problem(n, d, dtype, tasks), gramian=True)


def test_many_rows_of_one_task(fused: None) -> None:
    check_values(problem(66_000, 1, torch.float64, {"one": mtl.Task(3, loss="cross_entropy")}))


@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool), ids=str)
def test_labels_of_every_integer_type(any_backend: str, dtype: torch.dtype) -> None:
    tasks = {"c": TASKS["two"], "b": TASKS["toxic"], "m": mtl.Task(1, loss="mse")}
    y = {name: torch.randint(0, 2, (30,)) for name in tasks}
    p = problem(30, 6, torch.float64, tasks)
    expected, _ = run(p._replace(labels=y))
    got, _ = run(p._replace(labels={name: t.to(dtype) for name, t in y.items()}))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_layouts(isa: str) -> None:
    p = problem(205, 70, torch.float32)
    for x, weight in (
        (p.x.t().contiguous().t(), p.weight),
        (p.x, p.weight.t().contiguous().t()),
        (torch.randn(410, 210)[::2, ::3], torch.randn(p.weight.shape[0] * 2, 70)[::2]),
        (p.x[:1].expand(205, 70), p.weight),
    ):
        check_values(p._replace(x=x, weight=weight))
    labels = dict(p.labels)
    labels["mse"] = torch.randn(3, 410).t()[::2]
    labels["classes"] = torch.randint(0, 7, (205, 2))[:, 0]
    check_values(p._replace(labels=labels))


@settings(max_examples=examples(25), deadline=None)
@given(
    n=st.integers(0, 420),
    d=st.integers(1, 300),
    count=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from((0.0, 0.4, 0.95)),
    kind=st.sampled_from(("natural", "float", "integer")),
    how=st.sampled_from(("total", "per task", "both")),
    gramian=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_tasks(n: int, d: int, count: int, dtype: Any, share: float, kind: str, how: str, gramian: bool, seed: int) -> None:  # fmt: skip  # noqa: E501
    require_fused()
    torch.manual_seed(seed)
    with backend.use_backend("fused"):
        check_values(problem(n, d, dtype, random_tasks(seed, count), share, kind), how, gramian)


@pytest.mark.parametrize("scale", (1e4, 1e-4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_large_and_small_logits(isa: str, scale: float, dtype: torch.dtype) -> None:
    """No NaN and no infinity where PyTorch has none in float64, and the values under the error model."""
    tasks = {name: task for name, task in TASKS.items() if task.loss not in ("poisson_nll", "gaussian_nll")}
    check_values(problem(64, 8, dtype, tasks, scale=scale))


@pytest.mark.parametrize("value", (1e4, 80.0, 88.5, 90.0, 15.0, 0.0))
def test_extreme_logits_of_each_loss(any_backend: str, value: float) -> None:
    for name, task in TASKS.items():
        if task.loss is None:
            continue
        k = task.out_channels
        for signs in (torch.ones(k), -torch.ones(k), torch.tensor([(-1.0) ** i for i in range(k)])):
            y = torch.zeros(4, dtype=torch.long) if task.loss == "cross_entropy" else torch.ones(4, k)
            y = y[:, : k // 2] if task.loss == "gaussian_nll" else y
            if name == "ignoring":
                y += 2
            results = []
            for dtype in (torch.float32, torch.float64):
                bias = (value * signs).to(dtype).requires_grad_()
                losses = multi_head_loss(torch.zeros(4, 1, dtype=dtype), torch.zeros(k, 1, dtype=dtype), bias,
                                         {name: y}, TaskLayout({name: task}))  # fmt: skip
                losses[1].backward()
                results.append((losses[0][0].detach().double(), bias.grad.double()))
            (loss, grad), (exact, exact_grad) = results
            if task.loss == "poisson_nll" and value > 88.0:  # exp, or PyTorch's sum of it, overflows in float32
                assert loss.isinf() == bool((signs > 0).any()) or value < 88.8
                continue
            assert loss.isfinite() and grad.isfinite().all(), name
            torch.testing.assert_close(loss, exact, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(grad, exact_grad, rtol=3e-6, atol=1e-7 if any_backend == "fused" else 1e-3)


def test_the_loss_is_accurate_where_it_is_small(isa: str) -> None:
    """log(1 + e) with a tiny e: relative accuracy, not that of a sum with 1."""
    z = torch.tensor([3.0, 10.0, 16.0, 30.0, 80.0]).unsqueeze(1)
    for task, y in ((mtl.Task(1, loss="bce"), torch.ones(1)), (mtl.Task(2, loss="cross_entropy"), torch.ones(1))):
        for margin in z:
            bias = torch.zeros(task.out_channels)
            bias[-1] = margin
            got = multi_head_loss(torch.zeros(1, 1), torch.zeros(task.out_channels, 1), bias, {"t": y},
                                  TaskLayout({"t": task}))[0]  # fmt: skip
            exact = torch.nn.functional.softplus(-margin.double())
            torch.testing.assert_close(got.double(), exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_nan_and_infinity_are_passed_on(any_backend: str, value: float) -> None:
    for name, task in TASKS.items():
        if task.loss is None or name == "ignoring":  # a class that stands for "missing" occurs
            continue
        p = problem(20, 3, torch.float32, {name: task}, share=0.0)
        p.x[7, 1] = value
        got, _ = run(p)
        exact = expected(p.x.double() @ p.weight.double().t() + p.bias.double(), p.labels, {name: task}).per_task
        # An infinite logit may give infinity where PyTorch takes inf - inf on the way.
        assert bool(got["per_task"].isfinite()) == bool(exact.isfinite()), (name, got["per_task"], exact)
        if value != value:
            assert got["per_task"].isnan()
            assert got["x"][7].isnan().all() or (name == "l1" and any_backend == "reference"), name  # sign(NaN) = 0
        others = [i for i in range(20) if i != 7]
        assert got["x"][others].isfinite().all()


def test_a_missing_label_hides_a_bad_row(any_backend: str) -> None:
    p = problem(20, 3, torch.float32, share=0.0)
    p.x[7] = float("nan")
    for name, task in p.tasks.items():
        if task.loss is not None:
            p.labels[name][7] = task.ignore_index if task.loss == "cross_entropy" else float("nan")
    got, _ = run(p)
    assert got["per_task"].isfinite().all() and got["bias"].isfinite().all() and got["x"].isfinite().all()
    assert torch.equal(got["x"][7], torch.zeros(3))


def test_tasks_without_labels(any_backend: str) -> None:
    tasks = {"a": TASKS["classes"], "b": TASKS["mse"], "c": TASKS["weighted"]}
    p = problem(9, 4, torch.float32, tasks, share=1.0)
    p.labels["b"] = None
    p.labels["c"] = torch.full((9,), 2)  # a class of weight 0: nothing to take a mean of
    got, _ = run(p, gramian=True)
    for name, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)) or name == "count"
    assert got["count"].tolist() == [0, 0, 9]


def test_bitwise_equal_at_any_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for n, d, tasks in ((3000, 64, TASKS), (1031, 300, MANY), (7, 2000, TASKS), (9000, 8, ONE)):
                p = problem(n, d, dtype, tasks)
                table = loss_table(TaskLayout(p.tasks))
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    targets = [torch.empty(0, 0, 0) if y is None else y for y in p.labels.values()]
                    arguments = (p.x, p.weight, p.bias, targets, table.integers, table.reals, table.weight)
                    op = torch.ops.torch_mtl_pyg.multi_head_loss
                    results.append((*op(*arguments, True, True, True, False), *op(*arguments, *(False,) * 3, True)))
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, n, d)
    finally:
        torch.set_num_threads(before)


# ---- Derivatives.


def double_problem() -> tuple[tuple[Tensor, ...], Problem]:
    tasks = {name: task for name, task in TASKS.items() if task.loss != "l1"}
    p = problem(6, 4, torch.float64, tasks)
    tensors = tuple(t.clone().requires_grad_() for t in (p.x, p.weight, p.bias) if t is not None)
    return tensors, p


def losses_of(p: Problem) -> Callable[..., Tensor]:
    layout = TaskLayout(p.tasks)
    return lambda x, w, b: torch.cat([t.reshape(-1) for t in multi_head_loss(x, w, b, p.labels, layout)[:2]])


def test_gradients_of_first_and_second_order(any_backend: str) -> None:
    tensors, p = double_problem()
    assert torch.autograd.gradcheck(losses_of(p), tensors)
    small = {name: p.tasks[name] for name in ("two", "both", "labels", "huber", "counts", "gaussian")}
    rows = torch.cat([torch.arange(s.start, s.stop) for n, s in TaskLayout(p.tasks).slices.items() if n in small])
    q = Problem(p.x[:3], p.weight[rows], p.bias[rows], {n: p.labels[n][:3] for n in small}, small)  # type: ignore[index]
    tensors = tuple(t.clone().requires_grad_() for t in q[:3])
    assert torch.autograd.gradgradcheck(losses_of(q), tensors)


@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_asked_for(any_backend: str, wanted: int) -> None:
    tensors, p = double_problem()
    expected = torch.autograd.grad(losses_of(p)(*tensors).sum(), tensors)
    for i, t in enumerate(tensors):
        t.requires_grad_(bool(wanted >> i & 1))
    out = losses_of(p)(*tensors).sum()
    assert out.requires_grad == (wanted > 0)
    if wanted:
        out.backward()
    for i, t in enumerate(tensors):
        assert (t.grad is not None) == bool(wanted >> i & 1)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected[i])


def test_backward_twice_and_accumulation(any_backend: str) -> None:
    """What autograd makes of a gradient given out must not come back in the next one."""
    tensors, p = double_problem()
    out = multi_head_loss(*tensors, p.labels, TaskLayout(p.tasks))[1]
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    for _ in range(3):
        out.backward(retain_graph=True)
    for t, g in zip(tensors, first, strict=True):
        torch.testing.assert_close(t.grad, 3 * g)


def test_many_gradients_at_once(any_backend: str) -> None:
    tensors, p = double_problem()
    per_task = multi_head_loss(*tensors, p.labels, TaskLayout(p.tasks))[0]
    eye = torch.eye(len(p.tasks), dtype=torch.float64)
    rows = [torch.autograd.grad(per_task, tensors, v, retain_graph=True) for v in eye]
    legacy = torch.autograd.grad(per_task, tensors, eye, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(per_task, tensors, v, retain_graph=True))(eye)
    for i in range(3):
        stacked = torch.stack([row[i] for row in rows])
        torch.testing.assert_close(legacy[i], stacked)
        torch.testing.assert_close(mapped[i], stacked)


def test_transforms_of_torch_func(any_backend: str) -> None:
    (x, w, b), p = double_problem()
    f = losses_of(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and jvp loads it
        jacobian = torch.autograd.functional.jacobian(lambda x: f(x, w, b), x)
        torch.testing.assert_close(torch.func.jacrev(lambda x: f(x, w.detach(), b.detach()))(x.detach()), jacobian)
        tangent = torch.func.jvp(lambda x: f(x, w.detach(), b.detach()), (x.detach(),), (x.detach(),))[1]
        torch.testing.assert_close(tangent, (jacobian * x.detach()).sum((1, 2)))


def test_changes_of_saved_tensors_are_noticed(any_backend: str) -> None:
    tensors, p = double_problem()
    per_task = multi_head_loss(*tensors, p.labels, TaskLayout(p.tasks))[0]
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (per_task * torch.arange(len(p.tasks))).sum().backward()


# ---- What PyTorch knows of the op.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fused: None, dtype: torch.dtype) -> None:
    op = torch.ops.torch_mtl_pyg.multi_head_loss.default
    for n in (3, 0):
        p = problem(n, 4, dtype)
        table = loss_table(TaskLayout(p.tasks))
        x, weight, bias = (t.requires_grad_() for t in p[:3])
        targets = [torch.empty(0, 0, 0) if y is None else y for y in p.labels.values()]
        arguments = (x, weight, bias, targets, table.integers, table.reals, table.weight)
        torch.library.opcheck(op, (*arguments, True, True, True, False))
        detached = (x.detach(), weight.detach(), None, *arguments[3:])
        torch.library.opcheck(op, (*detached, False, True, False, False))
        torch.library.opcheck(op, (*detached, False, False, False, True))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_without_graph_breaks(any_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    p = problem(9, 4, torch.float64)
    layout = TaskLayout(p.tasks)

    def step(x: Tensor, w: Tensor, b: Tensor, labels: dict[str, Any]) -> tuple[Tensor, Tensor]:
        per_task, total, *_ = multi_head_loss(torch.tanh(x), w, b, labels, layout)
        return total, per_task

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (9, 5):
        q = problem(n, 4, torch.float64)
        for learned in (False, True):
            results = []
            for f in (compiled, step):
                tensors = [t.clone().requires_grad_() for t in q[:3]]
                total, per_task = f(*tensors, q.labels)
                (per_task.square().sum() if learned else total).backward()
                results.append([total.detach(), per_task.detach(), *(t.grad for t in tensors)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_compiles_with_inductor(fused: None) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    p = problem(33, 20, torch.float32)
    layout = TaskLayout(p.tasks)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return multi_head_loss(torch.tanh(x), w, b, p.labels, layout)[1].square()

    results = []
    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        for f in (torch.compile(step, fullgraph=True), step):
            tensors = [t.clone().requires_grad_() for t in p[:3]]
            value = f(*tensors)
            value.backward()
            results.append([value.detach(), *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(any_backend: str, dtype: torch.dtype) -> None:
    p = problem(50, 16, torch.float32)
    tensors = [t.clone().requires_grad_() for t in p[:3]]
    with torch.autocast("cpu", dtype=dtype):
        per_task, total, count, _ = multi_head_loss(*tensors, p.labels, TaskLayout(p.tasks))
    assert per_task.dtype == total.dtype == torch.float32
    total.backward()
    exact, _ = run(p._replace(**{n: t.to(dtype).double() for n, t in zip(("x", "weight", "bias"), p[:3], strict=True)}))
    eps = torch.finfo(dtype).eps
    assert torch.equal(count, exact["count"])
    for t, name in zip(tensors, ("x", "weight", "bias"), strict=True):
        assert t.grad.dtype == torch.float32
        difference = (t.grad.double() - exact[name]).abs().max()
        assert difference <= 8 * eps * exact[name].abs().max(), name


def test_a_loss_scale_saves_small_float16_gradients(any_backend: str) -> None:
    tasks = {"t": mtl.Task(3, loss="mse")}
    x = torch.randn(4000, 8).half().requires_grad_()
    weight = (torch.randn(3, 8) * 1e-3).half()
    y = torch.zeros(4000, 3)
    total = multi_head_loss(x, weight, None, {"t": y}, TaskLayout(tasks))[1]
    (scaled,) = torch.autograd.grad(total * 2.0**16, x)
    xd, wd = x.detach().double(), weight.double()
    exact = 2 * (xd @ wd.t()) / y.numel() @ wd
    assert exact.abs().max() < 2.0**-24  # would be rounded to zero
    assert float((scaled.double() / 2**16 - exact).norm() / exact.norm()) < 0.02


def test_peak_memory_is_that_of_a_tile(fused: None) -> None:
    """No buffer as large as the logits: the op's scratch does not grow with the rows."""
    import subprocess
    import sys

    program = """
import resource, torch, torch_mtl_pyg as mtl
torch.set_num_threads(2)
heads = mtl.MultiTaskHeads(8, {f"t{i}": mtl.Task(64, loss="cross_entropy") for i in range(16)})
def step(n):
    x = torch.randn(n, 8, requires_grad=True)
    y = torch.randint(0, 64, (n, 16), dtype=torch.int8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heads.loss(x, y).total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
step(3000)
print(step(200_000))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # The logits would be 800,000 KiB; the gradient of x is 6,250.
    assert int(done.stdout) < 40_000, done.stdout
