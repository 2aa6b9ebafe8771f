"""What the kernels need to know of the tasks, as tensors that are made once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from ..task import LOSSES, Task, TaskLayout

# Kinds as csrc/common/losses.h numbers them: no loss here, the losses, and gradients that come from outside.
KIND: dict[str, int] = {name: i + 1 for i, name in enumerate(LOSSES)}
OUTSIDE = len(LOSSES) + 1


class LossTable:
    """The tasks of a layout as the kernels read them.

    Attributes:
        integers: int64 ``[T, 4]``: kind, width, label that stands for "missing", and where the task's numbers begin in
            ``reals``, or -1.
        reals: float64: label smoothing or delta of each task, then the class weights or positive weights.
        weight: float64 ``[T]``: the tasks' weights.
        fused: Whether each task has a loss the kernels compute.
    """

    def __init__(self, layout: TaskLayout, outside: bool = False) -> None:
        rows = []
        reals = [_scalar(task) for task in layout.tasks.values()]
        for task in layout.tasks.values():
            kind = KIND[task.loss] if isinstance(task.loss, str) else OUTSIDE if task.loss and outside else 0
            numbers = _numbers(task)
            rows.append((kind, task.out_channels, task.ignore_index, len(reals) if numbers else -1))
            reals += numbers
        weights = [task.weight for task in layout.tasks.values()]
        self.integers = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.reals = torch.tensor(reals, dtype=torch.float64, device="cpu")
        self.weight = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.fused = tuple(isinstance(task.loss, str) for task in layout.tasks.values())
        self._weights: dict[torch.device, Tensor] = {}

    def weight_on(self, device: torch.device) -> Tensor:
        """The tasks' weights on a device, copied there once: the host would wait for every copy."""
        if device.type == "cpu":
            return self.weight
        if device not in self._weights:
            self._weights[device] = self.weight.to(device)
        return self._weights[device]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weights": {}}


def loss_table(layout: TaskLayout, outside: bool = False) -> LossTable:
    """The table of a layout, made at its first use."""
    name = "_loss_table_outside" if outside else "_loss_table"
    table: LossTable | None = layout.__dict__.get(name)
    if table is None:
        if torch.compiler.is_compiling():
            return LossTable(layout, outside)
        # The table outlives this call, and must not be a fake, an inference or a transform's tensor.
        with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
            table = LossTable(layout, outside)
        layout.__dict__[name] = table
    return table


def total_weight(layout: TaskLayout, like: Tensor) -> Tensor:
    """The tasks' weights ``[T]`` in the dtype and on the device of ``like``."""
    return loss_table(layout).weight.to(like)


def _scalar(task: Task) -> float:
    return task.delta if task.loss == "huber" else task.label_smoothing


def _numbers(task: Task) -> list[float]:
    if task.class_weight is not None:
        return [float(v) for v in task.class_weight]
    if task.pos_weight is not None:
        several = isinstance(task.pos_weight, tuple)
        return [float(v) for v in task.pos_weight] if several else [float(task.pos_weight)] * task.out_channels  # type: ignore[union-attr, arg-type]
    return []
