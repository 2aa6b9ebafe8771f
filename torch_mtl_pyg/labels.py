"""Labels of several tasks: one matrix or a dict, with labels missing; checked, and split by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .task import Task, TaskLayout

# What stands for a missing label where NaN cannot: in integer labels, and in float labels of classes.
MISSING = -100

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
INTEGER = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
DTYPES = FLOATING | INTEGER | {torch.bool}


class LabelError(ValueError, IndexError):
    """A label that its task cannot have. For classes it is an index out of range, as PyTorch calls it."""


def label_columns(task: Task) -> int | None:
    """How many labels a row has: one class, or one number per output (per pair of outputs for ``gaussian_nll``).

    None for a callable loss, which may take any.
    """
    if task.loss == "cross_entropy":
        return 1
    if callable(task.loss):
        return None
    return task.out_channels // 2 if task.loss == "gaussian_nll" else task.out_channels


def missing_value(task: Task, dtype: torch.dtype) -> int | None:
    """The number that stands for a missing label besides NaN, or None."""
    if task.loss == "cross_entropy":
        value = task.ignore_index
    elif dtype in INTEGER or task.loss == "bce":
        value = MISSING
    else:
        return None
    if dtype == torch.bool:
        return value if task.loss == "cross_entropy" and value in (0, 1) else None
    # uint8 holds no -100; a comparison would wrap it to 156.
    return None if dtype in INTEGER and not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max else value


def labelled(task: Task, labels: Tensor) -> Tensor:
    """Where a label is present: bool, of the shape of ``labels``."""
    missing = missing_value(task, labels.dtype)
    if labels.dtype in FLOATING:
        present = ~torch.isnan(labels)
        return present if missing is None else present & (labels != missing)
    if labels.dtype == torch.bool and missing is not None:
        return labels if missing == 0 else ~labels
    return labels != missing if missing is not None else torch.ones_like(labels, dtype=torch.bool)


def split_labels(y: Mapping[str, Tensor | None] | Tensor, layout: TaskLayout, x: Tensor) -> list[Tensor | None]:
    """The labels of each task in packing order, checked in shape, dtype and device but not in value.

    Args:
        y: A matrix ``[N, T]``, one column per task; or a dict from name to ``[N]`` (one label a row), ``[N, C_t]``
            (``[N, C_t / 2]`` for ``gaussian_nll``), or None: no labels of this task.
        layout: The tasks.
        x: The embedding ``[N, D]`` they belong to: its rows and its device.

    Returns:
        ``[N]`` or ``[N, C_t]`` for each task with labels; None for a task without labels or without loss.

    Raises:
        TypeError: ``y`` is neither, or some labels have a dtype that labels cannot have.
        ValueError: A shape or a device does not fit, a task of several columns meets a matrix, or a dict holds an
            unknown name, lacks one, or has labels for a task that has no loss.
    """
    if isinstance(y, Tensor):
        return _split_matrix(y, layout, x)
    if not isinstance(y, Mapping):
        raise TypeError(f"y: expected a dict from task to labels or a matrix [N, T], got {type(y).__name__}.")
    for name in y:
        layout.name(name, "y")
    parts: list[Tensor | None] = []
    for name, task in layout.tasks.items():
        if name not in y:
            if task.loss is not None:
                raise ValueError(f"y: expected labels of the task {name!r} (None if there are none), got no such key.")
            parts.append(None)
            continue
        part = y[name]
        if part is not None:
            _check_part(name, task, part, x)
        parts.append(part)
    return parts


def check_values(name: str, task: Task, labels: Tensor) -> None:
    """Checks that each label is one the task can have.

    Raises:
        LabelError: A class is not in ``[0, C)``, a binary label not in ``[0, 1]``, a count negative, or a number
            infinite. The message names the task, the value and its row. In a compiled function, where values are not
            known, the error is PyTorch's assertion, at run time.
        ValueError: The task has no loss, and yet labels.
    """
    compiling = torch.compiler.is_compiling()
    present = labelled(task, labels)
    if task.loss is None:
        message = f"y[{name!r}]: expected no labels, since the task has no loss, got some."
        if compiling:
            torch._assert_async(~present.any(), message)
        elif bool(present.any()):
            raise ValueError(message)
        return
    if callable(task.loss):
        return
    if task.loss == "cross_entropy":
        wrong = (labels < 0) | (labels >= task.out_channels)
        # While compiling, numbers may be symbols, which no message can hold.
        wanted = "classes that the task has" if compiling else f"classes in [0, {task.out_channels})"
        if labels.dtype in FLOATING:
            wrong = wrong | (labels != labels.trunc())
    elif task.loss == "bce":
        wrong, wanted = (labels < 0) | (labels > 1), "labels in [0, 1]"
    elif labels.dtype not in FLOATING:
        if task.loss != "poisson_nll":
            return
        wrong, wanted = labels < 0, "counts of at least 0"
    elif task.loss == "poisson_nll":
        wrong, wanted = (labels < 0) | labels.isinf(), "finite counts of at least 0"
    else:
        wrong, wanted = labels.isinf(), "finite numbers"
    wrong = wrong & present
    if compiling:
        torch._assert_async(~wrong.any(), f"y[{name!r}]: expected {wanted}.")
        return
    number = None if labels.dtype == torch.bool else missing_value(task, labels.dtype)
    signs = [str(number)] if number is not None else []
    if labels.dtype in FLOATING:
        signs.append("NaN")
    if signs:
        wanted += f"{',' if len(signs) > 1 else ' or'} {' or '.join(signs)} for a missing one"
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        value = labels[tuple(place)].item()
        where = f"row {place[0]}" + (f", column {place[1]}" if len(place) > 1 and labels.shape[1] > 1 else "")
        raise LabelError(f"y[{name!r}]: expected {wanted}, got {value} in {where}.")


def _split_matrix(y: Tensor, layout: TaskLayout, x: Tensor) -> list[Tensor | None]:
    names = layout.names
    if y.layout is not torch.strided or y.dtype not in DTYPES:
        raise TypeError(f"y: expected a dense matrix of numbers, got {_describe(y)}.")
    if y.dim() != 2 or y.shape[0] != x.shape[0] or y.shape[1] != len(names):
        raise ValueError(f"y: expected shape [{x.shape[0]}, {len(names)}], one column per task, got {list(y.shape)}.")
    if y.device != x.device:
        raise ValueError(f"y: expected the device of x, {x.device}, got {y.device}.")
    if y.requires_grad:
        raise ValueError("y: expected labels that need no gradient, got one that does; detach it.")
    for name, task in layout.tasks.items():
        columns = label_columns(task)
        if task.loss is not None and columns is not None and columns > 1:
            raise ValueError(f"y: expected a dict, since the task {name!r} has {columns} labels a row, got a matrix.")
    return list(y.unbind(1))


def _check_part(name: str, task: Task, part: Any, x: Tensor) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"y[{name!r}]: expected a tensor or None, got {type(part).__name__}.")
    if part.layout is not torch.strided or part.dtype not in DTYPES:
        raise TypeError(f"y[{name!r}]: expected dense labels that are numbers, got {_describe(part)}.")
    if task.loss is None:
        raise ValueError(f"y[{name!r}]: expected no labels, since the task has no loss, got some.")
    columns, n = label_columns(task), x.shape[0]
    shape = tuple(part.shape)
    if columns is None:
        if not shape or shape[0] != n:
            raise ValueError(f"y[{name!r}]: expected shape [{n}, ...], got {list(shape)}.")
    elif shape != (n, columns) and not (columns == 1 and shape == (n,)):
        wanted = f"[{n}] or [{n}, 1]" if columns == 1 else f"[{n}, {columns}]"
        hint = ", one class per row" if task.loss == "cross_entropy" else ""
        raise ValueError(f"y[{name!r}]: expected shape {wanted}{hint}, got {list(shape)}.")
    if part.requires_grad and not callable(task.loss):
        raise ValueError(f"y[{name!r}]: expected labels that need no gradient, got one that does; detach it.")
    if part.device != x.device:
        raise ValueError(f"y[{name!r}]: expected the device of x, {x.device}, got {part.device}.")


def _describe(t: Tensor) -> str:
    return f"dtype {t.dtype}" if t.layout is torch.strided else f"layout {t.layout}"
