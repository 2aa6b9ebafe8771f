"""Routed rows: T separate calls on the rows of each task, in outputs, losses, gradients and the Gramian's diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import TASKS
from mlp_cases import LOSSES_ONLY, SINGLE, route_of, routed_labels
from torch import Tensor
from torch.nn import functional as F

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import LabelError, label_columns

ROUTES = ("random", "sorted", "reversed", "constant", "some")
HIDDEN = (None, 8, [9, 4])


def heads_of(tasks: dict[str, Any], hidden: Any = None, **options: Any) -> mtl.MultiTaskHeads:
    return mtl.MultiTaskHeads(6, tasks, hidden_channels=hidden, act="gelu", **options).double()


def inputs(n: int) -> Tensor:
    return torch.randn(n, 6, dtype=torch.float64, requires_grad=True)


def apart(heads: mtl.MultiTaskHeads, x: Tensor, y: Tensor, route: Tensor, gramian: bool = False) -> list[Any]:
    """One call for each task, on its own rows alone, picked by boolean masks."""
    found = []
    for i, (name, task) in enumerate(heads.tasks.items()):
        own = y[route == i]
        if own.dim() == 2:
            columns = label_columns(task)
            own = own[:, 0] if task.loss == "cross_entropy" else own[:, :columns]
        found.append(heads.loss(x[route == i], own, task=name, gramian=gramian))
    return found


def check(heads: mtl.MultiTaskHeads, x: Tensor, y: Tensor, route: Tensor) -> None:
    """Losses, counts, totals and all gradients, for total and for weights known later."""
    parameters = [x, *heads.parameters()]
    losses = heads.loss(x, y, task=route)
    separate = apart(heads, x, y, route)
    expected = torch.stack([s.per_task[i] for i, s in enumerate(separate)])
    torch.testing.assert_close(losses.per_task, expected)
    assert losses.count.tolist() == [int(s.count[i]) for i, s in enumerate(separate)]
    total = sum(s.total for s in separate)
    torch.testing.assert_close(losses.total, total)
    learned = torch.linspace(0.3, 2, len(separate), dtype=torch.float64)
    for ours, theirs in ((losses.total, total), (losses.per_task @ learned, expected @ learned)):
        for a, b in zip(
            torch.autograd.grad(ours, parameters, retain_graph=True),
            torch.autograd.grad(theirs, parameters, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    product = heads.loss(x, y, task=route, gramian=True).gramian
    diagonal = torch.stack([s.gramian[i, i] for i, s in enumerate(apart(heads, x, y, route, gramian=True))])
    torch.testing.assert_close(product, torch.diag(diagonal))
    out = heads(x, task=route)
    for i, (name, columns) in enumerate(heads.slices.items()):
        rows, width = route == i, columns.stop - columns.start
        torch.testing.assert_close(out[rows][:, :width], heads(x[rows], task=name))
        assert not out[rows][:, width:].any()


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("kind", ROUTES)
def test_equals_separate_calls(any_backend: str, kind: str, hidden: Any) -> None:
    for tasks in (SINGLE, LOSSES_ONLY):
        heads = heads_of(tasks, hidden, bias=kind != "some")
        for n in (1, 2, 77):
            route = route_of(kind, n, tasks)
            check(heads, inputs(n), routed_labels(route, tasks), route)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_no_rows_and_many_tasks(any_backend: str, hidden: Any) -> None:
    heads, x = heads_of(SINGLE, hidden), inputs(0)
    empty = torch.zeros(0, dtype=torch.long)
    losses = heads.loss(x, torch.zeros(0), task=empty, gramian=True)
    losses.total.backward()
    assert torch.equal(losses.per_task, torch.zeros(5, dtype=torch.float64)) and losses.count.sum() == 0
    assert not losses.gramian.any() and x.grad.shape == (0, 6)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in heads.parameters())
    assert heads(x, task=empty).shape == (0, 7)
    many = {f"t{i}": mtl.Task(1 + i % 4, loss="cross_entropy") for i in range(1000)}
    heads, x = heads_of(many, hidden), inputs(300)
    route = torch.randint(0, 1000, (300,))
    y = torch.zeros(300, dtype=torch.long)
    losses = heads.loss(x, y, task=route)
    weights = torch.zeros(1000, dtype=torch.float64).index_add(0, route, torch.ones(300, dtype=torch.float64))
    out = torch.stack([heads(x[i : i + 1], task=int(t))[0, 0] for i, t in enumerate(route[:9])])
    torch.testing.assert_close(heads(x, task=route)[:9, 0], out)
    assert torch.equal(losses.count, weights.long())
    losses.total.backward()
    unused = torch.ones(1000, dtype=torch.bool).index_fill(0, route, False)
    for layer in range(heads.depth):
        grad = getattr(heads, heads.layer_names(layer)[0]).grad
        for task in unused.nonzero()[:20, 0].tolist():
            assert not grad[heads.rows_of(layer, f"t{task}")].any()


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize(
    "dtype",
    (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float64),
    ids=str,
)
def test_labels_of_every_type(any_backend: str, dtype: torch.dtype, hidden: Any) -> None:
    tasks = {"c": mtl.Task(2, "cross_entropy"), "b": mtl.Task(1, "bce"), "m": mtl.Task(1, "mse"), "n": mtl.Task(1, "poisson_nll")}  # fmt: skip  # noqa: E501
    heads, x, route = heads_of(tasks, hidden), inputs(40), torch.randint(0, 4, (40,))
    y = torch.randint(0, 2, (40,))
    expected = heads.loss(x, y, task=route)
    got = heads.loss(x, y.to(dtype), task=route)
    assert torch.equal(got.per_task, expected.per_task) and torch.equal(got.count, expected.count)
    if dtype in (torch.bool, torch.uint8):  # hold no -100
        return
    y[::3] = -100  # missing in integers, in classes and in labels of bce; a number, or an error, in other floats
    if dtype.is_floating_point:
        y = torch.where((y == -100) & (route >= 2), torch.nan, y.double())
    check(heads, x, y.to(dtype), route)
    assert heads.loss(x, y.to(dtype), task=route).count.sum() == 26


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_widths_of_labels(any_backend: str, hidden: Any) -> None:
    """[N, W] with W the widest head, or the most labels a row; columns beyond a task's own are not looked at."""
    tasks = {"v": TASKS["mse"], "g": TASKS["gaussian"], "c": TASKS["classes"], "l": TASKS["labels"]}
    heads, x = heads_of(tasks, hidden), inputs(50)
    route = torch.randint(0, 4, (50,))
    y = routed_labels(route, tasks)
    assert y.shape == (50, 6)
    expected = heads.loss(x, y, task=route).per_task
    wide = F.pad(y, (0, 1), value=float("inf"))  # heads are up to 7 wide
    assert torch.equal(heads.loss(x, wide, task=route).per_task, expected)
    assert torch.equal(heads.loss(x, wide.t().contiguous().t(), task=route).per_task, expected)
    assert torch.equal(heads.loss(x, torch.stack((y, y), 2)[:, :, 1], task=route).per_task, expected)
    assert torch.equal(heads.loss(x, y.double(), task=route).per_task, expected)
    for bad in (y[:, :5], y[:, :1], y[0], y[:49], y[None], y.unsqueeze(2)):
        with pytest.raises(ValueError, match=r"y: expected shape \[50\] or \[50, 7\], got"):
            heads.loss(x, bad, task=route)
    with pytest.raises(ValueError, match=r"y: expected 6 labels a row for the task 'l', got shape \[50\]"):
        heads.loss(x, y[:, 0], task=torch.full((50,), 3))
    one = heads.loss(x, torch.zeros(50), task=torch.full((50,), 2))  # only tasks that occur must fit
    assert one.count.tolist() == [0, 0, 50, 0]


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_missing_labels(any_backend: str, hidden: Any) -> None:
    heads, x = heads_of(SINGLE, hidden), inputs(40)
    route = torch.randint(0, 5, (40,))
    x.grad = None
    losses = heads.loss(x, torch.full((40,), float("nan")), task=route, gramian=True)
    losses.total.backward()
    assert losses.total == 0 and losses.count.sum() == 0 and not losses.gramian.any()
    assert torch.equal(x.grad, torch.zeros_like(x))
    y = routed_labels(route, SINGLE, share=0.0)
    y[route == 1] = float("nan")  # a task all of whose labels are missing
    check(heads, x, y, route)
    assert heads.loss(x, y, task=route)["toxic"] == 0


# ---- Callables and tasks without a loss.


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_callables(any_backend: str, hidden: Any) -> None:
    shapes = []

    def own(out: Tensor, y: Tensor) -> Tensor:
        shapes.append((tuple(out.shape), tuple(y.shape)))
        return (out.sum(1) - y.reshape(len(y), -1)[:, 0]).square()

    tasks = {"a": mtl.Task(3, "cross_entropy"), "own": mtl.Task(2, own, weight=0.5), "b": mtl.Task(1, "mse")}
    heads, x = heads_of(tasks, hidden), inputs(30)
    route = torch.randint(0, 3, (30,))
    y = torch.randint(0, 3, (30,)).double()
    y[::4] = torch.nan
    parameters = [x, *heads.parameters()]
    losses = heads.loss(x, y, task=route, gramian=True)
    mine = (route == 1) & ~y.isnan()
    assert shapes[0] == ((int(mine.sum()), 2), (int(mine.sum()),))
    separate = [heads.loss(x[route == i], y[route == i], task=i, gramian=True) for i in range(3)]
    expected = torch.stack([s.per_task[i] for i, s in enumerate(separate)])
    torch.testing.assert_close(losses.per_task, expected)
    torch.testing.assert_close(losses.total, sum(s.total for s in separate))
    assert losses.count.tolist() == [int(s.count[i]) for i, s in enumerate(separate)]
    diagonal = torch.stack([s.gramian[i, i] for i, s in enumerate(separate)])
    torch.testing.assert_close(losses.gramian, torch.diag(diagonal))
    got = torch.autograd.grad(heads.loss(x, y, task=route).total, parameters)
    for a, b in zip(got, torch.autograd.grad(sum(s.total for s in separate), parameters), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        again = heads.loss(x, y, task=route, gramian=True)
    torch.testing.assert_close(again.gramian, losses.gramian)


def test_loss_and_gramian_of_a_callable_drop_the_same(any_backend: str) -> None:
    heads, x = (
        heads_of({"a": mtl.Task(1, "mse"), "own": mtl.Task(1, lambda o, y: (o[:, 0] - y).square())}, 16),
        inputs(40),
    )
    heads.dropout = 0.5
    losses = heads.loss(x, torch.randn(40, dtype=torch.float64), task=torch.arange(40) % 2, gramian=True)
    for i in range(2):
        (gradient,) = torch.autograd.grad(losses[i], x, retain_graph=True)
        torch.testing.assert_close(losses.gramian[i, i], gradient.square().sum())


def test_tasks_without_a_loss(any_backend: str) -> None:
    heads = heads_of({"a": mtl.Task(2, "cross_entropy"), "none": 3}, 5)
    x, y = inputs(9), torch.zeros(9)
    assert heads.loss(x, y, task=torch.zeros(9, dtype=torch.long)).count.tolist() == [9, 0]
    assert heads(x, task=torch.ones(9, dtype=torch.long)).shape == (9, 3)
    with pytest.raises(ValueError, match=r"task: expected tasks with a loss, got 1 \('none'\), which has none"):
        heads.loss(x, y, task=torch.arange(9) % 2)


# ---- Editing, freezing, other ways of calling.


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_frozen_heads(any_backend: str, hidden: Any) -> None:
    heads, x = heads_of(SINGLE, hidden), inputs(60)
    route = torch.randint(0, 5, (60,))
    y = routed_labels(route, SINGLE)
    heads.loss(x, y, task=route).total.backward()
    free, of_x = [p.grad.clone() for p in heads.parameters()], x.grad.clone()
    heads.zero_grad()
    x.grad = None
    heads.freeze("toxic", "gauss")
    heads.loss(x, y, task=route).total.backward()
    torch.testing.assert_close(x.grad, of_x)
    for (name, p), before in zip(heads.named_parameters(), free, strict=True):
        layer = int(name[-1]) if name.startswith("hidden") else heads.depth - 1
        for task in SINGLE:
            rows = heads.rows_of(layer, task)
            wanted = torch.zeros_like(before[rows]) if task in heads.frozen else before[rows]
            torch.testing.assert_close(p.grad[rows], wanted)


def test_embedding_of_any_strides(any_backend: str) -> None:
    heads, route = heads_of(SINGLE, 5), torch.randint(0, 5, (40,))
    y = routed_labels(route, SINGLE)
    x = torch.randn(40, 6, dtype=torch.float64)
    expected = heads.loss(x, y, task=route).per_task
    for other in (x.t().contiguous().t(), torch.stack((x, x), 2)[:, :, 0], F.pad(x, (1, 2))[:, 1:7]):
        torch.testing.assert_close(heads.loss(other, y, task=route).per_task, expected)
    torch.testing.assert_close(heads.loss(x, y, task=torch.stack((route, route), 1)[:, 1]).per_task, expected)
    one = torch.tensor(2).expand(40)
    torch.testing.assert_close(heads.loss(x[:1].expand(40, 6), y, task=one)["degree"],
                               heads.loss(x[:1].repeat(40, 1), y, task="degree")["degree"])  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "task: expected int64 indices, got torch.int32", lambda x, y, i: (x, y, i.int())),
        (TypeError, "task: expected int64 indices, got torch.bool", lambda x, y, i: (x, y, i.bool())),
        (ValueError, r"task: expected shape \[9\], one index per row of x, got \[8\]", lambda x, y, i: (x, y, i[:8])),
        (ValueError, r"task: expected shape \[9\].*got \[\]", lambda x, y, i: (x, y, i[0])),
        (ValueError, "task: expected the device of x, cpu, got meta", lambda x, y, i: (x, y, i.to("meta"))),
        (IndexError, r"task: expected indices in \[0, 5\), got -1 in row 0", lambda x, y, i: (x, y, i - 1)),
        (IndexError, r"task: expected indices in \[0, 5\), got 5 in row 0", lambda x, y, i: (x, y, i + 5)),
        (IndexError, r"got 9223372036854775807 in row 0", lambda x, y, i: (x, y, torch.full_like(i, 2**63 - 1))),
        (TypeError, "y: expected a tensor", lambda x, y, i: (x, {"classes": y}, i)),
        (TypeError, "y: expected a tensor", lambda x, y, i: (x, None, i)),
        (TypeError, "y: expected dense labels that are numbers", lambda x, y, i: (x, y.cfloat(), i)),
        (TypeError, "y: expected dense labels that are numbers", lambda x, y, i: (x, y.to_sparse(), i)),
        (ValueError, r"y: expected shape \[9\]", lambda x, y, i: (x, y[:8], i)),
        (ValueError, "y: expected the device of x", lambda x, y, i: (x, y.to("meta"), i)),
        (ValueError, "y: expected labels that need no gradient", lambda x, y, i: (x, y.requires_grad_(), i)),
        (ValueError, r"x: expected shape \[N, 6\], got \[9, 5\]", lambda x, y, i: (x[:, :5], y, i)),
        (TypeError, "x: expected the dtype of weight", lambda x, y, i: (x.float(), y, i)),
        (LabelError, r"y\['classes'\]: expected classes in \[0, 7\).*got 7.0 in row 4",
         lambda x, y, i: (x, y.index_fill(0, torch.tensor(4), 7.0), i)),
        (LabelError, r"y\['toxic'\]: expected labels in \[0, 1\].*got 2.0 in row 5",
         lambda x, y, i: (x, y.index_fill(0, torch.tensor(5), 2.0), i.index_fill(0, torch.tensor(5), 1))),
        (LabelError, r"y\['degree'\]: expected finite numbers.*got inf in row 8",
         lambda x, y, i: (x, y.index_fill(0, torch.tensor(8), float("inf")), i.index_fill(0, torch.tensor(8), 2))),
        (TypeError, "gramian: expected a bool", lambda x, y, i: (x, y, i, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_bad_calls(any_backend: str, error: type[Exception], message: str, change: Any, hidden: Any) -> None:
    heads = heads_of(SINGLE, hidden)
    x, y, index, *gramian = change(torch.randn(9, 6).double(), torch.zeros(9), torch.zeros(9, dtype=torch.long))
    for one in (x.clone().requires_grad_(), x):
        with pytest.raises(error, match=message):
            heads.loss(one, y, task=index, gramian=gramian[0] if gramian else False)


def test_labels_of_one_task_made_by_hand(any_backend: str) -> None:
    """Against torch.nn.functional itself, without the package's own single calls."""
    heads, x = heads_of({"c": mtl.Task(4, "cross_entropy"), "m": mtl.Task(2, "mse")}, [5]), inputs(30)
    route = torch.randint(0, 2, (30,))
    y = torch.stack((torch.randint(0, 4, (30,)).double(), torch.randn(30).double()), 1)
    mods = heads.to_modules()
    losses = heads.loss(x, F.pad(y, (0, 2)), task=route)
    expected = [
        F.cross_entropy(mods["c"](x[route == 0]), y[route == 0, 0].long()),
        F.mse_loss(mods["m"](x[route == 1]), y[route == 1]),
    ]
    torch.testing.assert_close(losses.per_task, torch.stack(expected))
    (got,) = torch.autograd.grad(losses.total, x)
    torch.testing.assert_close(got, torch.autograd.grad(sum(expected), x)[0])
