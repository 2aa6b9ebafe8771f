"""What the losses have to be: torch.nn.functional in float64 on the labelled entries, picked by boolean indexing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accuracy import assert_accurate
from torch import Tensor
from torch.nn import functional as F

import torch_mtl_pyg as mtl


class Expected(NamedTuple):
    per_task: Tensor  # [T]
    count: Tensor  # [T]
    gradient: Tensor  # [N, K]: of each task at its own logits
    unit: Tensor  # [N, K]: what one label weighs in the mean of its task: 1 / norm


def one_loss(task: mtl.Task, out: Tensor, y: Tensor) -> Tensor:
    """F's mean loss of labelled entries: all of ``out`` and ``y``."""
    dtype = out.dtype
    numbers = {n: getattr(task, n) for n in ("class_weight", "pos_weight")}
    tensors = {n: None if v is None else torch.as_tensor(v, dtype=dtype) for n, v in numbers.items()}
    if task.loss == "cross_entropy":
        return F.cross_entropy(out, y.long(), tensors["class_weight"], label_smoothing=task.label_smoothing)
    if task.loss == "bce":
        return F.binary_cross_entropy_with_logits(out, y, pos_weight=tensors["pos_weight"])
    if task.loss == "gaussian_nll":
        return F.gaussian_nll_loss(out[:, 0], y, out[:, 1].exp())
    if task.loss == "huber":
        return F.huber_loss(out, y, delta=task.delta)
    return {"mse": F.mse_loss, "l1": F.l1_loss, "poisson_nll": F.poisson_nll_loss}[str(task.loss)](out, y)


def missing(task: mtl.Task, y: Tensor) -> Tensor:
    """Where a label is missing, from the contract: NaN in floats, ignore_index in classes, -100 in integers."""
    if task.loss == "cross_entropy":
        return torch.isnan(y) | (y == task.ignore_index)
    return torch.isnan(y) if y.is_floating_point() else y == -100


def expected(logits: Tensor, labels: Mapping[str, Tensor | None], tasks: Mapping[str, mtl.Task]) -> Expected:
    """Of float64 logits ``[N, K]``."""
    logits = logits.detach().double().requires_grad_()
    losses, counts, units = [], [], torch.zeros_like(logits)
    column = 0
    for name, task in tasks.items():
        rows = slice(column, column + task.out_channels)
        out, y = logits[:, rows], labels[name]
        column += task.out_channels
        if y is None or task.loss is None or bool(missing(task, y).all()):
            losses.append(logits.new_zeros(()))
            counts.append(0)
            continue
        there = ~missing(task, y)
        counts.append(int(there.sum()))
        if task.loss == "cross_entropy":
            there, y = there.reshape(-1), y.reshape(-1)
            weights = torch.tensor(task.class_weight or [1.0] * task.out_channels, dtype=torch.float64)
            if weights[y[there].long()].sum() == 0:  # nothing to take a mean of: 0 / 0 in PyTorch, 0 here
                losses.append(logits.new_zeros(()))
                continue
            losses.append(one_loss(task, out[there], y[there]))
            units[:, rows][there] = weights.max() / weights[y[there].long()].sum()
            continue
        there, y = (t.reshape(t.shape[0], -1) for t in (there, y.double()))
        if task.loss == "gaussian_nll":
            m = task.out_channels // 2
            pairs = torch.stack((out[:, :m][there], out[:, m:][there]), 1)
            losses.append(one_loss(task, pairs, y[there]))
            units[:, rows] = there.repeat(1, 2) / there.sum()
        elif task.loss == "bce" and isinstance(task.pos_weight, tuple):
            # One weight per column: columns apart, weighed by their labels.
            parts = []
            for c, weight in enumerate(task.pos_weight):
                one = mtl.Task(1, loss="bce", pos_weight=weight)
                if there[:, c].any():
                    parts.append(one_loss(one, out[there[:, c], c], y[there[:, c], c]) * there[:, c].sum())
            losses.append(torch.stack(parts).sum() / there.sum())
            units[:, rows] = there * (1 + torch.tensor(task.pos_weight)) / there.sum()
        else:
            losses.append(one_loss(task, out[there], y[there]))
            units[:, rows] = there * (1 + (task.pos_weight or 0.0)) / there.sum()
    per_task = torch.stack(losses)
    gradient = torch.zeros_like(logits)
    if per_task.requires_grad:
        (gradient,) = torch.autograd.grad(per_task.sum(), logits)
    return Expected(per_task.detach(), torch.tensor(counts), gradient, units)


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: dict[str, Any]
    tasks: dict[str, mtl.Task]


def check(problem: Problem, got: dict[str, Tensor], weights: Tensor, plain: dict[str, Tensor] | None = None) -> None:
    """Checks losses, counts, gradients and Gramian under the error model.

    Args:
        problem: The inputs.
        got: ``per_task``, ``count`` and, where asked for, ``x``, ``weight``, ``bias`` (gradients of
            ``weights @ per_task``), ``total``, ``gramian``.
        weights: ``[T]``.
        plain: The same from PyTorch in the dtype of ``got``.
    """
    x, w = problem.x.detach().double(), problem.weight.detach().double()
    b = torch.zeros(w.shape[0], dtype=torch.float64) if problem.bias is None else problem.bias.detach().double()
    logits, size = x @ w.t() + b, x.abs() @ w.abs().t() + b.abs()
    e = expected(logits, problem.labels, problem.tasks)
    widths = torch.tensor([t.out_channels for t in problem.tasks.values()])
    task = torch.repeat_interleave(widths)
    own = plain or {}
    assert torch.equal(got["count"], e.count)
    # An error of a logit, relative to the size of its terms, comes back in the losses by their slope and in the
    # gradients by their curvature, both at most of the order of 1 + |gradient|, per label.
    slope = e.gradient.abs() + 2 * e.unit
    per_column = (slope * (1 + size)).sum(0)
    loss_size = torch.zeros(len(widths), dtype=torch.float64).index_add(0, task, per_column) + e.per_task.abs()
    assert_accurate(got["per_task"], e.per_task, loss_size, own.get("per_task"))
    if "total" in got:
        fixed = torch.tensor([t.weight for t in problem.tasks.values()], dtype=torch.float64)
        assert_accurate(got["total"], fixed @ e.per_task, fixed.abs() @ loss_size, own.get("total"))
    v = weights.double()[task]
    g, g_size = e.gradient * v, slope * (1 + size) * v.abs()
    # Products of 16-bit numbers take the gradient at the logits rounded to 16 bits, as PyTorch does.
    for name, exact, magnitude, rounded in (
        ("x", g @ w, g_size @ w.abs(), g.abs() @ w.abs()),
        ("weight", g.t() @ x, g_size.t() @ x.abs(), g.abs().t() @ x.abs()),
        ("bias", g.sum(0), g_size.sum(0), None),
    ):
        if name in got:
            assert_accurate(got[name], exact, magnitude, own.get(name), rounded if got[name].itemsize == 2 else None)
    if "gramian" in got:
        place = F.one_hot(task, len(widths)).double()

        def blocks(g: Tensor, w: Tensor) -> Tensor:
            return place.t() @ ((g.t() @ g) * (w @ w.t())) @ place

        jacobian = torch.stack([(e.gradient * place[:, t]) @ w for t in range(len(widths))]).flatten(1)
        magnitude = blocks(slope * (1 + size), w.abs())
        assert_accurate(got["gramian"], jacobian @ jacobian.t(), magnitude, own.get("gramian"))
