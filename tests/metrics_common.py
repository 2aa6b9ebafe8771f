"""What the tests of the metrics share: tasks, labels, scikit-learn's values."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_mtl_pyg import Task

sk = pytest.importorskip("sklearn.metrics", reason="the references are scikit-learn's")
torchmetrics = pytest.importorskip("torchmetrics", reason="metrics need the extra [metrics]")
classification = importlib.import_module("torchmetrics.classification")

from torch_mtl_pyg.metrics import MetricResults, TaskMetrics  # noqa: E402

NAN = float("nan")
SINGLE = {
    "kind": Task(4, loss="cross_entropy"),
    "NR.flag": Task(1, loss="bce"),
    "mass": Task(1, loss="mse"),
    "size": Task(1, loss="l1"),
    "charge": Task(1, loss="huber"),
    "count": Task(1, loss="poisson_nll"),
    "dipole": Task(2, loss="gaussian_nll"),
    "type": Task(2, loss="cross_entropy"),  # also names of Module's own attributes are names of tasks
}
SEVERAL = {
    "toxic": Task(3, loss="bce"),
    "forces": Task(3, loss="mse"),
    "counts": Task(2, loss="poisson_nll"),
    "box": Task(4, loss="gaussian_nll"),
}
TASKS = {**SINGLE, **SEVERAL}
# torchmetrics computes the areas and shares of classification in float32.
TOLERANCE = {"accuracy": 1e-6, "AUROC": 1e-6, "MAE": 1e-12, "R2": 1e-12}


def some(tasks: dict[str, Task], n: int, missing: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, and labels of which a share is missing (NaN)."""
    outputs, labels = {}, {}
    for name, task in tasks.items():
        columns = 1 if task.loss == "cross_entropy" else task.out_channels // (1 + (task.loss == "gaussian_nll"))
        outputs[name] = torch.randn(n, task.out_channels)
        high = task.out_channels if task.loss == "cross_entropy" else 2 if task.loss == "bce" else 5
        y = torch.randint(0, high, (n, columns)).float()
        if task.loss not in ("cross_entropy", "bce", "poisson_nll"):
            y = torch.randn(n, columns)
        y[torch.rand(n, columns) < missing] = NAN
        labels[name] = y
    return outputs, labels


def reference(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics that are defined, by scikit-learn in float64."""
    out, y = outputs.double().numpy(), labels.double().numpy()
    if task.loss == "cross_entropy":
        rows = ~np.isnan(y[:, 0])
        return {"accuracy": sk.accuracy_score(y[rows, 0], out[rows].argmax(1))} if rows.any() else {}
    out = np.exp(out) if task.loss == "poisson_nll" else out[:, : y.shape[1]]
    there = ~np.isnan(y)
    columns = [(y[there[:, i], i], out[there[:, i], i]) for i in range(y.shape[1])]
    found: dict[str, float] = {}
    if task.loss == "bce":
        areas = [sk.roc_auc_score(*column) for column in columns if len(np.unique(column[0])) == 2]
        if areas:
            found["AUROC"] = float(np.mean(areas))
        return found
    if there.any():
        found["MAE"] = sk.mean_absolute_error(y[there], out[there])
    scores = [sk.r2_score(*column) for column in columns if len(np.unique(column[0])) > 1]
    if scores:
        found["R2"] = float(np.mean(scores))
    return found


def agree(results: MetricResults, tasks: dict[str, Task], outputs: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    """The same metrics are defined, with the same values."""
    assert list(results) == list(tasks)
    for name, task in tasks.items():
        expected = reference(task, outputs[name], y[name])
        assert results[name].keys() == expected.keys(), name
        for metric, value in expected.items():
            assert results[name][metric] == pytest.approx(value, rel=TOLERANCE[metric], abs=TOLERANCE[metric]), name
            assert isinstance(results[name][metric], float)
        assert results.labels[name] == int((~y[name].isnan()).sum())


def one(task: Task, y: Any, outputs: Tensor | None = None) -> MetricResults:
    y = torch.as_tensor(y)
    metrics = TaskMetrics({"a": task})
    metrics.update({"a": torch.randn(len(y), task.out_channels) if outputs is None else outputs}, {"a": y})
    return metrics.compute()
