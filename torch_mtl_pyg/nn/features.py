"""Node features as a layer's input: one matrix for all tasks, or one for each, side by side in one buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._checks import check_floating, check_same
from ..ops._dispatch import is_batched, transformed
from ..task import TaskLayout, checked_integer

Channels = int | dict[str, int]
Input = Tensor | Mapping[str, Tensor]


class Features(NamedTuple):
    """Features of all nodes.

    Attributes:
        packed: ``[N, F]``, or ``[N, sum F_t]`` where every task has its own.
        widths: ``F_t`` of each task in packing order, or None: all tasks read all columns.
    """

    packed: Tensor
    widths: tuple[int, ...] | None


def checked_channels(name: str, channels: object, layout: TaskLayout) -> Channels:
    """A number of input channels: an int of at least 1, or -1; or a dict from each task to an int of at least 1.

    Raises:
        TypeError: It is neither.
        ValueError: It is out of range, or the dict has other names than the tasks.
    """
    if not isinstance(channels, Mapping):
        width = checked_integer(name, channels)
        if width < 1 and width != -1:
            raise ValueError(f"{name}: expected at least 1, or -1 (known at the first call), got {width}.")
        return width
    check_names(name, channels, layout)
    widths = {task: checked_integer(f"{name}[{task!r}]", channels[task]) for task in layout.names}
    for task, width in widths.items():
        if width < 1:
            raise ValueError(f"{name}[{task!r}]: expected at least 1, got {width}.")
    return widths


def check_names(name: str, given: Mapping[str, Any], layout: TaskLayout) -> None:
    """Checks that a dict has exactly the tasks as its keys, in any order.

    Raises:
        ValueError: A task is missing, or a key is no task.
    """
    if given.keys() != layout.slices.keys():
        raise ValueError(f"{name}: expected the tasks {', '.join(map(repr, layout.names))}, got {list(given)}.")


def read_features(name: str, x: Any, channels: Channels, layout: TaskLayout) -> Features:
    """Reads ``x`` in any of its forms.

    Args:
        name: What the messages call it.
        x: ``[N, F]`` for all tasks; or each task's own: ``[N, T, F]``, a dict from task to ``[N, F_t]``, or, where
            ``channels`` is a dict, ``[N, sum F_t]``. Where a dict holds the columns of one matrix in packing order,
            nothing is copied.
        channels: ``F``, -1 for any, or ``F_t`` of each task.
        layout: The tasks.

    Raises:
        TypeError: ``x`` has none of these forms, or holds no floating-point numbers.
        ValueError: A shape, device or name does not fit.
    """
    expected = tuple(channels.values()) if isinstance(channels, dict) else (channels,) * len(layout.names)
    if isinstance(x, Mapping):
        check_names(name, x, layout)
        parts = [x[task] for task in layout.names]
        widths = _checked_parts(name, parts, expected, layout)
        return Features(joined(parts), widths)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor or a dict from task to tensor, got {type(x).__name__}.")
    if x.dim() == 3:
        check_floating(name, x, 3, "[N, T, F]")
        n, tasks, width = x.shape
        if tasks != len(layout.names) or any(w != -1 and w != width for w in expected):
            raise ValueError(f"{name}: expected shape {_shape(channels, layout)}, got {list(x.shape)}.")
        return Features(x.reshape(n, tasks * width), (width,) * tasks)
    check_floating(name, x, 2, _shape(channels, layout))
    total = sum(expected) if isinstance(channels, dict) else channels
    # Compared one by one: `in` does not see through symbolic sizes.
    if total != -1 and total != x.shape[1]:
        raise ValueError(f"{name}: expected shape {_shape(channels, layout)}, got {list(x.shape)}.")
    return Features(x, expected if isinstance(channels, dict) else None)


def _shape(channels: Channels, layout: TaskLayout) -> str:
    t = len(layout.names)
    if isinstance(channels, int):
        width = "F" if channels == -1 else channels
        return f"[N, {width}] (or [N, {t}, {width}], a matrix per task)"
    equal = len(set(channels.values())) == 1
    per_task = f" or [N, {t}, {next(iter(channels.values()))}]" if equal else ""
    return f"[N, {sum(channels.values())}], the tasks' {list(channels.values())} side by side{per_task}"


def _checked_parts(name: str, parts: Sequence[Any], expected: Sequence[int], layout: TaskLayout) -> tuple[int, ...]:
    first_name = f"{name}[{layout.names[0]!r}]"
    first: Tensor = parts[0]
    for task, part, width in zip(layout.names, parts, expected, strict=True):
        own = f"{name}[{task!r}]"
        check_floating(own, part, 2, "[N, F]" if width == -1 else f"[N, {width}]")
        if width == -1:
            width = first.shape[1]
        if part.shape != (first.shape[0], width):
            raise ValueError(f"{own}: expected shape [{first.shape[0]}, {width}], got {list(part.shape)}.")
        check_same(own, part, first_name, first)
    return tuple(part.shape[1] for part in parts)


def num_rows(name: str, x: Any) -> int:
    """The number of nodes of features in any form.

    Raises:
        TypeError: ``x`` has none of the forms.
    """
    one = next(iter(x.values()), None) if isinstance(x, Mapping) else x
    if not isinstance(one, Tensor) or one.dim() == 0:
        raise TypeError(f"{name}: expected a tensor or a dict from task to tensor, got {type(x).__name__}.")
    return one.shape[0]


# ---- One matrix from columns, without a copy where they lie in one already.


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat(parts, dim=1)``, but a view where the parts lie side by side in one buffer."""
    if len(parts) == 1:
        return parts[0]
    if torch.compiler.is_compiling() or transformed() or any(map(is_batched, parts)) or not _side_by_side(parts):
        return torch.cat(tuple(parts), dim=1)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        result: Tensor = _Joined.apply(*parts)  # type: ignore[no-untyped-call]
        return result
    return _view_of_all(parts)


def _side_by_side(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    if type(first) not in (Tensor, torch.nn.Parameter) or first.layout is not torch.strided or first.shape[0] == 0:
        return False
    total = sum(part.shape[1] for part in parts)
    stride = first.stride(0)
    if stride < total and first.shape[0] > 1:
        return False
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        same = part.dtype == first.dtype and part.stride(0) == stride and (part.shape[1] == 1 or part.stride(1) == 1)
        if not same or part.storage_offset() != offset or part.untyped_storage().data_ptr() != storage:
            return False
        offset += part.shape[1]
    return True


def _view_of_all(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0].detach()
    total = sum(part.shape[1] for part in parts)
    return first.as_strided((first.shape[0], total), (first.stride(0), 1))


class _Joined(torch.autograd.Function):
    """The gradient of each part is its columns of the whole's; so for derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return _view_of_all(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(grad, ctx.widths, 1)
