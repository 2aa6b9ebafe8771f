"""The losses of the heads: fused ones in one pass, callables beside them, rows routed to one head each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..labels import FLOATING, MISSING, check_values, label_columns, labelled, missing_value, split_labels
from ..ops._checks import check_floating, check_same
from ..ops.multi_head_linear import multi_head_linear
from ..ops.multi_head_loss import multi_head_loss
from ..task import Task, TaskLayout, TaskLosses
from .routing import check_routes

if TYPE_CHECKING:
    from .heads import MultiTaskHeads

Labels = Mapping[str, Tensor | None] | Tensor


def losses_of_all(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Labels, layout: TaskLayout, gramian: bool
) -> TaskLosses:
    """Every row through every head."""
    own = layout.with_callable
    if not own:
        return TaskLosses(layout.names, *multi_head_loss(x, weight, bias, y, layout, gramian))
    labels = dict(zip(layout.names, split_labels(y, layout, x), strict=True))
    for name, part in labels.items():
        if layout.tasks[name].loss is None and part is not None:  # a column of a matrix
            check_values(name, layout.tasks[name], part)
            labels[name] = None
    values, counts, gradients = {}, {}, []
    for name in own:
        rows = layout.slices[name]
        out = multi_head_linear(x, weight[rows], None if bias is None else bias[rows])
        values[name], counts[name] = _callable_loss(name, layout.tasks[name], out, labels[name])
        if gramian:
            gradients.append(_gradient_at(name, layout.tasks[name], out, labels[name], values[name]))
        labels[name] = None
    per_task, total, count, product = multi_head_loss(x, weight, bias, labels, layout, gramian, gradients)
    place = torch.tensor([layout.names.index(name) for name in own], device=per_task.device)
    stacked = torch.stack([values[name] for name in own]).to(per_task.dtype)
    weights = stacked.new_tensor([layout.tasks[name].weight for name in own])
    return TaskLosses(
        layout.names,
        per_task.index_add(0, place, stacked),
        total + (weights * stacked).sum(),
        count.index_add(0, place, torch.stack([counts[name] for name in own])),
        product,
    )


def losses_of_one(heads: MultiTaskHeads, task: str | int, x: Tensor, y: Labels, gramian: bool) -> TaskLosses:
    """Every row through one head; the other tasks' losses are 0. ``y`` holds this task's labels alone."""
    from .freezing import effective

    layout = heads.layout
    name = layout.name(task)
    if layout.tasks[name].loss is None:
        raise ValueError(f"task: expected one with a loss, got {name!r}, which has none.")
    rows, place = layout.slices[name], layout.names.index(name)
    weight, bias = effective(heads)
    single = TaskLayout({name: layout.tasks[name]})
    labels = {name: y} if isinstance(y, Tensor) else y
    losses = losses_of_all(x, weight[rows], None if bias is None else bias[rows], labels, single, gramian)
    around = (place, len(layout.names) - 1 - place)
    return TaskLosses(
        layout.names,
        F.pad(losses.per_task, around),
        losses.total,
        F.pad(losses.count, around),
        None if losses.gramian is None else F.pad(losses.gramian, around * 2),
    )


def routed_labels(task: Tensor, x: Tensor, y: Labels, layout: TaskLayout) -> dict[str, Tensor | None]:
    """The labels of each task where row ``i`` belongs to the task ``task[i]`` alone: missing in all other rows.

    Raises:
        TypeError: ``y`` is no tensor of numbers.
        ValueError: ``y`` is neither ``[N]`` nor ``[N, max C_t]``, or too narrow for a task that occurs.
    """
    check_floating("x", x, 2, "[N, {}]", x, 1)
    check_routes(task, x, layout)
    columns = {name: label_columns(t) or 1 for name, t in layout.tasks.items()}
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor [N], one label per row, since task is a tensor, got {type(y).__name__}.")
    widest, n = max(layout.widths), x.shape[0]
    if tuple(y.shape) not in ((n,), (n, widest), (n, max(columns.values()))):
        raise ValueError(f"y: expected shape [{n}] or [{n}, {widest}], got {list(y.shape)}.")
    check_same("y", y, "x", x, dtype=False)
    if y.dtype in (torch.bool, torch.uint8):  # which have no number for "missing"
        y = y.to(torch.int16)
    one = y.dim() == 1
    y = y.unsqueeze(1) if one else y
    labels: dict[str, Tensor | None] = {}
    for index, (name, t) in enumerate(layout.tasks.items()):
        mine = task == index
        if t.loss is None:
            if bool(mine.any()):
                raise ValueError(f"task: expected tasks with a loss, got {index} ({name!r}), which has none.")
            continue
        if columns[name] > y.shape[1]:
            if bool(mine.any()):
                raise ValueError(
                    f"y: expected {columns[name]} labels a row for the task {name!r}, got shape {list(y.shape)}."
                )
            labels[name] = None
            continue
        missing = float("nan") if y.dtype in FLOATING else missing_value(t, y.dtype)
        own = y if callable(t.loss) else y[:, : columns[name]]
        part = torch.where(mine.unsqueeze(1), own, MISSING if missing is None else missing)
        labels[name] = part[:, 0] if one else part
    return labels


def _callable_loss(name: str, task: Task, out: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """A loss in plain PyTorch, over the rows that have all their labels."""
    zero = out[:0].sum()
    if y is None:
        return zero, torch.zeros((), dtype=torch.int64, device=out.device)
    present = labelled(task, y)
    rows = present.reshape(present.shape[0], -1).all(1)
    count = rows.sum() * (present.numel() // max(1, present.shape[0]))
    # Both together: without any labelled row, a mean would be NaN.
    if not bool(rows.any()):
        return zero, count
    assert callable(task.loss)
    value = task.loss(out[rows], y[rows])
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"tasks[{name!r}].loss: expected it to return a floating-point tensor, got {kind}.")
    return value.mean() if value.dim() else value, count


def _gradient_at(name: str, task: Task, out: Tensor, y: Tensor | None, value: Tensor) -> Tensor:
    if not out.requires_grad:  # nothing here needs a gradient but the Gramian
        with torch.inference_mode(False), torch.enable_grad():
            out = out.detach().clone().requires_grad_()
            value, _ = _callable_loss(name, task, out, y)
    if not value.requires_grad:
        return torch.zeros_like(out)
    (gradient,) = torch.autograd.grad(value, out, retain_graph=True, allow_unused=True)
    return torch.zeros_like(out) if gradient is None else gradient.to(out.dtype)
