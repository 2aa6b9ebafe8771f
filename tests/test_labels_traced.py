"""Labels are checked wherever a step runs: in transforms of torch.func, and in compiled functions at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import torch_mtl_pyg as mtl

X = torch.linspace(-1, 1, 24).reshape(4, 6)
HEADS = {
    "classes": mtl.Task(3, loss="cross_entropy"),
    "binary": mtl.Task(1, loss="bce"),
    "counts": mtl.Task(1, loss="poisson_nll"),
    "mse": mtl.Task(1, loss="mse"),
}
GOOD = {
    "classes": torch.tensor([0, 1, 2, -100]),
    "binary": torch.ones(4),
    "counts": torch.ones(4),
    "mse": torch.ones(4),
}
BAD = [
    ("classes", torch.tensor([0, 1, 3, 0]), r"y\['classes'\]: expected classes in \[0, 3\)"),
    ("classes", torch.tensor([0, 1, 1.5, 0]), r"y\['classes'\]: expected classes in \[0, 3\)"),
    ("binary", torch.tensor([0, 1, 5.0, 0]), r"y\['binary'\]: expected labels in \[0, 1\]"),
    ("counts", torch.tensor([0, 1, -5.0, 0]), r"y\['counts'\]: expected finite counts"),
    ("mse", torch.tensor([0, 1, torch.inf, 0]), r"y\['mse'\]: expected finite numbers"),
]


def heads_of(hidden: int | None = None, tasks: Any = HEADS) -> mtl.MultiTaskHeads:
    torch._dynamo.reset()
    return mtl.MultiTaskHeads(6, tasks, hidden_channels=hidden)


@pytest.mark.parametrize("hidden", (None, 5))
@pytest.mark.parametrize(("name", "labels", "message"), BAD)
def test_in_a_transform(any_backend: str, hidden: int | None, name: str, labels: Tensor, message: str) -> None:
    heads = heads_of(hidden)
    y = {**GOOD, name: labels}
    transforms: tuple[Callable[[Tensor], Tensor], ...] = (
        grad(lambda z: heads.loss(z, y).total),
        lambda x: vmap(lambda z: heads.loss(z, y).total)(x[None]),
    )
    for transformed in transforms:
        with pytest.raises(IndexError, match=message):
            transformed(X)
    assert grad(lambda z: heads.loss(z, GOOD).total)(X).isfinite().all()


@pytest.mark.parametrize("hidden", (None, 5))
@pytest.mark.parametrize(("name", "labels", "message"), BAD)
def test_in_a_compiled_function(any_backend: str, hidden: int | None, name: str, labels: Tensor, message: str) -> None:
    del message  # values are not known there
    heads = heads_of(hidden)
    total = torch.compile(lambda x, y: heads.loss(x, y).total, fullgraph=True, backend="aot_eager")
    good = {other: y.to(labels.dtype) if other == name else y for other, y in GOOD.items()}
    torch.testing.assert_close(total(X, good), heads.loss(X, good).total)
    # The op names the task by its index.
    with pytest.raises(RuntimeError, match=rf"y\['{name}'\]: expected|task {list(HEADS).index(name)}"):
        total(X, {**GOOD, name: labels})


def test_batched_labels_are_computed(any_backend: str) -> None:
    heads = heads_of()
    ys = {name: torch.stack([y, y]) for name, y in GOOD.items()}
    out = vmap(lambda y: heads.loss(X, y).per_task)(ys)
    torch.testing.assert_close(out, heads.loss(X, GOOD).per_task.expand(2, -1))


# ---- Rows routed to one head each.

ROUTE = torch.tensor([1, 0, 1, 0])


@pytest.mark.parametrize("hidden", (None, 5))
def test_routed_rows_of_a_task_without_a_loss(any_backend: str, hidden: int | None) -> None:
    heads = heads_of(hidden, {"a": HEADS["classes"], "b": 3})
    y, message = torch.ones(4), r"task: expected tasks with a loss, got 1 \('b'\)"
    with pytest.raises(ValueError, match=message):
        heads.loss(X, y, task=ROUTE)
    with pytest.raises(ValueError, match=message):
        grad(lambda z: heads.loss(z, y, task=ROUTE).total)(X)
    per_task = torch.compile(lambda x, y, r: heads.loss(x, y, task=r).per_task, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(per_task(X, y, ROUTE * 0), heads.loss(X, y, task=ROUTE * 0).per_task)
    with pytest.raises(RuntimeError, match=message):
        per_task(X, y, ROUTE)


@pytest.mark.parametrize("hidden", (None, 5))
def test_routed_rows_with_too_few_labels(any_backend: str, hidden: int | None) -> None:
    heads = heads_of(hidden, {"a": HEADS["classes"], "b": mtl.Task(3, loss="mse")})
    y, message = torch.ones(4), r"y: expected (3|as many) labels a row .*task 'b'"
    with pytest.raises(ValueError, match=message):
        vmap(lambda z: heads.loss(z, y, task=ROUTE).per_task)(X[None])
    per_task = torch.compile(lambda x, y, r: heads.loss(x, y, task=r).per_task, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=message):
        per_task(X, y, ROUTE)


def test_routed_classes_out_of_range(any_backend: str) -> None:
    heads = heads_of(None, {"a": HEADS["classes"], "b": HEADS["binary"]})
    y = torch.tensor([1.0, 3.0, 0.0, 2.0])
    with pytest.raises(IndexError, match=r"y\['a'\]: expected classes in \[0, 3\).*got 3.0 in row 1"):
        grad(lambda z: heads.loss(z, y, task=ROUTE).total)(X)
    total = torch.compile(lambda x, y, r: heads.loss(x, y, task=r).total, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"y\['a'\]: expected classes|task 0"):
        total(X, y, ROUTE)


# ---- One task, and the Gramian.


@pytest.mark.parametrize("hidden", (None, 5))
def test_one_task_compiles_before_it_was_ever_called(any_backend: str, hidden: int | None) -> None:
    heads, y = heads_of(hidden), GOOD["classes"]
    step = torch.compile(lambda x, y: heads.loss(x, y, task="classes").total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(X, y), heads.loss(X, y, task="classes").total)
    heads = heads_of(hidden)
    out = torch.compile(lambda x: heads(x, task="classes"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(out(X), heads(X, task="classes"))


@pytest.mark.parametrize("hidden", (None, 5))
def test_a_compiled_gramian_needs_no_gradient(hidden: int | None) -> None:
    heads = heads_of(hidden)
    x = X.clone().requires_grad_()
    gramian = torch.compile(lambda x, y: heads.loss(x, y, gramian=True).gramian, fullgraph=True, backend="aot_eager")
    out = gramian(x, GOOD)
    assert not out.requires_grad
    torch.testing.assert_close(out, heads.loss(x, GOOD, gramian=True).gramian)
    route = torch.tensor([1, 3, 3, 1])
    routed = torch.compile(lambda x, y: heads.loss(x, y, task=route, gramian=True).gramian, backend="aot_eager")
    assert not routed(x, torch.ones(4)).requires_grad


@pytest.mark.parametrize("hidden", (None, 5))
def test_no_gramian_inside_of_vmap(any_backend: str, hidden: int | None) -> None:
    heads = heads_of(hidden)
    with pytest.raises(ValueError, match=r"gramian: expected False inside of torch.func.vmap, got True"):
        vmap(lambda z: heads.loss(z, GOOD, gramian=True).per_task)(torch.stack([X, X]))
    with pytest.raises(ValueError, match=r"gramian: expected False inside of torch.func.vmap, got True"):
        vmap(lambda z: heads.loss(z, torch.ones(4), task=ROUTE * 2 + 1, gramian=True).per_task)(torch.stack([X, X]))


# ---- Bool labels.


def test_an_ignore_index_that_is_a_bool(any_backend: str) -> None:
    y = torch.tensor([False, True, True, False])
    for ignored in (0, 1):
        heads = heads_of(None, {"t": mtl.Task(2, loss="cross_entropy", ignore_index=ignored), "u": HEADS["mse"]})
        for labels in ({"t": y, "u": GOOD["mse"]}, torch.stack([y, y], 1)):
            wanted = {"t": y.long(), "u": GOOD["mse"]} if isinstance(labels, dict) else labels.long()
            got, expected = heads.loss(X, labels), heads.loss(X, wanted)
            assert got.count.tolist() == expected.count.tolist() == [2, 4]
            torch.testing.assert_close(got.per_task, expected.per_task)
            torch.testing.assert_close(
                heads.loss(X, y, task=torch.zeros(4, dtype=torch.int64)).count, torch.tensor([2, 0])
            )
