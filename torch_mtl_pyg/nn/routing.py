"""Rows routed to the head of their own task."""

from __future__ import annotations

import torch
from torch import Tensor

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
    if torch.compiler.is_compiling() or task.is_cuda:
        torch._assert_async(~outside.any(), f"task: expected indices in [0, {count})")
    elif task.device.type != "meta" and bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise IndexError(f"task: expected indices in [0, {count}), got {int(task[row])} in row {row}.")


def route(packed: Tensor, task: Tensor, offsets: Tensor, widths: Tensor, width: int) -> Tensor:
    """Picks each row's own columns: ``packed [N, K]`` to ``[N, width]``, zero where the row's head has no column."""
    column = torch.arange(width, device=packed.device)
    valid = column < widths[task].unsqueeze(1)
    index = torch.where(valid, offsets[task].unsqueeze(1) + column, 0)
    return packed.gather(1, index).masked_fill(~valid, 0.0)
