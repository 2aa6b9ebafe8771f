"""What the tests of the heads share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torch_mtl_pyg as mtl

TASKS: dict[str, mtl.Task | int] = {
    "subject": mtl.Task(7, loss="cross_entropy", label_smoothing=0.1),
    "toxic": mtl.Task(1, loss="bce", pos_weight=4.0),
    "degree": mtl.Task(1, loss="huber", delta=1.0, weight=0.5),
    "other": 5,
}
RAGGED = {f"t{i}": 1 + i * 7 % 19 for i in range(40)}


def modules(in_channels: int, tasks: dict[str, Any], bias: bool = True) -> dict[str, nn.Linear]:
    return {
        name: nn.Linear(in_channels, task if isinstance(task, int) else task.out_channels, bias=bias)
        for name, task in tasks.items()
    }


def train_step(heads: mtl.MultiTaskHeads, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    sum(o.square().mean() for o in heads(x).values()).backward()
    optimizer.step()
