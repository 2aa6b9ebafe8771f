"""The two kinds of tasks on molecules: their loss, and the metric by which models are chosen and compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch_mtl_pyg as mtl


@dataclass(frozen=True)
class Kind:
    """One kind of task, the same for all tasks of a set.

    Args:
        loss: The loss of :class:`torch_mtl_pyg.Task`.
        metric: The metric of :class:`torch_mtl_pyg.metrics.TaskMetrics`.
        title: What the metric is called; an error of standardised labels is one in standard deviations.
        higher: Whether more of it is better.
    """

    loss: str
    metric: str
    title: str
    higher: bool

    def better(self, value: float, other: float) -> bool:
        """Whether the first of two values of the metric is the better one."""
        return value > other if self.higher else value < other

    def best(self, values: Iterable[float]) -> float:
        """The best of several values of the metric."""
        return max(values) if self.higher else min(values)

    def tasks(self, names: Iterable[str]) -> dict[str, mtl.Task]:
        """A task of one output for each name."""
        return {name: mtl.Task(1, loss=self.loss) for name in names}


KINDS = {
    "binary": Kind("bce", "AUROC", "AUROC", higher=True),
    "regression": Kind("l1", "MAE", "MAE/std", higher=False),
}
