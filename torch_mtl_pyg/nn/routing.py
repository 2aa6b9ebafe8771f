"""Rows routed to the head of their own task."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.multi_head_linear import multi_head_linear
from ..task import TaskLayout


def check_routes(task: Tensor, x: Tensor, layout: TaskLayout) -> None:
    """Checks the index of each row.

    Raises:
        TypeError: ``task`` is not int64.
        ValueError: ``task`` is not ``[N]``, or not on the device of ``x``.
        IndexError: An index is not in ``[0, T)``. In a compiled function, where values are not known, the error is
            PyTorch's assertion, at run time.
    """
    if task.dtype != torch.int64:
        raise TypeError(f"task: expected int64 indices, got {task.dtype}.")
    if task.dim() != 1 or task.shape[0] != x.shape[0]:
        raise ValueError(f"task: expected shape [{x.shape[0]}], one index per row of x, got {list(task.shape)}.")
    if task.device != x.device:
        raise ValueError(f"task: expected the device of x, {x.device}, got {task.device}.")
    count = len(layout.names)
    outside = (task < 0) | (task >= count)
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"task: expected indices in [0, {count})")
    elif task.device.type != "meta" and bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise IndexError(f"task: expected indices in [0, {count}), got {int(task[row])} in row {row}.")


def route(x: Tensor, task: Tensor, weight: Tensor, bias: Tensor | None, layout: TaskLayout) -> Tensor:
    """Each row through its own head: ``[N, max C_t]``, zero where the row's head has no column.

    Eagerly, the rows of each task that occurs are multiplied with its head alone. The number of rows of a task is a
    value, which a compiled graph cannot depend on: there, all heads are computed and each row's columns picked.
    """
    width = max(layout.widths)
    if torch.compiler.is_compiling() or x.device.type == "meta":
        offsets = torch.tensor(layout.offsets, device=x.device)
        widths = torch.tensor(layout.widths, device=x.device)
        packed = multi_head_linear(x, weight, bias)
        column = torch.arange(width, device=x.device)
        valid = column < widths[task].unsqueeze(1)
        index = torch.where(valid, offsets[task].unsqueeze(1) + column, 0)
        return packed.gather(1, index).masked_fill(~valid, 0.0)
    order = torch.argsort(task, stable=True)
    counts = torch.bincount(task, minlength=len(layout.names)).tolist()
    parts = []
    begin = 0
    for name, count in zip(layout.names, counts, strict=True):
        if count:
            rows = layout.slices[name]
            own = x[order[begin : begin + count]]
            out = multi_head_linear(own, weight[rows], None if bias is None else bias[rows])
            parts.append(F.pad(out, (0, width - out.shape[1])))
            begin += count
    if not parts:
        return multi_head_linear(x, weight, bias)[:, :width]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return torch.cat(parts)[place]
