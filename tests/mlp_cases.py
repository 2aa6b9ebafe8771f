"""Heads with hidden layers, and rows routed to one head each, for the tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from loss_cases import TASKS, labels_of
from torch import Tensor

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import label_columns
from torch_mtl_pyg.ops import Hidden
from torch_mtl_pyg.task import TaskLayout

ACTS = ("relu", "gelu", "silu", "tanh", "elu")
HIDDEN: tuple[tuple[int, ...], ...] = ((1,), (5,), (64,), (33, 7), (16, 8, 4))
# One task, many, all widths equal, ragged.
ONE = {"only": mtl.Task(1, loss="bce")}
EQUAL = {f"t{i}": mtl.Task(2, loss="cross_entropy") for i in range(6)}
RAGGED = {f"t{i}": mtl.Task(1 + i * 7 % 19, loss="cross_entropy") for i in range(9)}
FEW = {name: TASKS[name] for name in ("classes", "toxic", "mse", "gaussian")}
# Every loss and option but l1, whose gradient jumps: a rounded logit may fall on either side.
SMOOTH = {name: task for name, task in TASKS.items() if task.loss != "l1"}
# One label a row, and all have a loss: what a vector [N] of routed labels can hold.
SINGLE = {
    "classes": mtl.Task(7, loss="cross_entropy"),
    "toxic": mtl.Task(1, loss="bce", pos_weight=3.0, weight=2.0),
    "degree": mtl.Task(1, loss="mse", weight=0.5),
    "gauss": mtl.Task(2, loss="gaussian_nll"),
    "smooth": mtl.Task(3, loss="cross_entropy", label_smoothing=0.2, class_weight=[1.0, 0.0, 2.0]),
}
LOSSES_ONLY = {name: task for name, task in TASKS.items() if task.loss is not None}


@dataclass
class Problem:
    x: Tensor
    weights: list[Tensor]  # packed, layer by layer
    biases: list[Tensor]  # or empty
    tasks: dict[str, mtl.Task]
    labels: Any = None  # by task; routed: [N] or [N, W]
    hidden: Hidden = Hidden()  # noqa: RUF009 (immutable)
    route: Tensor | None = None

    @cached_property
    def layout(self) -> TaskLayout:
        return TaskLayout(self.tasks)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *self.weights, *self.biases]

    def but(self, **changed: Any) -> Problem:
        """The same with some of it changed."""
        return replace(self, **changed)


def problem(
    n: int,
    d: int,
    dtype: torch.dtype,
    tasks: dict[str, mtl.Task] = TASKS,
    hidden: Sequence[int] = (16,),
    act: str = "relu",
    bias: bool = True,
    dropout: float = 0.0,
    route: str | None = None,
    share: float = 0.3,
    kind: str = "natural",
    scale: float = 1.0,
) -> Problem:
    """Random inputs; with ``route``, one of :func:`route_of`'s, every row belongs to one task."""
    weights, biases, before = [], [], d
    rows = [len(tasks) * width for width in hidden] + [sum(task.out_channels for task in tasks.values())]
    for layer, k in enumerate(rows):
        weights.append((torch.randn(k, before) * 1.4 / max(before, 1) ** 0.5).to(dtype))
        if bias:
            biases.append((torch.randn(k) / 2).to(dtype))
        before = hidden[layer] if layer < len(hidden) else 0
    x = (torch.randn(n, d) * scale).to(dtype)
    options = Hidden(act, dropout, torch.tensor([123456789, 0]) if dropout else None)
    if route is None:
        labels: Any = {name: labels_of(task, n, share, kind) for name, task in tasks.items()}
        return Problem(x, weights, biases, tasks, labels, options)
    index = route_of(route, n, tasks)
    return Problem(x, weights, biases, tasks, routed_labels(index, tasks, share), options, index)


def route_of(kind: str, n: int, tasks: dict[str, mtl.Task]) -> Tensor:
    """The task of each row: random, sorted, reversed, constant, or some of the tasks only."""
    index = torch.randint(0, len(tasks), (n,))
    if kind == "sorted":
        return index.sort().values
    if kind == "reversed":
        return index.sort(descending=True).values
    if kind == "constant":
        return torch.full((n,), len(tasks) - 1)
    if kind == "some":
        return index // 2 * 2
    assert kind == "random"
    return index


def routed_labels(route: Tensor, tasks: dict[str, mtl.Task], share: float = 0.3) -> Tensor:
    """``[N]``, or ``[N, W]`` where a task has several labels; columns that a row's task does not read hold rubbish."""
    n = route.shape[0]
    width = max(label_columns(task) or 1 for task in tasks.values())
    y = torch.full((n, width), 1e30)
    for index, task in enumerate(tasks.values()):
        own = labels_of(task, n, share)
        if own is not None:
            own = (own.unsqueeze(1) if own.dim() == 1 else own).float()
            rows = route == index
            y[rows, : own.shape[1]] = own[rows]
    return y if width > 1 else y[:, 0]


def random_problem(seed: int, n: int, d: int, dtype: torch.dtype, routed: bool) -> Problem:
    """Any tasks, layers, activation and dropout."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    names = draw.sample(sorted(LOSSES_ONLY), draw.randint(1, 8))
    tasks = {name: TASKS[name] for name in names}
    return problem(
        n,
        d,
        dtype,
        tasks,
        hidden=[draw.choice((1, 2, 7, 8, 17, 40)) for _ in range(draw.randint(1, 3))],
        act=draw.choice(ACTS),
        bias=draw.random() < 0.8,
        dropout=draw.choice((0.0, 0.0, 0.4)),
        route=draw.choice(("random", "some", "constant")) if routed else None,
        share=draw.choice((0.0, 0.4, 0.95)),
    )
