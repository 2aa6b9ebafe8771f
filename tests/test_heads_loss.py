"""heads.loss and TaskLosses: the contract, on both backends."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from heads_common import TASKS as MIXED
from loss_cases import TASKS, problem
from loss_oracle import check, expected
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.nn import GraphSAGE

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import LabelError
from torch_mtl_pyg.ops.loss_table import loss_table
from torch_mtl_pyg.task import TaskLayout


def heads_of(p: Any, dtype: torch.dtype = torch.float64) -> mtl.MultiTaskHeads:
    heads = mtl.MultiTaskHeads(p.x.shape[1], p.tasks).to(dtype)
    with torch.no_grad():
        heads.weight.copy_(p.weight)
        heads.bias.copy_(p.bias)
    return heads


def mixed_labels(n: int) -> dict[str, Tensor]:
    return {"subject": torch.randint(0, 7, (n,)), "toxic": torch.rand(n).round(), "degree": torch.randn(n)}


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        ("cross_entropy", torch.tensor([9], dtype=torch.uint8), r"classes in \[0, 4\), got 9"),
        ("cross_entropy", torch.tensor([9]), r"classes in \[0, 4\) or -100 for a missing one, got 9"),
        ("cross_entropy", torch.tensor([9.0]), r"classes in \[0, 4\), -100 or NaN for a missing one, got 9"),
        ("bce", torch.tensor([[9] * 4], dtype=torch.uint8), r"labels in \[0, 1\], got 9"),
        ("poisson_nll", torch.tensor([[-1.0] * 4]), r"finite counts of at least 0 or NaN for a missing one, got -1"),
    ],
)
def test_the_message_names_what_can_be_missing(any_backend: str, loss: Any, labels: Tensor, message: str) -> None:
    heads = mtl.MultiTaskHeads(8, {"a": mtl.Task(4, loss=loss)})
    with pytest.raises(LabelError, match=message):
        heads.loss(torch.randn(1, 8), {"a": labels})


def test_losses_are_what_the_contract_says(any_backend: str) -> None:
    p = problem(37, 8, torch.float64)
    heads, x = heads_of(p), p.x.clone().requires_grad_()
    losses = heads.loss(x, p.labels, gramian=True)
    t = len(p.tasks)
    assert isinstance(losses, mtl.TaskLosses)
    assert losses.per_task.shape == losses.count.shape == (t,) and losses.total.shape == ()
    assert losses.gramian.shape == (t, t) and not losses.gramian.requires_grad
    assert losses.count.dtype == torch.int64
    assert heads.loss(x, p.labels).gramian is None
    assert list(losses) == list(losses.keys()) == list(p.tasks) and len(losses) == t and "mse" in losses
    for i, name in enumerate(p.tasks):
        assert torch.equal(losses[name], losses.per_task[i]) and torch.equal(losses[i], losses[name])
    assert {n: v.item() for n, v in losses.items()} == {n: v.item() for n, v in dict(losses).items()}
    with pytest.raises(KeyError, match="nope"):
        losses["nope"]
    with pytest.raises(IndexError, match=r"expected an index in \[0, 18\), got 18"):
        losses[18]
    assert re.search(r"TaskLosses\(total=\S+, \{classes: \S+ \(\d+\)", repr(losses))
    losses.total.backward()
    weights = torch.tensor([task.weight for task in p.tasks.values()])
    got = {"per_task": losses.per_task.detach(), "total": losses.total.detach(), "count": losses.count}
    check(p, got | {"x": x.grad, "weight": heads.weight.grad, "bias": heads.bias.grad}, weights)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_losses_are_kept_in_float32(any_backend: str, dtype: torch.dtype) -> None:
    p = problem(37, 8, dtype)
    losses = heads_of(p, dtype).loss(p.x, p.labels, gramian=True)
    assert losses.per_task.dtype == losses.total.dtype == losses.gramian.dtype == torch.float32


def test_a_model_trains_end_to_end(any_backend: str) -> None:
    x, edges = torch.randn(60, 12), torch.randint(0, 60, (2, 240))
    y = {name: torch.where(torch.rand(60) < 0.4, torch.nan, t.float()) for name, t in mixed_labels(60).items()}
    trunk, heads = GraphSAGE(12, 32, 2), mtl.MultiTaskHeads(32, MIXED)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01)
    totals = []
    for _ in range(60):
        optimizer.zero_grad()
        losses = heads.loss(trunk(x, edges), y)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.4 * totals[0]
    before = heads.weight[heads.slices["other"]]
    assert torch.equal(before, heads.weight[heads.slices["other"]])


def test_weights_known_later(any_backend: str) -> None:
    """Learned weights: a gradient for them, and the right one for everything else."""
    p = problem(40, 8, torch.float64)
    heads = heads_of(p)
    x = p.x.clone().requires_grad_()
    log_variances = torch.linspace(-0.5, 0.5, len(p.tasks), dtype=torch.float64, requires_grad=True)
    losses = heads.loss(x, p.labels)
    (torch.exp(-log_variances) * losses.per_task + log_variances).sum().backward()
    got = {"per_task": losses.per_task.detach(), "count": losses.count, "x": x.grad, "weight": heads.weight.grad}
    check(p, got, torch.exp(-log_variances).detach())
    torch.testing.assert_close(
        log_variances.grad, 1 - torch.exp(-log_variances.detach()) * losses.per_task.detach(), check_stride=False
    )


def test_tasks_without_a_loss(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, MIXED)
    x, y = torch.randn(20, 8, requires_grad=True), mixed_labels(20)
    losses = heads.loss(x, y)
    assert losses["other"] == 0 and losses.count.tolist() == [20, 20, 20, 0]
    losses.total.backward()
    assert torch.equal(heads.weight.grad[heads.slices["other"]], torch.zeros(5, 8))
    assert torch.equal(heads.loss(x, {**y, "other": None}).per_task, losses.per_task)
    matrix = torch.stack([t.float() for t in (*y.values(), torch.full((20,), torch.nan))], 1)
    assert torch.equal(heads.loss(x, matrix).per_task, losses.per_task)
    matrix[3, 3] = 1.0
    with pytest.raises(ValueError, match=r"y\['other'\]: expected no labels, since the task has no loss"):
        heads.loss(x, matrix)
    with pytest.raises(ValueError, match=r"y\['other'\]: expected no labels"):
        heads.loss(x, {**y, "other": torch.zeros(20)})
    with pytest.raises(ValueError, match="loss: expected at least one task with a loss"):
        mtl.MultiTaskHeads(8, {"a": 3}).loss(x, {})


def test_no_labels_at_all_still_goes_backward(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, MIXED)
    x = torch.randn(20, 8, requires_grad=True)
    losses = heads.loss(x, dict.fromkeys(("subject", "toxic", "degree")), gramian=True)
    losses.total.backward()
    assert losses.total == 0 and torch.equal(x.grad, torch.zeros(20, 8))
    assert torch.equal(losses.gramian, torch.zeros(4, 4)) and losses.count.sum() == 0
    empty = torch.randn(0, 8, requires_grad=True)
    heads.loss(empty, {"subject": torch.zeros(0, dtype=torch.long), "toxic": empty[:, 0].detach(), "degree": None})


# ---- One task, routed rows.


def test_one_task_alone(any_backend: str) -> None:
    p = problem(25, 8, torch.float64)
    heads, x = heads_of(p), p.x.clone().requires_grad_()
    everything = heads.loss(x, p.labels, gramian=True)
    for i, name in enumerate(p.tasks):
        if p.tasks[name].loss is None:
            with pytest.raises(ValueError, match="task: expected one with a loss, got 'none'"):
                heads.loss(x, p.labels["mse"], task=name)
            continue
        for task in (name, i):
            losses = heads.loss(x, p.labels[name], task=task, gramian=True)
            assert losses.per_task.shape == (len(p.tasks),)
            torch.testing.assert_close(losses[name], everything[name])
            torch.testing.assert_close(losses.total, everything[name] * p.tasks[name].weight)
            torch.testing.assert_close(losses.gramian[i, i], everything.gramian[i, i])
            assert losses.count.sum() == losses.count[i] == everything.count[i]
    with pytest.raises(ValueError, match="task: expected one of"):
        heads.loss(x, p.labels["mse"], task="nope")


@pytest.mark.parametrize("two_dimensional", (False, True))
def test_routed_rows(any_backend: str, two_dimensional: bool) -> None:
    """Row i belongs to task idx[i] alone: T separate calls on the selected rows."""
    tasks = {"c": mtl.Task(4, "cross_entropy"), "b": mtl.Task(1, "bce", pos_weight=3.0), "m": mtl.Task(1, "mse"),
             "empty": mtl.Task(1, "l1")}  # fmt: skip
    if two_dimensional:
        tasks["v"] = mtl.Task(4, "huber")
    heads = mtl.MultiTaskHeads(6, tasks).double()
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    idx = torch.tensor([0, 1, 2, 4 if two_dimensional else 0, 1])[torch.randint(0, 5, (50,))]
    y = torch.randint(0, 2, (50, 4)).double()
    y[torch.rand(50) < 0.2] = torch.nan
    labels = y if two_dimensional else y[:, 0]
    losses = heads.loss(x, labels, task=idx, gramian=True)
    losses.total.backward()
    grads = (x.grad.clone(), heads.weight.grad.clone())
    x.grad = heads.weight.grad = None
    total = torch.zeros((), dtype=torch.float64)
    for i, (name, task) in enumerate(tasks.items()):
        mine = idx == i
        own = y[mine] if task.loss == "huber" else y[mine, 0]
        alone = heads.loss(x[mine], own, task=name)
        torch.testing.assert_close(losses[name], alone[name])
        assert losses.count[i] == alone.count[i]
        total = total + alone.total
    total.backward()
    torch.testing.assert_close(grads[0], x.grad)
    torch.testing.assert_close(grads[1], heads.weight.grad)
    assert torch.equal(losses.gramian, torch.diag(losses.gramian.diag()))  # no row has two tasks


def test_routed_integer_labels(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(
        6, {"a": mtl.Task(4, "cross_entropy"), "b": mtl.Task(3, "cross_entropy", ignore_index=2)}
    )
    x, y, idx = torch.randn(30, 6), torch.randint(0, 2, (30,)), torch.randint(0, 2, (30,))
    losses = heads.loss(x, y, task=idx)
    assert losses.count.tolist() == torch.bincount(idx, minlength=2).tolist()
    assert torch.equal(losses.per_task, heads.loss(x, y.double(), task=idx).per_task)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "task: expected int64", lambda x, y, i: (x, y, i.int())),
        (IndexError, r"task: expected indices in \[0, 4\), got 4 in row 1", lambda x, y, i: (x, y, torch.full_like(i, 4).index_fill(0, torch.tensor(0), 0))),  # noqa: E501
        (ValueError, r"y: expected shape \[9\] or \[9, 7\], got \[8\]", lambda x, y, i: (x, y[:8], i)),
        (TypeError, "y: expected a tensor", lambda x, y, i: (x, {"subject": y}, i)),
        (ValueError, "task: expected tasks with a loss, got 3", lambda x, y, i: (x, y, torch.full_like(i, 3))),
        (LabelError, r"y\['toxic'\]: expected labels in \[0, 1\].*got 5.0 in row 0", lambda x, y, i: (x, y + 5, torch.ones_like(i))),  # noqa: E501
    ],
)  # fmt: skip
def test_bad_routes(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    heads = mtl.MultiTaskHeads(8, MIXED)
    x, y, idx = change(torch.randn(9, 8), torch.zeros(9), torch.zeros(9, dtype=torch.long))
    with pytest.raises(error, match=message):
        heads.loss(x, y, task=idx)


# ---- Callables.


def test_a_callable_goes_beside_the_fused_ones(any_backend: str) -> None:
    calls = []

    def smooth(out: Tensor, target: Tensor) -> Tensor:
        calls.append(tuple(out.shape))
        return F.smooth_l1_loss(out[:, 0], target, reduction="none")

    tasks = {"a": TASKS["classes"], "own": mtl.Task(1, smooth, weight=0.5), "b": TASKS["mse"],
             "rows": mtl.Task(2, F.mse_loss)}  # fmt: skip
    heads = mtl.MultiTaskHeads(6, tasks).double()
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    y = {"a": torch.randint(0, 7, (30,)), "own": torch.randn(30), "b": torch.randn(30, 3), "rows": torch.randn(30, 2)}
    y["own"][:10] = torch.nan
    y["rows"][4, 1] = torch.nan
    losses = heads.loss(x, y, gramian=True)
    assert calls == [(20, 1)] and losses.count.tolist() == [30, 20, 90, 58]
    out = heads(x)
    kept = ~torch.isnan(y["rows"]).any(1)
    plain = [
        F.cross_entropy(out["a"], y["a"]),
        F.smooth_l1_loss(out["own"][10:, 0], y["own"][10:].double()),
        F.mse_loss(out["b"], y["b"].double()),
        F.mse_loss(out["rows"][kept], y["rows"][kept].double()),
    ]
    torch.testing.assert_close(losses.per_task, torch.stack(plain))
    jacobian = torch.stack([torch.autograd.grad(l, x, retain_graph=True)[0].flatten() for l in plain])  # noqa: E741
    torch.testing.assert_close(losses.gramian, jacobian @ jacobian.t())
    torch.testing.assert_close(losses.total, plain[0] + 0.5 * plain[1] + plain[2] + plain[3])
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    ours = torch.autograd.grad((weights * losses.per_task).sum() + losses.total, [x, heads.weight])
    total = sum(w * p for w, p in zip(weights + torch.tensor([1, 0.5, 1, 1]), plain, strict=True))
    for a, b in zip(ours, torch.autograd.grad(total, [x, heads.weight]), strict=True):
        torch.testing.assert_close(a, b)
    y["own"][:] = torch.nan
    y["rows"] = None
    losses = heads.loss(x, y, gramian=True)
    assert losses["own"] == losses["rows"] == 0 and losses.count.tolist() == [30, 0, 90, 0]
    losses.total.backward()
    assert x.grad.isfinite().all()


def test_a_callable_with_a_matrix_and_bad_results(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": mtl.Task(1, "bce"), "own": mtl.Task(1, lambda o, y: (o[:, 0] - y).abs())})
    x, y = torch.randn(12, 6), torch.rand(12, 2).round()
    y[3] = torch.nan
    losses = heads.loss(x, y)
    keep = [i for i in range(12) if i != 3]
    torch.testing.assert_close(losses["own"], F.l1_loss(heads(x)["own"][keep, 0], y[keep, 1]))
    heads = mtl.MultiTaskHeads(6, {"own": mtl.Task(1, lambda o, y: 3)})
    with pytest.raises(TypeError, match=r"tasks\['own'\].loss: expected it to return a floating-point tensor, got int"):
        heads.loss(x, y[:, :1].nan_to_num())


# ---- With the rest of the heads.


def test_frozen_heads(any_backend: str) -> None:
    p = problem(25, 8, torch.float64)
    heads, x = heads_of(p), p.x.clone().requires_grad_()
    heads.loss(x, p.labels).total.backward()
    free, gx = heads.weight.grad.clone(), x.grad.clone()
    heads.weight.grad = x.grad = None
    heads.freeze("mse", "both")
    heads.loss(x, p.labels).total.backward()
    torch.testing.assert_close(x.grad, gx)
    for name, rows in heads.slices.items():
        wanted = torch.zeros_like(free[rows]) if name in ("mse", "both") else free[rows]
        torch.testing.assert_close(heads.weight.grad[rows], wanted)


def test_after_editing_copying_and_loading(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, MIXED)
    x, y = torch.randn(20, 8), mixed_labels(20)
    before = heads.loss(x, y)
    assert torch.equal(copy.deepcopy(heads).loss(x, y).per_task, before.per_task)
    heads.remove_task("toxic")
    heads.add_task("new", mtl.Task(2, "mse"))
    del y["toxic"]
    losses = heads.loss(x, {**y, "new": torch.randn(20, 2)})
    torch.testing.assert_close(losses["subject"], before["subject"])
    assert losses.count.tolist() == [20, 20, 0, 40]


def test_compiled_training_step(any_backend: str) -> None:
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(8, MIXED)
    x = torch.randn(20, 8, requires_grad=True)
    y = mixed_labels(20)
    matrix = torch.stack([*(t.float() for t in y.values()), torch.full((20,), torch.nan)], 1)
    for labels in (y, matrix):

        def step(x: Tensor, y: Any) -> Tensor:
            return heads.loss(torch.tanh(x), y).total

        grads = []
        for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
            x.grad = heads.weight.grad = None
            f(x, labels).backward()
            grads.append((x.grad, heads.weight.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_checkpointing_and_inference(any_backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    p = problem(25, 8, torch.float64)
    heads, x = heads_of(p), p.x.clone().requires_grad_()
    heads.loss(x, p.labels).total.backward()
    direct = x.grad.clone()
    x.grad = None
    checkpoint(lambda x: heads.loss(x, p.labels).total, x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, direct)
    with torch.inference_mode():
        assert heads.loss(p.x, p.labels).total.is_inference()
    with torch.no_grad():
        assert not heads.loss(x, p.labels).total.requires_grad


# ---- Bad labels.

BAD: list[tuple[str, Any, str, Any]] = [
    ("class 7 of 7", LabelError, r"y\['subject'\]: expected classes in \[0, 7\).*got 7 in row 4",
     lambda y: {**y, "subject": y["subject"].index_fill(0, torch.tensor(4), 7)}),
    ("negative class", LabelError, r"y\['subject'\].*got -1 in row 0",
     lambda y: {**y, "subject": y["subject"].index_fill(0, torch.tensor(0), -1)}),
    ("half a class", LabelError, r"y\['subject'\].*got 2.5 in row 2",
     lambda y: {**y, "subject": y["subject"].double().index_fill(0, torch.tensor(2), 2.5)}),
    ("huge class", LabelError, r"y\['subject'\].*got 4611686018427387904 in row 8",
     lambda y: {**y, "subject": y["subject"].index_fill(0, torch.tensor(8), 2**62)}),
    ("binary 2", LabelError, r"y\['toxic'\]: expected labels in \[0, 1\].*got 2.0 in row 1",
     lambda y: {**y, "toxic": y["toxic"].index_fill(0, torch.tensor(1), 2.0)}),
    ("infinite", LabelError, r"y\['degree'\]: expected finite numbers.*got inf in row 3",
     lambda y: {**y, "degree": y["degree"].index_fill(0, torch.tensor(3), float("inf"))}),
    ("short", ValueError, r"y\['toxic'\]: expected shape \[9\] or \[9, 1\], got \[8\]",
     lambda y: {**y, "toxic": y["toxic"][:8]}),
    ("soft classes", ValueError, r"y\['subject'\]: expected shape \[9\] or \[9, 1\], one class per row, got \[9, 7\]",
     lambda y: {**y, "subject": torch.rand(9, 7)}),
    ("no such task", ValueError, r"y: expected one of 'subject', .* got 'topic'",
     lambda y: {**y, "topic": y["subject"]}),
    ("task left out", ValueError, r"y: expected labels of the task 'degree'",
     lambda y: {"subject": y["subject"], "toxic": y["toxic"]}),
    ("complex", TypeError, r"y\['toxic'\]: expected dense labels that are numbers, got dtype torch.complex64",
     lambda y: {**y, "toxic": y["toxic"].cfloat()}),
    ("sparse", TypeError, r"y\['toxic'\]: .*got layout", lambda y: {**y, "toxic": y["toxic"].to_sparse()}),
    ("list", TypeError, r"y\['toxic'\]: expected a tensor or None, got list", lambda y: {**y, "toxic": [1.0] * 9}),
    ("other device", ValueError, r"y\['toxic'\]: expected the device of x, cpu, got meta",
     lambda y: {**y, "toxic": y["toxic"].to("meta")}),
    ("a number", TypeError, "y: expected a dict from task to labels or a matrix", lambda y: 3.0),
    ("matrix too narrow", ValueError, r"y: expected shape \[9, 4\], one column per task, got \[9, 3\]",
     lambda y: torch.zeros(9, 3)),
    ("matrix 1-D", ValueError, r"y: expected shape \[9, 4\].*got \[9\]", lambda y: torch.zeros(9)),
    ("matrix complex", TypeError, "y: expected a dense matrix of numbers", lambda y: torch.zeros(9, 4).cfloat()),
    ("matrix class", LabelError, r"y\['subject'\]: .*got 7.0 in row 0", lambda y: torch.full((9, 4), 7.0)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_labels(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    heads = mtl.MultiTaskHeads(8, MIXED)
    y = {**mixed_labels(9), "other": None}
    with pytest.raises(error, match=message):
        heads.loss(torch.randn(9, 8, requires_grad=True), change(y))
    with pytest.raises(error, match=message), torch.no_grad():
        heads.loss(torch.randn(9, 8), change(y))


def test_label_errors_are_both_kinds() -> None:
    assert issubclass(LabelError, ValueError) and issubclass(LabelError, IndexError)


def test_labels_of_several_columns_need_a_dict(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, {"a": mtl.Task(2, "mse"), "b": mtl.Task(1, "mse")})
    with pytest.raises(ValueError, match="y: expected a dict, since the task 'a' has 2 labels a row, got a matrix"):
        heads.loss(torch.randn(9, 8), torch.zeros(9, 2))


def test_poisson_counts_and_direct_calls(fused: None) -> None:
    heads = mtl.MultiTaskHeads(8, {"n": mtl.Task(2, "poisson_nll")})
    with pytest.raises(
        LabelError, match=r"y\['n'\]: expected finite counts of at least 0.*got -1.0 in row 0, column 1"
    ):
        heads.loss(torch.randn(1, 8), {"n": torch.tensor([[1.0, -1.0]])})
    table = loss_table(heads.layout)
    x, weight = torch.randn(3, 8), torch.randn(2, 8)
    good: list[Any] = [x, weight, None, [torch.ones(3, 2)], table.integers, table.reals, table.weight]
    op = torch.ops.torch_mtl_pyg.multi_head_loss
    bad_table = table.integers.clone()
    bad_table[0, 3] = 100
    for place, value, message in (
        (0, x.half(), "weight: expected the dtype of x"),
        (1, torch.randn(3, 8), "weight: size of dimension 0"),
        (2, torch.randn(3), "bias: expected|bias: size"),
        (3, [torch.ones(2, 2)], r"targets\[0\]: expected a tensor \[3, 2\]"),
        (3, [], "targets: expected 1 or 1 tensors, got 0"),
        (3, [-torch.ones(3, 2)], "targets: expected finite counts of at least 0 for task 0, got -1 in row 0"),
        (4, table.integers.int(), "integers: expected"),
        (4, bad_table, "integers: expected a kind, a width"),
        (4, torch.tensor([[99, 2, 0, -1]]), "integers: expected a kind"),
        (4, torch.tensor([[7, 3, 0, -1]]), "integers: expected an even width of gaussian_nll"),
        (5, table.reals[:0], "reals: expected"),
        (6, torch.ones(2, dtype=torch.float64), "task_weight: expected"),
    ):
        arguments = list(good)
        arguments[place] = value
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, True, True, False, False)


def test_expected_is_torch_nn_functional() -> None:
    """The oracle on complete labels, against the formulas written out."""
    z, y = torch.randn(11, 3, dtype=torch.float64), torch.randint(0, 3, (11,))
    got = expected(z, {"t": y}, {"t": mtl.Task(3, "cross_entropy")})
    log_p = z - z.logsumexp(1, keepdim=True)
    torch.testing.assert_close(got.per_task[0], -log_p[torch.arange(11), y].mean())
    torch.testing.assert_close(got.gradient, (log_p.exp() - F.one_hot(y, 3)) / 11)


def test_weights_are_kept_for_each_device() -> None:
    table = loss_table(TaskLayout({"a": mtl.Task(2, loss="mse", weight=0.5), "b": mtl.Task(1, loss="bce")}))
    assert table.weight_on(torch.device("cpu")) is table.weight
    other = table.weight_on(torch.device("meta"))
    assert other.device.type == "meta" and table.weight_on(torch.device("meta")) is other
    again = pickle.loads(pickle.dumps(table))
    assert torch.equal(again.weight, table.weight) and again.weight_on(torch.device("meta")) is not other
