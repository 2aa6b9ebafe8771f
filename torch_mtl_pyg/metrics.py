"""Metrics of each task on the labels it has, computed by torchmetrics. Needs the extra ``[metrics]``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .labels import FLOATING, check_values, label_columns, labelled, split_labels
from .nn import MultiTaskHeads
from .ops._checks import check_floating
from .task import Task, TaskLayout

try:
    from torchmetrics import Metric
    from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy
    from torchmetrics.functional.regression import mean_absolute_error, r2_score
except ImportError as error:
    raise ImportError(
        f"torch_mtl_pyg.metrics: expected torchmetrics, got {error}; pip install 'torch_mtl_pyg[metrics]'."
    ) from error

__all__ = ["MetricResults", "TaskMetrics"]

_DEFAULTS = {"cross_entropy": ("accuracy",), "bce": ("AUROC",)}  # all other losses of a name: MAE and R2
_NAMED = 5  # tasks that a line of a table names


class MetricResults(Mapping[str, dict[str, float]]):
    """The metrics of all tasks: ``results["task"]["AUROC"]``. Its text is :meth:`table`.

    Attributes:
        left_out: ``(task, metric)`` to the reason why the metric is not defined: it is not in ``results[task]``.
        partial: ``(task, metric)`` to the columns that a mean over a task's columns leaves out, and why.
        labels: Task to how many labels counted.
        positives: Task to the share of positive labels (over all columns), or None if it is not binary or has no label.
        types: Task to ``"multi-class"``, ``"binary"``, ``"multi-label"``, ``"regression"``, ``"counts"``,
            ``"own loss"`` or ``"no loss"``.
    """

    def __init__(
        self,
        values: dict[str, dict[str, float]],
        left_out: dict[tuple[str, str], str],
        partial: dict[tuple[str, str], str],
        labels: dict[str, int],
        positives: dict[str, float | None],
        types: dict[str, str],
    ) -> None:
        self._values = values
        self.left_out = left_out
        self.partial = partial
        self.labels = labels
        self.positives = positives
        self.types = types

    def __getitem__(self, task: str) -> dict[str, float]:
        return self._values[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def mean(self, metric: str = "AUROC") -> float:
        """The mean of a metric over the tasks that have it, each with the same weight.

        Raises:
            ValueError: No task has it.
        """
        found = [values[metric] for values in self._values.values() if metric in values]
        if not found:
            reasons = _merged(reason for (_, name), reason in self.left_out.items() if name == metric)
            why = f"left out everywhere ({reasons})" if reasons else f"got {metric!r}"
            raise ValueError(f"metric: expected one that a task has, of {', '.join(self._means()) or 'none'}; {why}.")
        return math.fsum(found) / len(found)

    def _means(self) -> dict[str, float]:
        return {m: self.mean(m) for m in self._metrics() if any(m in values for values in self._values.values())}

    def _metrics(self) -> list[str]:
        names = dict.fromkeys(metric for values in self._values.values() for metric in values)
        return list(names | dict.fromkeys(metric for _, metric in self.left_out))

    def table(self) -> str:
        """A line per task, the means over the tasks, and what was left out and why, as text."""
        metrics, means = self._metrics(), self._means()
        rows = [["task", "type", "labels", "positives", *metrics]]
        for name, values in self._values.items():
            share = self.positives[name]
            cells = [_number(values[metric]) if metric in values else "-" for metric in metrics]
            rows.append([name, self.types[name], str(self.labels[name]), "-" if share is None else f"{share:.3f}"])
            rows[-1] += cells
        counts = {metric: sum(metric in values for values in self._values.values()) for metric in metrics}
        rows.append(["mean", "", "", "", *(_number(means[m]) if m in means else "-" for m in metrics)])
        rows.append(["over tasks", "", "", "", *(str(counts[metric]) for metric in metrics)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        rule = "  ".join("-" * width for width in widths)
        lines = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        lines += [f"left out: {line}" for line in _grouped(self.left_out)]
        lines += [f"partial: {line}" for line in _grouped(self.partial)]
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON: ``{"tasks": {name: {...}}, "means": {metric: value}}``."""
        tasks = {
            name: {
                "type": self.types[name],
                "labels": self.labels[name],
                "positives": self.positives[name],
                "metrics": dict(values),
                "left_out": {metric: why for (task, metric), why in self.left_out.items() if task == name},
                "partial": {metric: why for (task, metric), why in self.partial.items() if task == name},
            }
            for name, values in self._values.items()
        }
        return {"tasks": tasks, "means": self._means()}
