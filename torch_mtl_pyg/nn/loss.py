"""The losses of the heads: fused ones in one pass, callables beside them, rows routed to one head each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..labels import check_values, labelled, split_labels
from ..ops import Hidden, multi_head_loss, multi_head_mlp, multi_head_mlp_loss, reference
from ..ops._checks import check_floating, check_route, check_route_values, has_values
from ..ops.multi_head_loss import Labels, Losses
from ..ops.multi_head_mlp_loss import check_routed_labels, check_routed_tasks
from ..task import Task, TaskLayout, TaskLosses
from .hidden import of_task, output_of

if TYPE_CHECKING:
    from .heads import MultiTaskHeads


def losses_of_all(
    heads: MultiTaskHeads,
    x: Tensor,
    y: Labels,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: Hidden,
    gramian: bool,
) -> TaskLosses:
    """Every row through every head."""
    layout = heads.layout
    own = layout.with_callable
    if not own:
        return TaskLosses(layout.names, *_fused(x, weights, biases, y, layout, hidden, gramian))
    labels = dict(zip(layout.names, split_labels(y, layout, x), strict=True))
    for name, part in labels.items():
        if layout.tasks[name].loss is None and part is not None:  # a column of a matrix
            check_values(name, layout.tasks[name], part)
            labels[name] = None
    values, counts, gradients = {}, {}, []
    for name in own:
        out = output_of(heads, name, x, weights, biases, hidden)
        values[name], counts[name] = _callable_loss(name, layout.tasks[name], out, labels[name])
        if gramian:
            gradients.append(_gradient_at(name, layout.tasks[name], out, labels[name], values[name]))
        labels[name] = None
    return _with_callables(
        layout, _fused(x, weights, biases, labels, layout, hidden, gramian, gradients), values, counts
    )


def losses_of_one(
    heads: MultiTaskHeads,
    task: str | int,
    x: Tensor,
    y: Labels,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: Hidden,
    gramian: bool,
) -> TaskLosses:
    """Every row through one head; the other tasks' losses are 0. ``y`` holds this task's labels alone."""
    layout = heads.layout
    name = layout.name(task)
    if layout.tasks[name].loss is None:
        raise ValueError(f"task: expected one with a loss, got {name!r}, which has none.")
    place, single = layout.names.index(name), layout.only(name)
    labels = {name: y} if isinstance(y, Tensor) else y
    own = of_task(heads, name, weights, biases, hidden)
    if single.with_callable:
        (part,) = split_labels(labels, single, x)
        out = output_of(heads, name, x, weights, biases, hidden)
        value, count = _callable_loss(name, layout.tasks[name], out, part)
        gradients = [_gradient_at(name, layout.tasks[name], out, part, value)] if gramian else []
        fused = _fused(x, own[0], own[1], {name: None}, single, own[2], gramian, gradients)
        losses = _with_callables(single, fused, {name: value}, {name: count})
    else:
        losses = TaskLosses(single.names, *_fused(x, own[0], own[1], labels, single, own[2], gramian))
    around = (place, len(layout.names) - 1 - place)
    return TaskLosses(
        layout.names,
        F.pad(losses.per_task, around),
        losses.total,
        F.pad(losses.count, around),
        None if losses.gramian is None else F.pad(losses.gramian, around * 2),
    )


def losses_of_routed(
    heads: MultiTaskHeads,
    task: Tensor,
    x: Tensor,
    y: Labels,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: Hidden,
    gramian: bool,
) -> TaskLosses:
    """Each row through the head of its own task; the work is proportional to the rows."""
    layout = heads.layout
    own = layout.with_callable
    if any(t.loss is None for t in layout.tasks.values()) or (own and isinstance(y, Tensor)):
        check_floating("x", x, 2, "[N, {}]", weights[0], 1)
        check_route(task, x)
        check_route_values(task, len(layout.names))
        check_routed_labels(y, x, layout)
        if not torch.compiler.is_compiling() and has_values(task) and has_values(y):  # type: ignore[arg-type]
            check_routed_tasks(task, y, layout)  # type: ignore[arg-type]
    fused = multi_head_mlp_loss(x, weights, biases, y, layout, hidden, task, gramian)
    if not own:
        return TaskLosses(layout.names, *fused)
    assert isinstance(y, Tensor)
    values, counts, squares = {}, {}, {}
    for name in own:
        rows = (task == layout.names.index(name)).nonzero()[:, 0]
        # Of a matrix, the columns that a row of this task has.
        labels = y[rows] if y.dim() == 1 else y[rows, : layout.tasks[name].out_channels]
        out = _routed_output(heads, name, x, task, rows, weights, biases, hidden)
        values[name], counts[name] = _callable_loss(name, layout.tasks[name], out, labels)
        if gramian:
            squares[name] = _square_at(heads, name, x, task, rows, labels, weights, biases, hidden)
    losses = _with_callables(layout, fused, values, counts)
    if losses.gramian is not None:
        for name, square in squares.items():
            place = layout.names.index(name)
            losses.gramian[place, place] = square
    return losses


def _fused(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    y: Labels,
    layout: TaskLayout,
    hidden: Hidden,
    gramian: bool,
    outside: Sequence[Tensor] = (),
) -> Losses:
    if len(weights) == 1:
        return multi_head_loss(x, weights[0], biases[0] if biases else None, y, layout, gramian, outside)
    return multi_head_mlp_loss(x, weights, biases, y, layout, hidden, None, gramian, outside)


def _with_callables(
    layout: TaskLayout, fused: Losses, values: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> TaskLosses:
    """The losses of the fused tasks, and those of the others beside them."""
    per_task, total, count, product = fused
    place = torch.tensor([layout.names.index(name) for name in values], device=per_task.device)
    stacked = torch.stack(list(values.values())).to(per_task.dtype)
    weights = stacked.new_tensor([layout.tasks[name].weight for name in values])
    return TaskLosses(
        layout.names,
        per_task.index_add(0, place, stacked),
        total + (weights * stacked).sum(),
        count.index_add(0, place, torch.stack(list(counts.values()))),
        product,
    )


def _callable_loss(name: str, task: Task, out: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """A loss in plain PyTorch, over the rows that have all their labels."""
    zero = out[:0].sum()
    if y is None:
        return zero, torch.zeros((), dtype=torch.int64, device=out.device)
    present = labelled(task, y)
    rows = present if present.dim() == 1 else present.flatten(1).all(1)
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


def _routed_output(
    heads: MultiTaskHeads,
    name: str,
    x: Tensor,
    task: Tensor,
    rows: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: Hidden,
) -> Tensor:
    """``[rows, C_t]`` of the rows of one task; dropout's masks are those of their places among all rows."""
    if hidden.seed is None:
        return output_of(heads, name, x[rows], weights, biases, hidden)
    out = multi_head_mlp(x, weights, biases, heads.layout, hidden, task)
    return out[rows, : heads.tasks[name].out_channels]


def _square_at(
    heads: MultiTaskHeads,
    name: str,
    x: Tensor,
    task: Tensor,
    rows: Tensor,
    y: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    hidden: Hidden,
) -> Tensor:
    """The squared norm of a callable loss's gradient at the embedding of its own rows."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        w, b = [w.detach() for w in weights], [b.detach() for b in biases]
        out = _routed_output(heads, name, x, task, rows, w, b, hidden)
        value, _ = _callable_loss(name, heads.tasks[name], out, y)
        if not value.requires_grad:
            return value.new_zeros(())
        (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    return value.new_zeros(()) if gradient is None else reference.wide(gradient).square().sum()
