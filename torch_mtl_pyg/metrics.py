"""Metrics of each task on the labels it has, computed by torchmetrics. Needs the extra ``[metrics]``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .labels import check_values, label_columns, labelled, split_labels
from .nn import MultiTaskHeads
from .ops._checks import check_floating
from .task import Task, TaskLayout

try:
    from torchmetrics import Metric, functional
    from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy
except ImportError as error:
    raise ImportError(f"{__name__}: {error}; expected torchmetrics: pip install torch_mtl_pyg[metrics].") from error

# What the table calls tasks by their loss, all others being regression; and the metrics of these.
_TYPES = {"cross_entropy": "multi-class", "bce": "binary", None: "no loss"}
_METRICS = {"multi-class": ["accuracy"], "binary": ["AUROC"], "regression": ["MAE", "R2"]}
_Tasks = Mapping[str, Task | int] | MultiTaskHeads | TaskLayout


class MetricResults(dict[str, dict[str, float]]):
    """Task to metric to value: ``results["task"]["AUROC"]``. Its text is :meth:`table`.

    Attributes:
        left_out: ``(task, metric)`` to the reason why it is not defined, and so not in ``results[task]``; and
            ``(task, "AUROC[2]")`` to the reason why the mean over the task's columns is without column 2.
        metrics: Names of the metrics, in the order of the table.
        labels: Task to how many labels counted (rows, for a callable loss).
        positives: Task of ``bce`` that has labels to the share of positive ones.
        types: Task to "multi-class", "binary", "multi-label", "regression", "own loss" or "no loss".
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[tuple[str, str], str] = {}
        self.metrics: list[str] = []
        self.labels: dict[str, int] = {}
        self.positives: dict[str, float] = {}
        self.types: dict[str, str] = {}

    def mean(self, metric: str = "AUROC") -> float:
        """The mean of a metric over the tasks that have it, each with the same weight.

        Raises:
            ValueError: No task has it.
        """
        found = [values[metric] for values in self.values() if metric in values]
        if not found:
            raise ValueError(f"metric: expected one that a task has, of {list(self._means())}, got {metric!r}.")
        return math.fsum(found) / len(found)

    def _means(self) -> dict[str, float]:
        return {metric: self.mean(metric) for metric in self.metrics if any(metric in v for v in self.values())}

    def table(self) -> str:
        """A line for each task, the means over the tasks, and what was left out and why, as text."""
        rows = [["task", "type", "labels", "positives", *self.metrics]]
        for name, values in self.items():
            numbers = [self.positives.get(name), *map(values.get, self.metrics)]
            rows.append([name, self.types[name], str(self.labels[name]), *map(_text, numbers)])
        rows.append(["mean", "", "", "", *map(_text, map(self._means().get, self.metrics))])
        rows.append(["of tasks", "", "", "", *(str(sum(m in v for v in self.values())) for m in self.metrics)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        line = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
        rule = ["-" * width for width in widths]
        lines = [line.format(*row).rstrip() for row in (rows[0], rule, *rows[1:-2], rule, *rows[-2:])]
        groups: dict[str, dict[str, str]] = {}  # by the reason without its numbers
        for (name, metric), why in self.left_out.items():
            groups.setdefault(re.sub(r"\d+", "n", why), {})[f"{metric} of {name}"] = why
        for general, group in groups.items():
            more = f" and {len(group) - 5} more" if len(group) > 5 else ""
            why = general if len(set(group.values())) > 1 else next(iter(group.values()))
            lines.append(f"left out ({why}): {', '.join(list(group)[:5])}{more}")
        return "\n".join(lines)

    __repr__ = __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: metrics and left_out by task and metric, means by metric, labels, ... by task."""
        left_out = {name: {m: why for (task, m), why in self.left_out.items() if task == name} for name in self}
        return {**vars(self), "metrics": dict(self), "means": self._means(), "left_out": left_out}


class TaskMetrics(nn.Module):
    """Metrics of several tasks over any number of batches, on the labels that are there.

    ``cross_entropy``: accuracy. ``bce``: AUROC (exact); with several columns, the mean over those with both classes.
    ``mse``, ``l1``, ``huber``, ``poisson_nll`` (predicting ``exp(output)``) and ``gaussian_nll`` (predicting the means,
    the first half of the columns): MAE over all labels, and R2, the mean over the columns. A callable loss or none: no
    metric. Values are those of torchmetrics, computed on the CPU in float64. Each process counts its own rows.

    Args:
        tasks: Name to Task or width, a TaskLayout, or the tasks that a :class:`~torch_mtl_pyg.MultiTaskHeads` has now.
        metrics: Task to name to ``torchmetrics.Metric``: besides the defaults, or in place of those of the same name.
            :meth:`compute` resets each, updates it once, on its own device, with the rows that have all their labels,
            and takes its value, one number. It gets outputs ``[n, C]`` as they came, half precision as float32, and
            labels ``[n]`` (classes) or ``[n, C]``: int64 for ``cross_entropy`` and for ``bce`` if all are 0 or 1.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``metrics`` names an unknown task or one without loss, or there is nothing to measure.
    """

    def __init__(self, tasks: _Tasks, metrics: Mapping[str, Mapping[str, Metric]] | None = None) -> None:
        super().__init__()
        self.layout = TaskLayout(tasks.tasks if isinstance(tasks, (MultiTaskHeads, TaskLayout)) else tasks)
        if not isinstance(metrics, (Mapping, type(None))):
            raise TypeError(f"metrics: expected a dict from task to metrics, got {type(metrics).__name__}.")
        self._own = {self.layout.name(name, "metrics"): own for name, own in (metrics or {}).items()}
        for name, own in self._own.items():
            if self.layout.tasks[name].loss is None:
                raise ValueError(f"metrics[{name!r}]: expected a task with a loss; one without has no labels.")
            ok = isinstance(own, Mapping) and all(isinstance(k, str) and isinstance(v, Metric) for k, v in own.items())
            if not ok:
                raise TypeError(f"metrics[{name!r}]: expected a dict from name to torchmetrics.Metric, got {own!r}.")
        self.own = nn.ModuleList(metric for own in self._own.values() for metric in own.values())  # moved by .to
        self._columns: dict[str, range] = {}  # a task's columns among the label columns of all tasks
        end = 0
        for name, task in self.layout.tasks.items():
            self._columns[name] = range(end, end := end + (0 if task.loss is None else label_columns(task) or 0))
        if not end and not len(self.own):
            raise ValueError("tasks: expected at least one with a loss (a callable one needs metrics), got none.")
        self.reset()

    def reset(self) -> None:
        """Forgets all batches."""
        # Per batch and kind of task: columns [k], number of labels in each [k], predictions and labels by column.
        self._entries: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._own}

    @torch.no_grad()
    def update(self, outputs: Mapping[str, Tensor], y: Mapping[str, Tensor | None] | Tensor) -> None:
        """Counts a batch, or nothing of it if anything is wrong.

        Args:
            outputs: Task to ``[N, C_t]`` of any floating-point dtype, as :class:`~torch_mtl_pyg.MultiTaskHeads` returns
                them. Tasks without metrics may be left out.
            y: Labels on the same device, as :meth:`torch_mtl_pyg.MultiTaskHeads.loss` takes them: a matrix ``[N, T]``,
                or a dict from task to ``[N]``, ``[N, C_t]`` (``[N, C_t / 2]`` for ``gaussian_nll``) or None.

        Raises:
            TypeError: ``outputs`` is no dict of floating-point tensors, or labels have the wrong type.
            ValueError: A task is unknown or missing, a shape or a device does not fit, an output with a label is NaN
                (for regression: or infinite), or a label is out of range (:class:`torch_mtl_pyg.labels.LabelError`).
        """
        labels = dict(zip(self.layout.names, split_labels(y, self.layout, self._checked(outputs)), strict=True))
        kinds: dict[Any, dict[str, Tensor]] = {}  # a few large operations instead of small ones for each task
        for name, part in labels.items():
            task = self.layout.tasks[name]
            if part is not None and task.loss is None:
                check_values(name, task, part)
            elif part is not None and not callable(task.loss):
                width = task.out_channels if task.loss == "cross_entropy" else 0
                kinds.setdefault((task.loss, width, task.ignore_index, part.dtype), {})[name] = part
        self._entries += [self._packed(parts, outputs) for parts in kinds.values()]
        for name in self._own:
            part, task = labels[name], self.layout.tasks[name]
            if part is not None:
                part = part if callable(task.loss) else part.reshape(len(part), label_columns(task) or 1)
                rows = labelled(task, part).unsqueeze(1).flatten(1).all(1)
                self._rows[name].append((outputs[name][rows], part[rows]))

    def _checked(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Checks the outputs, and returns those of one task."""
        if not isinstance(outputs, Mapping):
            raise TypeError(f"outputs: expected a dict from task to [N, C], got {type(outputs).__name__}.")
        first: Tensor = next(iter(outputs.values()), torch.empty(0))
        for name, value in outputs.items():
            wanted = self.layout.tasks[self.layout.name(name, "outputs")].out_channels
            check_floating(f"outputs[{name!r}]", value, 2, f"[N, {wanted}]")
            if value.shape != (first.shape[0], wanted) or value.device != first.device:
                got = f"{list(value.shape)} on {value.device}"
                raise ValueError(f"outputs[{name!r}]: expected [{len(first)}, {wanted}] on {first.device}, got {got}.")
        for name in self.layout.names:
            if name not in outputs and (self._columns[name] or self._own.get(name)):
                raise ValueError(f"outputs: expected outputs of the task {name!r}, got no such key.")
        return first

    def _packed(self, parts: dict[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Checks the labels of tasks of one kind, and picks those that are there with their predictions, by column."""
        task = self.layout.tasks[next(iter(parts))]
        labels = torch.column_stack(tuple(parts.values()))
        try:
            check_values("", task, labels)
        except ValueError:
            for name, part in parts.items():  # again, to name the task
                check_values(name, self.layout.tasks[name], part)
            raise
        if task.loss == "cross_entropy":
            stacked = torch.stack([outputs[name] for name in parts])
            bad, predicted = stacked.isnan().any(2), stacked.argmax(2)
        else:
            chosen = [outputs[n].chunk(2, 1)[0] if task.loss == "gaussian_nll" else outputs[n] for n in parts]
            predicted = torch.cat(chosen, 1).t()
            bad = predicted.isnan() if task.loss == "bce" else ~predicted.isfinite()
        owners = [(name, column) for name in parts for column in self._columns[name]]
        labels, present = labels.t(), labelled(task, labels).t()
        if bool((bad & present).any()):
            place, row = (bad & present).nonzero()[0].tolist()
            name = owners[place][0]
            raise ValueError(f"outputs[{name!r}]: expected numbers, got {outputs[name][row].tolist()} in row {row}.")
        return torch.tensor([column for _, column in owners]), present.sum(1), predicted[present], labels[present]

    @torch.no_grad()
    def compute(self) -> MetricResults:
        """The metrics of all batches since the last :meth:`reset`, which stay counted.

        Raises:
            TypeError: A metric of the argument ``metrics`` returned something else than one number.
        """
        results, columns = MetricResults(), self._by_column()
        for name, task in self.layout.tasks.items():
            mine, rows = [columns[i] for i in self._columns[name]], self._rows.get(name, [])
            n = sum(len(part) for _, part in (rows if callable(task.loss) else mine))
            kind = "own loss" if callable(task.loss) else _TYPES.get(task.loss, "regression")
            results.types[name] = "multi-label" if kind == "binary" and len(mine) > 1 else kind
            results.labels[name], results[name] = n, {}
            if n and task.loss == "bce":
                results.positives[name] = torch.cat([label for _, label in mine]).mean().item()
            for metric in dict.fromkeys([*_METRICS.get(kind, []), *self._own.get(name, {})]):
                results.metrics += [metric] * (metric not in results.metrics)
                for key, value in (self._values(name, metric, mine) if n else {metric: "no labels"}).items():
                    if isinstance(value, float) and math.isfinite(value):
                        results[name][key] = value
                    else:
                        results.left_out[name, key] = value if isinstance(value, str) else f"came out as {value}"
        return results

    def _by_column(self) -> list[tuple[Tensor, Tensor]]:
        """Predictions and labels of each column of labels, in float64 on the CPU."""
        none = (torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0))
        parts = [(c.repeat_interleave(n.cpu()), p.cpu().double(), y.cpu().double()) for c, n, p, y in self._entries]
        owner, predicted, labels = (torch.cat(column) for column in zip(none, *parts, strict=True))
        sizes = owner.bincount(minlength=sum(map(len, self._columns.values()))).tolist()
        order = owner.argsort(stable=True)
        return list(zip(predicted[order].split(sizes), labels[order].split(sizes), strict=True))

    def _values(self, name: str, metric: str, columns: list[tuple[Tensor, Tensor]]) -> dict[str, float | str]:
        """The metric's value, or the reason why there is none; and the reasons of columns that a mean is without."""
        task, own = self.layout.tasks[name], self._own.get(name, {}).get(metric)
        if own is not None:
            rows = zip(*self._rows[name], strict=True)
            outputs, labels = (torch.cat([part.to(own.device) for part in parts]) for parts in rows)
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            if not len(outputs):
                return {metric: "no row with all its labels"}
            if task.loss == "cross_entropy":
                labels = labels[:, 0].long()
            elif not callable(task.loss):
                hard = task.loss == "bce" and bool(((labels == 0) | (labels == 1)).all())
                labels = labels.to(torch.int64 if hard else outputs.dtype)
            own.reset()
            own.update(outputs, labels)
            value = own.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"metrics[{name!r}][{metric!r}]: expected a tensor of one number, got {value!r}.")
            return {metric: float(value)}
        if task.loss == "poisson_nll":
            columns = [(predicted.exp(), y) for predicted, y in columns]
        predicted, y = (torch.cat(parts) for parts in zip(*columns, strict=True))
        if metric == "accuracy":
            return {metric: multiclass_accuracy(predicted, y, task.out_channels, "micro", validate_args=False).item()}
        if metric == "MAE":
            return {metric: functional.mean_absolute_error(predicted, y).item()}
        found = [_of_column(metric, *column) for column in columns]
        values = [value for value in found if isinstance(value, float)]
        missing = {f"{metric}[{i}]": why for i, why in enumerate(found) if isinstance(why, str) and len(found) > 1}
        why = f"in none of {len(found)} columns" if missing else found[0]
        return {metric: math.fsum(values) / len(values) if values else why, **missing}


def _of_column(metric: str, predicted: Tensor, label: Tensor) -> float | str:
    n = len(label)
    if n < 2:
        return "only 1 label" if n else "no labels"
    if metric == "AUROC" and bool(((label != 0) & (label != 1)).any()):
        return f"soft labels among {n} labels"
    low, high = label.aminmax()
    if low == high:
        return f"only one class among {n} labels" if metric == "AUROC" else f"all {n} labels are equal"
    if metric == "R2":
        # Scaled, which R2 does not see: torchmetrics takes sums of squares below 1e-4 for zero.
        middle, scale = label.mean(), 1e7 / (high - low)
        return functional.r2_score((predicted - middle) * scale, (label - middle) * scale).item()
    # Ranks: torchmetrics takes numbers outside [0, 1] through a sigmoid, after which the large ones are equal.
    rank = predicted.unique(return_inverse=True)[1].double()
    return binary_auroc(rank / rank.max().clamp(min=1), label.long(), validate_args=False).item()


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
