"""Tasks, labels and embeddings for the tests of the losses."""

from __future__ import annotations

import random
from typing import Any

import torch
from loss_oracle import Problem
from torch import Tensor

import torch_mtl_pyg as mtl

# Every loss with every option, ragged widths.
TASKS: dict[str, mtl.Task] = {
    "classes": mtl.Task(7, loss="cross_entropy"),
    "two": mtl.Task(2, loss="cross_entropy", weight=0.5),
    "single": mtl.Task(1, loss="cross_entropy"),
    "smooth": mtl.Task(5, loss="cross_entropy", label_smoothing=0.1),
    "smoothest": mtl.Task(2, loss="cross_entropy", label_smoothing=1.0),
    "weighted": mtl.Task(4, loss="cross_entropy", class_weight=[0.5, 2.0, 0.0, 1.0], weight=2.0),
    "both": mtl.Task(19, loss="cross_entropy", class_weight=[0.1 * i + 0.2 for i in range(19)], label_smoothing=0.3),
    "ignoring": mtl.Task(3, loss="cross_entropy", ignore_index=1),
    "toxic": mtl.Task(1, loss="bce"),
    "rare": mtl.Task(1, loss="bce", pos_weight=50.0),
    "labels": mtl.Task(6, loss="bce", pos_weight=[1.0, 0.0, 3.0, 0.5, 100.0, 1e4]),
    "mse": mtl.Task(3, loss="mse"),
    "l1": mtl.Task(1, loss="l1", weight=0.25),
    "huber": mtl.Task(2, loss="huber", delta=0.3),
    "counts": mtl.Task(2, loss="poisson_nll"),
    "gaussian": mtl.Task(6, loss="gaussian_nll"),
    "off": mtl.Task(2, loss="mse", weight=0.0),
    "none": mtl.Task(3),
}


def labels_of(task: mtl.Task, n: int, share: float, kind: str = "natural") -> Tensor | None:
    """Random labels of which a share is missing; the shape and dtype that the task takes, or another it allows."""
    if task.loss is None:
        return None
    if task.loss == "cross_entropy":
        y = torch.randint(0, task.out_channels, (n,))
        y[torch.rand(n) < share] = task.ignore_index
        if kind == "natural":
            return y
        y = y.to(torch.float32 if kind == "float" else torch.int32)
        if kind == "float":
            y[(torch.rand(n) < share / 2)] = float("nan")
        return y.unsqueeze(1) if n % 2 else y
    columns = task.out_channels // 2 if task.loss == "gaussian_nll" else task.out_channels
    if task.loss == "bce":
        y = torch.rand(n, columns).round() if n % 2 else torch.rand(n, columns)
    elif task.loss == "poisson_nll":
        y = torch.poisson(3 * torch.rand(n, columns))
    else:
        y = torch.randn(n, columns)
    gone = torch.rand(n, columns) < share
    if kind == "integer":
        y = y.round().long()
        y[gone] = -100
    else:
        y[gone] = float("nan")
        y = y if kind == "natural" else y.to(torch.bfloat16 if n % 2 else torch.float64)
    return y[:, 0] if columns == 1 and n % 3 else y


def problem(
    n: int,
    d: int,
    dtype: torch.dtype,
    tasks: dict[str, mtl.Task] = TASKS,
    share: float = 0.3,
    kind: str = "natural",
    bias: bool = True,
    scale: float = 1.0,
) -> Problem:
    k = sum(task.out_channels for task in tasks.values())
    x, weight, b = torch.randn(n, d) * scale, torch.randn(k, d) / max(d, 1) ** 0.5, torch.randn(k)
    labels = {name: labels_of(task, n, share, kind) for name, task in tasks.items()}
    return Problem(x.to(dtype), weight.to(dtype), b.to(dtype) if bias else None, labels, tasks)


def random_tasks(seed: int, count: int) -> dict[str, mtl.Task]:
    """Tasks of any loss, width and options."""
    draw = random.Random(seed)
    tasks = {}
    for i in range(count):
        template: Any = draw.choice([t for t in TASKS.values() if t.class_weight is None and t.pos_weight is None])
        width = draw.choice((1, 2, 3, 8, 17, 40)) * (2 if template.loss == "gaussian_nll" else 1)
        options = {n: getattr(template, n) for n in ("label_smoothing", "ignore_index", "delta")}
        tasks[f"t{i}"] = mtl.Task(width, template.loss, draw.choice((0.0, 0.3, 1.0)), **options)
    return tasks
