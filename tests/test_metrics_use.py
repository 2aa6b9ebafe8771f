"""TaskMetrics over batches: state, metrics of the user, errors, tables."""

from __future__ import annotations

import copy
import importlib
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from metrics_common import (
    NAN,
    TASKS,
    TaskMetrics,
    agree,
    classification,
    one,
    sk,
    some,
    torchmetrics,
)
from torch import Tensor

from torch_mtl_pyg import MultiTaskHeads, Task
from torch_mtl_pyg.labels import LabelError
from torch_mtl_pyg.task import TaskLayout

# ---- State.


def test_reset_forgets() -> None:
    outputs, y = some(TASKS, 30)
    metrics = TaskMetrics(TASKS, {"kind": {"f1": classification.MulticlassF1Score(4)}})
    metrics.update({n: -out for n, out in outputs.items()}, {n: part.flip(0) for n, part in y.items()})
    metrics.compute()
    metrics.reset()
    assert metrics.compute().labels == dict.fromkeys(TASKS, 0)
    metrics.update(outputs, y)
    results = metrics.compute()
    results["kind"].pop("f1")
    agree(results, TASKS, outputs, y)


def test_state_holds_neither_graph_nor_views() -> None:
    outputs, y = some(TASKS, 30)
    metrics = TaskMetrics(TASKS, {"kind": {"f1": classification.MulticlassF1Score(4)}})
    leaves = {name: out.clone().requires_grad_() for name, out in outputs.items()}
    metrics.update({name: leaf * 1.0 for name, leaf in leaves.items()}, y)
    assert not any(t.requires_grad for entry in metrics._entries for t in entry)
    assert not any(t.requires_grad for rows in metrics._rows.values() for pair in rows for t in pair)
    before = metrics.compute()
    overwritten, labels = {n: out.clone() for n, out in outputs.items()}, {n: part.clone() for n, part in y.items()}
    metrics.reset()
    metrics.update(overwritten, labels)
    for t in (*overwritten.values(), *labels.values()):
        t.zero_()
    assert metrics.compute() == before


def test_wrong_batches_count_nothing() -> None:
    tasks = {"a": Task(1, loss="bce"), "b": Task(3, loss="cross_entropy")}
    metrics = TaskMetrics(tasks, {"a": {"f1": classification.BinaryF1Score()}})
    outputs = {"a": torch.randn(4, 1), "b": torch.randn(4, 3)}
    with pytest.raises(LabelError):
        metrics.update(outputs, {"a": torch.tensor([0.0, 1.0, 0.0, 1.0]), "b": torch.tensor([0, 1, 2, 3])})
    assert metrics.compute().labels == {"a": 0, "b": 0}
    assert metrics.compute().left_out["a", "f1"] == "no labels"


def test_copies_are_independent() -> None:
    outputs, y = some(TASKS, 30)
    metrics = TaskMetrics(TASKS, {"kind": {"f1": classification.MulticlassF1Score(4)}})
    metrics.update(outputs, y)
    before = metrics.compute()
    other = copy.deepcopy(metrics)
    assert other._own["kind"]["f1"] is other.own[0] is not metrics.own[0]
    other.update(outputs, y)
    assert metrics.compute() == before
    assert other.compute().labels["kind"] == 2 * before.labels["kind"]
    again = copy.deepcopy(before)
    assert again == before and str(again) == str(before)


def test_tasks_of_heads_or_of_a_layout() -> None:
    heads = MultiTaskHeads(8, TASKS)
    y = some(TASKS, 20)[1]
    outputs = heads(torch.randn(20, 8))
    for tasks in (heads, heads.layout, TaskLayout(TASKS)):
        metrics = TaskMetrics(tasks)
        metrics.update(outputs, y)
        agree(metrics.compute(), TASKS, {n: out.detach() for n, out in outputs.items()}, y)


# ---- Metrics of the user.


class Recorder(torchmetrics.Metric):  # type: ignore[name-defined,misc]
    """Keeps what it gets; its value is the number of rows."""

    full_state_update = False

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.value = value
        self.rows: Tensor
        self.add_state("rows", torch.tensor(0), "sum")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.calls.append((outputs, labels))
        self.rows += len(outputs)

    def compute(self) -> Any:
        return self.rows if self.value is None else self.value


def test_own_metrics_beside_and_in_place_of_the_defaults() -> None:
    tasks = {"kind": Task(4, loss="cross_entropy"), "flag": Task(1, loss="bce"), "mass": Task(1, loss="mse")}
    outputs, y = some(tasks, 50)
    own = {
        "kind": {"f1": classification.MulticlassF1Score(4, average="macro")},
        "flag": {"AUROC": classification.BinaryAveragePrecision(), "f1": classification.BinaryF1Score()},
        "mass": {"RMSE": torchmetrics.MeanSquaredError(squared=False)},
    }
    metrics = TaskMetrics(tasks, own)
    assert len(list(metrics.own)) == 4
    for rows in (slice(0, 20), slice(20, 20), slice(20, 50)):
        metrics.update({n: out[rows] for n, out in outputs.items()}, {n: part[rows] for n, part in y.items()})
    results = metrics.compute()
    assert results.metrics == ["accuracy", "f1", "AUROC", "MAE", "R2", "RMSE"]
    there = {n: ~part[:, 0].isnan() for n, part in y.items()}
    true = {n: part[there[n], 0].numpy() for n, part in y.items()}
    got = {n: out[there[n]].numpy() for n, out in outputs.items()}
    expected = {
        ("kind", "f1"): sk.f1_score(true["kind"], got["kind"].argmax(1), average="macro"),
        ("kind", "accuracy"): sk.accuracy_score(true["kind"], got["kind"].argmax(1)),
        ("flag", "AUROC"): sk.average_precision_score(true["flag"], got["flag"][:, 0]),
        ("flag", "f1"): sk.f1_score(true["flag"], got["flag"][:, 0] > 0),
        ("mass", "RMSE"): sk.root_mean_squared_error(true["mass"], got["mass"][:, 0]),
        ("mass", "R2"): sk.r2_score(true["mass"], got["mass"][:, 0]),
    }
    for (name, metric), value in expected.items():
        assert results[name][metric] == pytest.approx(value, abs=1e-5), (name, metric)


def test_what_own_metrics_get() -> None:
    loss = torch.nn.functional.mse_loss
    tasks = {**TASKS, "own": Task(2, loss=loss), "soft": Task(1, loss="bce")}
    outputs, y = some(TASKS, 30)
    outputs = {n: out.half() for n, out in outputs.items()}
    outputs["own"], y["own"] = torch.randn(30, 2, dtype=torch.float64), torch.randn(30, 5)
    y["own"][3, 2] = NAN
    outputs["soft"], y["soft"] = torch.randn(30, 1), torch.rand(30, 1, dtype=torch.float64)
    recorders = {name: Recorder() for name in tasks}
    metrics = TaskMetrics(tasks, {name: {"rows": recorder} for name, recorder in recorders.items()})
    for rows in (slice(0, 11), slice(11, 30)):
        flat = {n: part[rows].flatten() if part.shape[1] == 1 and rows.start else part[rows] for n, part in y.items()}
        metrics.update({n: out[rows] for n, out in outputs.items()}, flat)
    results = metrics.compute()
    for name, task in tasks.items():
        assert len(recorders[name].calls) == 1
        got, labels = recorders[name].calls[0]
        there = ~y[name].isnan().any(1)
        assert results[name]["rows"] == there.sum()
        assert got.dtype == (torch.float64 if name == "own" else torch.float32)
        assert torch.equal(got, outputs[name][there].to(got.dtype))
        classes = task.loss == "cross_entropy"
        assert labels.shape == (y[name][there, 0] if classes else y[name][there]).shape, name
        assert torch.equal(labels.double().reshape(-1), y[name][there].float().double().reshape(-1))
        assert labels.dtype == (torch.int64 if classes or (task.loss == "bce" and name != "soft") else torch.float32)
    assert metrics.compute() == results  # each is reset before it is used again
    assert results.types["own"] == "own loss"
    assert results.labels["own"] == 29


def test_own_metric_without_a_whole_row() -> None:
    metrics = TaskMetrics({"a": Task(2, loss="bce")}, {"a": {"f1": classification.MultilabelF1Score(2)}})
    metrics.update({"a": torch.randn(3, 2)}, {"a": torch.tensor([[0.0, NAN], [1.0, NAN], [NAN, 1.0]])})
    results = metrics.compute()
    assert results.left_out["a", "f1"] == "no row with all its labels"
    assert "AUROC" in results["a"]


def test_own_metric_that_is_not_a_number() -> None:
    tasks = {"a": Task(1, loss="bce")}
    outputs, y = {"a": torch.randn(3, 1)}, {"a": torch.ones(3)}
    metrics = TaskMetrics(tasks, {"a": {"r": Recorder(torch.tensor(NAN))}})
    metrics.update(outputs, y)
    results = metrics.compute()
    assert results.left_out["a", "r"] == "came out as nan" and "r" not in results["a"]
    for value in (torch.ones(2), {"x": 1.0}, "high"):
        metrics = TaskMetrics(tasks, {"a": {"r": Recorder(value)}})
        metrics.update(outputs, y)
        with pytest.raises(TypeError, match=r"metrics\['a'\]\['r'\]: expected a tensor of one number, got"):
            metrics.compute()


# ---- Errors.


@pytest.mark.parametrize(
    ("tasks", "metrics", "error", "message"),
    [
        ([1], None, TypeError, "tasks: expected a dict"),
        ({"a": 3}, None, ValueError, "tasks: expected at least one with a loss .* got none"),
        ({"a": Task(3, loss=torch.nn.functional.mse_loss)}, {}, ValueError, "a callable one needs metrics"),
        ({"a": Task(1, loss="bce")}, [], TypeError, "metrics: expected a dict from task to metrics, got list"),
        ({"a": Task(1, loss="bce")}, {"b": {}}, ValueError, "metrics: expected one of 'a', got 'b'"),
        ({"a": Task(1, loss="bce"), "b": 2}, {"b": {}}, ValueError, r"metrics\['b'\]: expected a task with a loss"),
        (
            {"a": Task(1, loss="bce")},
            {"a": max},
            TypeError,
            r"metrics\['a'\]: expected a dict from name to torchmetrics",
        ),
        ({"a": Task(1, loss="bce")}, {"a": {"f": max}}, TypeError, r"metrics\['a'\]: .* got \{'f': <built-in"),
        ({"a": Task(1, loss="bce")}, {"a": {1: Recorder()}}, TypeError, r"metrics\['a'\]: .* got \{1: Recorder"),
    ],
)
def test_bad_tasks_and_metrics(tasks: Any, metrics: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskMetrics(tasks, metrics)


def batch(outputs: Any = None, y: Any = None) -> tuple[Any, Any]:
    """Good outputs and labels for the tasks of the test below, but for what is given."""
    good = {"a": torch.zeros(5, 1), "b": torch.zeros(5, 3), "c": torch.zeros(5, 1)}
    labels = {"a": torch.ones(5), "b": torch.ones(5), "c": torch.ones(5)}
    return outputs if isinstance(outputs, Tensor) else {**good, **(outputs or {})}, {**labels, **(y or {})}


@pytest.mark.parametrize(
    ("outputs", "y", "error", "message"),
    [
        (torch.zeros(5, 5), None, TypeError, r"outputs: expected a dict from task to \[N, C\], got Tensor"),
        ({"d": torch.zeros(5, 1)}, None, ValueError, "outputs: expected one of 'a', 'b', 'c', got 'd'"),
        ({"a": [0.0]}, None, TypeError, r"outputs\['a'\]: expected a tensor \[N, 1\], got list"),
        ({"c": None}, None, TypeError, r"outputs\['c'\]: expected a tensor \[N, 1\], got NoneType"),
        ({"a": torch.zeros(5)}, None, ValueError, r"outputs\['a'\]: expected shape \[N, 1\], got \[5\]"),
        ({"a": torch.zeros(5, 1, dtype=torch.int64)}, None, TypeError, r"outputs\['a'\]: expected one of the dtypes"),
        ({"b": torch.zeros(5, 2)}, None, ValueError, r"outputs\['b'\]: expected \[5, 3\] on cpu, got \[5, 2\] on cpu"),
        ({"b": torch.zeros(4, 3)}, None, ValueError, r"outputs\['b'\]: expected \[5, 3\] on cpu, got \[4, 3\] on cpu"),
        (
            {"b": torch.zeros(5, 3, device="meta")},
            None,
            ValueError,
            r"outputs\['b'\]: expected .* on cpu, got \[5, 3\] on meta",
        ),
        (None, {"d": torch.ones(5)}, ValueError, "y: expected one of 'a', 'b', 'c', got 'd'"),
        (None, {"a": torch.ones(4)}, ValueError, r"y\['a'\]: expected shape \[5\] or \[5, 1\], got \[4\]"),
        (None, {"a": torch.ones(5, device="meta")}, ValueError, r"y\['a'\]: expected the device .* got meta"),
        (None, {"a": torch.tensor([0.0, 1, 0, 1, 2])}, LabelError, r"y\['a'\]: .* got 2.0 in row 4"),
        (None, {"b": torch.tensor([0.0, 1, 0, 1, 3])}, LabelError, r"y\['b'\]: .* got 3.0 in row 4"),
        (None, {"c": torch.tensor([0.0, math.inf, 0, 1, 3])}, LabelError, r"y\['c'\]: .* got inf in row 1"),
        ({"a": torch.tensor([[0.0], [0], [NAN], [0], [0]])}, None, ValueError, r"outputs\['a'\]: .*\[nan\] in row 2"),
        ({"b": torch.tensor([[1.0, NAN, 0.0]] * 5)}, None, ValueError, r"outputs\['b'\]: .* got \[1.0, nan, .* row 0"),
        (
            {"c": torch.full((5, 1), math.inf)},
            None,
            ValueError,
            r"outputs\['c'\]: expected numbers, got \[inf\] in row 0",
        ),
    ],
)
def test_bad_batches(outputs: Any, y: Any, error: type[Exception], message: str) -> None:
    metrics = TaskMetrics({"a": Task(1, loss="bce"), "b": Task(3, loss="cross_entropy"), "c": Task(1, loss="mse")})
    with pytest.raises(error, match=message):
        metrics.update(*batch(outputs, y))
    metrics.update(*batch())


def test_missing_outputs_and_labels() -> None:
    metrics = TaskMetrics({"a": Task(1, loss="bce"), "b": Task(1, loss="bce")})
    out, y = torch.zeros(5, 1), torch.ones(5)
    with pytest.raises(ValueError, match="outputs: expected outputs of the task 'b', got no such key"):
        metrics.update({"a": out}, {"a": y, "b": y})
    with pytest.raises(ValueError, match="outputs: expected outputs of the task 'a', got no such key"):
        metrics.update({}, {"a": y, "b": y})
    with pytest.raises(ValueError, match="y: expected labels of the task 'b'"):
        metrics.update({"a": out, "b": out}, {"a": y})
    with pytest.raises(ValueError, match=r"y: expected shape \[5, 2\], one column per task, got \[5, 3\]"):
        metrics.update({"a": out, "b": out}, torch.ones(5, 3))
    with pytest.raises(TypeError, match="y: expected a dict from task to labels or a matrix"):
        metrics.update({"a": out, "b": out}, None)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match=r"y\['b'\]: .* got 7.0 in row 3"):  # the second of two checked together
        metrics.update({"a": out, "b": out}, torch.tensor([[0.0, 1.0]] * 3 + [[0.0, 7.0]] * 2))
    with pytest.raises(ValueError, match=r"outputs\['b'\]: expected numbers, got \[nan\] in row 0"):
        metrics.update({"a": out, "b": out * NAN}, torch.ones(5, 2))


def test_outputs_without_a_label_may_be_anything() -> None:
    y = torch.tensor([0.0, 1.0, NAN])
    for loss, width in (("bce", 1), ("mse", 1), ("cross_entropy", 2)):
        outputs = torch.zeros(3, width)
        outputs[2] = NAN
        assert one(Task(width, loss=loss), y, outputs).labels == {"a": 2}


# ---- Results.


def test_table() -> None:
    tasks = {
        "NR-AR": Task(1, "bce"),
        "SR-p53": Task(1, "bce"),
        "kind": Task(3, "cross_entropy"),
        "mass": Task(1, "mse"),
    }
    outputs = {
        "NR-AR": torch.tensor([[0.0], [1.0], [2.0], [3.0]]),
        "SR-p53": torch.zeros(4, 1),
        "kind": torch.eye(3)[[0, 1, 2, 2]],
        "mass": torch.tensor([[0.0], [0.01], [2.0], [3.0]]),
    }
    y = {
        "NR-AR": torch.tensor([0.0, 1.0, 0.0, NAN]),
        "SR-p53": torch.tensor([1.0, 1.0, 1.0, NAN]),
        "kind": torch.tensor([0, 1, 1, -100]),
        "mass": torch.tensor([0.0, 0.0, NAN, NAN]),
    }
    metrics = TaskMetrics(tasks)
    metrics.update(outputs, y)
    results = metrics.compute()
    assert results.table() == (
        "task      type         labels  positives  AUROC  accuracy    MAE  R2\n"
        "--------  -----------  ------  ---------  -----  --------  -----  --\n"
        "NR-AR     binary            3      0.333  0.500         -      -   -\n"
        "SR-p53    binary            3      1.000      -         -      -   -\n"
        "kind      multi-class       3          -      -     0.667      -   -\n"
        "mass      regression        2          -      -         -  0.005   -\n"
        "--------  -----------  ------  ---------  -----  --------  -----  --\n"
        "mean                                      0.500     0.667  0.005   -\n"
        "of tasks                                      1         1      1   0\n"
        "left out (only one class among 3 labels): AUROC of SR-p53\n"
        "left out (all 2 labels are equal): R2 of mass"
    )
    assert str(results) == repr(results) == f"{results}" == results.table()
    assert results.mean() == results.mean("AUROC") == pytest.approx(0.5)
    assert results.types["mass"] == "regression"


def test_many_left_out_are_one_line() -> None:
    tasks = {f"t{i}": Task(1, loss="bce") for i in range(7)}
    y = torch.ones(20, 7)
    y[0, 0] = 0.0
    for i in range(7):
        y[20 - i :, i] = NAN
    metrics = TaskMetrics(tasks)
    metrics.update({name: torch.randn(20, 1) for name in tasks}, y)
    lines = str(metrics.compute()).split("\n")
    assert len(lines) == 2 + 7 + 3 + 1
    listed = "AUROC of t1, AUROC of t2, AUROC of t3, AUROC of t4, AUROC of t5 and 1 more"
    assert lines[-1] == f"left out (only one class among n labels): {listed}"


def test_means() -> None:
    outputs, y = some(TASKS, 40)
    y["NR.flag"].fill_(NAN)
    metrics = TaskMetrics(TASKS)
    metrics.update(outputs, y)
    results = metrics.compute()
    assert results.mean("AUROC") == results["toxic"]["AUROC"]
    assert results.mean("accuracy") == pytest.approx((results["kind"]["accuracy"] + results["type"]["accuracy"]) / 2)
    assert results.mean("R2") == pytest.approx(np.mean([v["R2"] for v in results.values() if "R2" in v]))
    with pytest.raises(ValueError, match=r"metric: expected one that a task has, of .*'AUROC'.*, got 'f1'"):
        results.mean("f1")
    with pytest.raises(ValueError, match=r"of \[\], got 'AUROC'"):
        one(Task(1, loss="bce"), [1.0, 1.0]).mean()


def test_plain_data() -> None:
    outputs, y = some(TASKS, 40)
    y["NR.flag"] = torch.ones(40, 1)
    metrics = TaskMetrics(TASKS)
    metrics.update(outputs, y)
    results = metrics.compute()
    data = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert data["metrics"] == dict(results)
    assert data["means"] == {metric: results.mean(metric) for metric in results.metrics}
    assert data["labels"] == results.labels and data["types"] == results.types
    assert data["left_out"]["NR.flag"] == {"AUROC": "only one class among 40 labels"}
    assert data["positives"] == {"NR.flag": 1.0, "toxic": pytest.approx(np.nanmean(y["toxic"].numpy()))}
    assert sorted(data) == ["labels", "left_out", "means", "metrics", "positives", "types"]


# ---- Import.


def test_import_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch_mtl_pyg.metrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"pip install torch_mtl_pyg\[metrics\]"):
        importlib.import_module("torch_mtl_pyg.metrics")


def test_package_does_not_import_torchmetrics() -> None:
    program = "import sys, torch_mtl_pyg; print('torchmetrics' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
