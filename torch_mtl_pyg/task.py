"""Tasks, how the heads of several tasks lie side by side in packed tensors, and the losses of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

LEVELS = ("node", "edge", "graph")
LOSSES = ("cross_entropy", "bce", "mse", "l1", "huber", "poisson_nll", "gaussian_nll")

# Which loss an option belongs to, and its default.
_OPTIONS: dict[str, tuple[str, Any]] = {
    "class_weight": ("cross_entropy", None),
    "label_smoothing": ("cross_entropy", 0.0),
    "ignore_index": ("cross_entropy", -100),
    "pos_weight": ("bce", None),
    "delta": ("huber", 1.0),
}


@dataclass(frozen=True)
class Task:
    r"""One task: the width of its head, and how its predictions are scored.

    Args:
        out_channels: Columns of the task's output, at least 1. ``"gaussian_nll"`` takes two per target: with ``m``
            targets, ``m`` means, then ``m`` logarithms of variances (Kendall & Gal 2017, arXiv:1703.04977).
        loss: ``"cross_entropy"``, ``"bce"`` (with logits), ``"mse"``, ``"l1"``, ``"huber"``, ``"poisson_nll"``,
            ``"gaussian_nll"``, a callable ``loss(output, target) -> Tensor``, or None: outputs only.
        weight: Factor of this task's loss in a total, finite and not negative.
        class_weight: (cross_entropy) one weight per class.
        label_smoothing: (cross_entropy) in :math:`[0, 1]`.
        ignore_index: (cross_entropy) the label that stands for "missing".
        pos_weight: (bce) factor of the positive labels: one number, or one per column.
        delta: (huber) where the square turns into a line, greater than 0.
        level: What :class:`~torch_mtl_pyg.MultiTaskModel` predicts for: ``"node"``, ``"edge"`` (pairs of nodes in
            ``data.edge_label_index``), ``"graph"``, or None: graphs where the data is a batch of graphs and the model
            pools, else nodes.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A value is out of range, the loss is unknown, or an option belongs to another loss.
    """

    out_channels: int
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None
    weight: float = 1.0
    class_weight: Sequence[float] | Tensor | None = field(default=None, kw_only=True)
    label_smoothing: float = field(default=0.0, kw_only=True)
    ignore_index: int = field(default=-100, kw_only=True)
    pos_weight: float | Sequence[float] | Tensor | None = field(default=None, kw_only=True)
    delta: float = field(default=1.0, kw_only=True)
    level: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        width = checked_integer("out_channels", self.out_channels)
        if width < 1:
            raise ValueError(f"out_channels: expected at least 1, got {width}.")
        object.__setattr__(self, "out_channels", width)
        if isinstance(self.loss, str):
            if self.loss not in LOSSES:
                raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, a callable or None, got {self.loss!r}.")
        elif self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss: expected a string, a callable or None, got {type(self.loss).__name__}.")
        if self.loss == "gaussian_nll" and width % 2:
            raise ValueError(f"out_channels: gaussian_nll expects two per target, an even number, got {width}.")
        if self.level is not None and not isinstance(self.level, str):
            raise TypeError(f"level: expected a string or None, got {type(self.level).__name__}.")
        if self.level is not None and self.level not in LEVELS:
            raise ValueError(f"level: expected one of {', '.join(LEVELS)}, or None, got {self.level!r}.")
        object.__setattr__(self, "weight", _number("weight", self.weight, low=0.0))
        for name, (loss, default) in _OPTIONS.items():
            value = getattr(self, name)
            given = value is not default and not (isinstance(value, (int, float)) and value == default)
            if given and self.loss != loss:
                raise ValueError(f"{name}: is an option of the loss {loss!r}, got it for {self.loss!r}.")
        object.__setattr__(self, "label_smoothing", _number("label_smoothing", self.label_smoothing, 0.0, 1.0))
        object.__setattr__(self, "ignore_index", checked_integer("ignore_index", self.ignore_index))
        delta = _number("delta", self.delta, low=0.0)
        if delta == 0.0:
            raise ValueError("delta: expected more than 0, got 0.")
        object.__setattr__(self, "delta", delta)
        if self.class_weight is not None:
            object.__setattr__(self, "class_weight", _numbers("class_weight", self.class_weight, width))
        if self.pos_weight is not None:
            several = isinstance(self.pos_weight, Sequence) or getattr(self.pos_weight, "ndim", 0) > 0
            checked: Any = _numbers if several else _number
            bound: Any = width if several else 0.0
            object.__setattr__(self, "pos_weight", checked("pos_weight", self.pos_weight, bound))


class TaskLayout:
    """Names, tasks and column ranges of heads packed side by side.

    Attributes:
        tasks: Name to :class:`Task`, in packing order, read-only.
        names: The names, in packing order.
        widths: Columns per task, ``C_t``.
        slices: Name to its column slice, read-only.
        total: Sum of the widths, ``K``.
        has_loss: Whether any task has a loss.
        with_callable: The names of the tasks whose loss is a callable.

    Args:
        tasks: Name to :class:`Task`, or to the width alone.
        argument: What the messages call it.

    Raises:
        TypeError: ``tasks`` is no mapping, or holds a name that is no string or a value that is neither Task nor int.
        ValueError: ``tasks`` is empty, or holds an empty name or a width below 1.
    """

    def __init__(self, tasks: Mapping[str, Task | int], argument: str = "tasks") -> None:
        if not isinstance(tasks, Mapping):
            raise TypeError(f"{argument}: expected a dict from name to Task or int, got {type(tasks).__name__}.")
        if not tasks:
            raise ValueError(f"{argument}: expected at least one task, got an empty dict.")
        self.tasks: Mapping[str, Task] = MappingProxyType(
            {name: as_task(name, task, argument) for name, task in tasks.items()}
        )
        self.names = tuple(self.tasks)
        self.widths = tuple(task.out_channels for task in self.tasks.values())
        self.total = sum(self.widths)
        self.has_loss = any(task.loss is not None for task in self.tasks.values())
        self.with_callable = tuple(name for name, task in self.tasks.items() if callable(task.loss))
        ends = [0]
        for width in self.widths:
            ends.append(ends[-1] + width)
        self.offsets = tuple(ends[:-1])
        self.slices: Mapping[str, slice] = MappingProxyType(
            {name: slice(ends[i], ends[i + 1]) for i, name in enumerate(self.names)}
        )

    def __reduce__(self) -> tuple[type[TaskLayout], tuple[dict[str, Task]]]:
        """Pickled and copied by its tasks: read-only mappings cannot be."""
        return TaskLayout, (dict(self.tasks),)

    def only(self, name: str) -> TaskLayout:
        """The layout of one of the tasks alone, made at its first use."""
        if torch.compiler.is_compiling():  # which may not change what lives longer
            return TaskLayout({name: self.tasks[name]})
        single: dict[str, TaskLayout] = self.__dict__.setdefault("_only", {})
        if name not in single:
            single[name] = TaskLayout({name: self.tasks[name]})
        return single[name]

    def name(self, task: str | int, argument: str = "task") -> str:
        """The name of a task given by name or by index; ``argument`` is what the messages call it.

        Raises:
            TypeError: ``task`` is neither a string nor an integer.
            ValueError: There is no task of this name.
            IndexError: The index is not in ``[0, T)``.
        """
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"{argument}: expected one of {', '.join(map(repr, self.names))}, got {task!r}.")
            return task
        index = checked_integer(argument, task)
        if not 0 <= index < len(self.names):
            raise IndexError(f"{argument}: expected an index in [0, {len(self.names)}), got {index}.")
        return self.names[index]

    def describe(self) -> list[tuple[str, int]]:
        """Names and widths in packing order, as plain data."""
        return list(zip(self.names, self.widths, strict=True))


class TaskLosses:
    r"""The losses of all tasks over one batch.

    A task's loss is the mean over its labelled entries, and 0 with zero gradient where there are none.
    ``losses["name"]`` or ``losses[0]`` is one of them.

    Attributes:
        names: Names of the ``T`` tasks, in packing order.
        per_task: ``[T]``, differentiable, not multiplied by the tasks' weights. float64 for a float64 embedding, else
            float32.
        total: Scalar, differentiable: :math:`\sum_t w_t L_t` with the tasks' weights.
        count: ``[T]`` int64: how many labels counted.
        gramian: ``[T, T]``, :math:`G_{ij} = \langle \partial L_i / \partial X, \partial L_j / \partial X \rangle` for
            the shared embedding ``X``, not differentiable; None unless asked for.
    """

    __slots__ = ("count", "gramian", "names", "per_task", "total")

    def __init__(
        self, names: tuple[str, ...], per_task: Tensor, total: Tensor, count: Tensor, gramian: Tensor | None = None
    ) -> None:
        self.names = names
        self.per_task = per_task
        self.total = total
        self.count = count
        self.gramian = gramian

    def __getitem__(self, task: str | int) -> Tensor:
        """The loss of one task, by name or by index.

        Raises:
            KeyError: There is no task of this name.
            IndexError: The index is not in ``[0, T)``.
        """
        if isinstance(task, str):
            if task not in self.names:
                raise KeyError(f"task: expected one of {', '.join(map(repr, self.names))}, got {task!r}.")
            return self.per_task[self.names.index(task)]
        index = checked_integer("task", task)
        if not 0 <= index < len(self.names):
            raise IndexError(f"task: expected an index in [0, {len(self.names)}), got {index}.")
        return self.per_task[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def keys(self) -> tuple[str, ...]:
        """The names; with ``[]``, what ``dict(losses)`` needs."""
        return self.names

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and loss of each task."""
        return zip(self.names, self.per_task.unbind(), strict=True)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}: {loss:.4g} ({count})"
            for name, loss, count in zip(self.names, self.per_task.tolist(), self.count.tolist(), strict=True)
        )
        return f"TaskLosses(total={self.total.item():.4g}, {{{shown}}})"


def as_task(name: object, task: Task | int, argument: str = "tasks") -> Task:
    """Checks a task's name, and turns a bare width into a :class:`Task`; ``argument`` is what the messages call it."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected names that are strings, got {name!r}.")
    if not name:
        raise ValueError(f"{argument}: expected names that are not empty, got ''.")
    if isinstance(task, Task):
        return task
    try:
        return Task(task)
    except TypeError as error:
        raise TypeError(f"{argument}[{name!r}]: expected a Task or an int, got {type(task).__name__}.") from error
    except ValueError as error:
        raise ValueError(f"{argument}[{name!r}]: {error}") from error


def checked_integer(name: str, value: object) -> int:
    """An integer of any kind (also NumPy's), but no bool."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}.")
    try:
        return int(value.__index__())
    except TypeError as error:  # an array of more than one
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}.") from error


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}.")
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name}: expected a real number, got dtype {value.dtype}.")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of at least {low:g}"
        raise ValueError(f"{name}: expected a finite number {wanted}, got {number}.")
    return number


def _numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    unordered = isinstance(values, (str, Mapping, Set))  # which a loop would take for the names, or in any order
    if unordered or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{name}: expected {count} numbers, one per column, got {type(values).__name__}.")
    if isinstance(values, Tensor):
        values = values.detach().flatten().unbind()
    numbers = tuple(_number(name, value, low=0.0) for value in values)
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} numbers, one per column, got {len(numbers)}.")
    return numbers
