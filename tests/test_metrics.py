"""TaskMetrics against scikit-learn on the labels that are there."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mtl_pyg import MultiTaskHeads, Task
from torch_mtl_pyg.labels import LabelError
from torch_mtl_pyg.task import TaskLayout

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


# ---- Values.


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9, 1.0])
def test_dict_of_labels(missing: float) -> None:
    outputs, y = some(TASKS, 60, missing)
    metrics = TaskMetrics(TASKS)
    metrics.update(outputs, y)
    agree(metrics.compute(), TASKS, outputs, y)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.9, 1.0])
def test_matrix_of_labels(missing: float) -> None:
    outputs, y = some(SINGLE, 60, missing)
    metrics = TaskMetrics(SINGLE)
    metrics.update(outputs, torch.cat(list(y.values()), 1))
    agree(metrics.compute(), SINGLE, outputs, y)


def test_labels_without_second_dimension_or_none() -> None:
    outputs, y = some(SINGLE, 40)
    metrics = TaskMetrics(SINGLE)
    metrics.update(outputs, {name: None if name == "mass" else part[:, 0] for name, part in y.items()})
    y["mass"] = torch.full_like(y["mass"], NAN)
    agree(metrics.compute(), SINGLE, outputs, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_integer_labels(dtype: torch.dtype) -> None:
    tasks = {"kind": Task(4, loss="cross_entropy", ignore_index=-1), "flag": Task(1, loss="bce"), "n": Task(1, "l1")}
    outputs, y = some(tasks, 50)
    y["n"] = y["n"].round()
    whole = {n: part.nan_to_num(-1.0 if n == "kind" else -100.0).to(dtype) for n, part in y.items()}
    metrics = TaskMetrics(tasks)
    metrics.update(outputs, whole)
    agree(metrics.compute(), tasks, outputs, y)


def test_integer_labels_of_regression_are_exact() -> None:
    tasks = {"a": Task(1, loss="l1"), "b": Task(1, loss="l1")}
    y = torch.tensor([2**24 + 1, 2**24 + 3])
    metrics = TaskMetrics(tasks)
    outputs = torch.full((2, 1), 2.0**24)
    metrics.update({"a": outputs, "b": outputs}, {"a": y, "b": y.float().double()})
    assert metrics.compute()["a"]["MAE"] == 2.0


def test_missing_is_what_it_is_for_each_task() -> None:
    """Tasks are read together where nothing tells them apart; here something does."""
    tasks = {
        "a": Task(3, loss="cross_entropy", ignore_index=0),
        "b": Task(3, loss="cross_entropy", ignore_index=1),
        "c": Task(1, loss="l1"),
        "d": Task(1, loss="l1"),
    }
    y = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0, 1, 1]), "c": torch.tensor([-100, 1, 2])}
    y["d"] = torch.tensor([-100.0, 1.0, NAN])
    metrics = TaskMetrics(tasks)
    metrics.update({"a": torch.eye(3), "b": torch.eye(3), "c": torch.zeros(3, 1), "d": torch.zeros(3, 1)}, y)
    results = metrics.compute()
    assert results.labels == {"a": 2, "b": 1, "c": 2, "d": 2}
    assert (results["a"]["accuracy"], results["b"]["accuracy"]) == (1.0, 1.0)
    assert (results["c"]["MAE"], results["d"]["MAE"]) == (1.5, 50.5)


def test_bool_labels_are_all_there() -> None:
    outputs = torch.randn(30, 1)
    y = torch.rand(30) < 0.5
    metrics = TaskMetrics({"flag": Task(1, loss="bce")})
    metrics.update({"flag": outputs}, {"flag": y})
    results = metrics.compute()
    assert results["flag"]["AUROC"] == pytest.approx(sk.roc_auc_score(y.numpy(), outputs[:, 0].numpy()), abs=1e-6)
    assert results.labels["flag"] == 30
    assert results.positives["flag"] == pytest.approx(y.float().mean().item())


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [0, 7, 0, 50, 3, 0]])
def test_several_batches_equal_one(sizes: list[int]) -> None:
    outputs, y = some(TASKS, 60)
    metrics, whole = TaskMetrics(TASKS), TaskMetrics(TASKS)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        metrics.update({n: out[rows] for n, out in outputs.items()}, {n: part[rows] for n, part in y.items()})
        start += size
    whole.update(outputs, y)
    assert metrics.compute() == whole.compute()
    agree(metrics.compute(), TASKS, outputs, y)


def test_matrix_and_dict_batches_mix() -> None:
    outputs, y = some(SINGLE, 40)
    metrics = TaskMetrics(SINGLE)
    metrics.update({n: out[:15] for n, out in outputs.items()}, torch.cat(list(y.values()), 1)[:15])
    rest = {n: part[15:].double() if n == "mass" else part[15:] for n, part in y.items()}
    metrics.update({n: out[15:] for n, out in outputs.items()}, rest)
    agree(metrics.compute(), SINGLE, outputs, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_read_as_they_are(dtype: torch.dtype) -> None:
    outputs, y = some(TASKS, 80)
    halves = {name: out.to(dtype) for name, out in outputs.items()}
    metrics = TaskMetrics(TASKS)
    metrics.update(halves, y)
    agree(metrics.compute(), TASKS, halves, y)


def test_double_outputs_are_not_rounded() -> None:
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    outputs = 1.0 + torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64) * 1e-12
    metrics = TaskMetrics({"flag": Task(1, loss="bce")})
    metrics.update({"flag": outputs}, {"flag": y})
    assert metrics.compute()["flag"]["AUROC"] == pytest.approx(0.75, abs=1e-6)


def test_large_and_small_logits_keep_their_order() -> None:
    """A sigmoid would make equal what is above 17 in float32, and leave numbers within [0, 1] as they are."""
    outputs = torch.tensor([[20.0], [30.0], [40.0], [50.0], [0.2], [0.7], [-200.0], [math.inf], [-math.inf]])
    y = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    metrics = TaskMetrics({"flag": Task(1, loss="bce")})
    for rows in (slice(0, 4), slice(4, 6), slice(6, 9)):
        metrics.update({"flag": outputs[rows]}, {"flag": y[rows]})
    expected = sk.roc_auc_score(y.numpy(), outputs[:, 0].clamp(-1e9, 1e9).numpy())
    assert metrics.compute()["flag"]["AUROC"] == pytest.approx(expected, abs=1e-6)


def test_equal_outputs_are_ties() -> None:
    metrics = TaskMetrics({"flag": Task(1, loss="bce")})
    metrics.update({"flag": torch.full((10, 1), 3.0)}, {"flag": torch.arange(10.0) % 2})
    assert metrics.compute()["flag"]["AUROC"] == 0.5  # by computation, and not left out


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0.0), (1e-3, 1.0), (1.0, 1e6), (1e8, 0.0)])
def test_r2_sees_neither_scale_nor_offset(scale: float, offset: float) -> None:
    y = torch.randn(40, dtype=torch.float64)
    outputs = (y + 0.3 * torch.randn(40, dtype=torch.float64)) * scale + offset
    y = y * scale + offset
    metrics = TaskMetrics({"mass": Task(1, loss="mse")})
    metrics.update({"mass": outputs.unsqueeze(1)}, {"mass": y})
    assert metrics.compute()["mass"]["R2"] == pytest.approx(sk.r2_score(y.numpy(), outputs.numpy()), abs=1e-8)


LOGIT = st.sampled_from([-30.0, -1.0, 0.0, 0.25, 0.5, 1.0, 30.0, 31.0])
LABEL = st.sampled_from([0.0, 1.0, NAN, -100.0])


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(LOGIT, LABEL, LOGIT, LABEL), max_size=25), cut=st.integers(0, 25))
def test_masked_auroc(rows: list[tuple[float, float, float, float]], cut: int) -> None:
    table = torch.tensor(rows).reshape(-1, 4)
    tasks = {"a": Task(1, loss="bce"), "b": Task(1, loss="bce")}
    metrics = TaskMetrics(tasks)
    for part in (table[:cut], table[cut:]):
        metrics.update({"a": part[:, :1], "b": part[:, 2:3]}, part[:, 1::2])
    outputs = {"a": table[:, :1], "b": table[:, 2:3]}
    y = {"a": table[:, 1:2], "b": table[:, 3:]}
    agree(metrics.compute(), tasks, outputs, {n: torch.where(part == -100, NAN, part) for n, part in y.items()})


# ---- What is not defined.


def one(task: Task, y: Any, outputs: Tensor | None = None) -> MetricResults:
    y = torch.as_tensor(y)
    metrics = TaskMetrics({"a": task})
    metrics.update({"a": torch.randn(len(y), task.out_channels) if outputs is None else outputs}, {"a": y})
    return metrics.compute()


@pytest.mark.parametrize(
    ("task", "y", "values", "left_out"),
    [
        (Task(1, loss="bce"), [NAN, NAN], [], {"AUROC": "no labels"}),
        (Task(1, loss="bce"), [NAN, 1.0], [], {"AUROC": "only 1 label"}),
        (Task(1, loss="bce"), [1.0] * 57 + [NAN], [], {"AUROC": "only one class among 57 labels"}),
        (Task(1, loss="bce"), [0.0] * 3, [], {"AUROC": "only one class among 3 labels"}),
        (Task(1, loss="bce"), [0.0, 0.5, 1.0, NAN], [], {"AUROC": "soft labels among 3 labels"}),
        (Task(1, loss="bce"), [0.0, 1.0], ["AUROC"], {}),
        (Task(3, loss="cross_entropy"), [NAN, -100.0], [], {"accuracy": "no labels"}),
        (Task(3, loss="cross_entropy"), [NAN, 2.0], ["accuracy"], {}),
        (Task(1, loss="mse"), [NAN, NAN], [], {"MAE": "no labels", "R2": "no labels"}),
        (Task(1, loss="l1"), [NAN, 3.0], ["MAE"], {"R2": "only 1 label"}),
        (Task(1, loss="huber"), [3.0, NAN, 3.0, 3.0], ["MAE"], {"R2": "all 3 labels are equal"}),
        (Task(1, loss="poisson_nll"), [3.0, 3.0], ["MAE"], {"R2": "all 2 labels are equal"}),
        (Task(2, loss="gaussian_nll"), [3.0, 4.0], ["MAE", "R2"], {}),
        (Task(2, loss="bce"), [[NAN, NAN]] * 2, [], {"AUROC": "no labels"}),
        (
            Task(3, loss="bce"),
            [[0.0, 1.0, NAN], [NAN, 1.0, NAN]],
            [],
            {
                "AUROC": "in none of 3 columns",
                "AUROC[0]": "only 1 label",
                "AUROC[1]": "only one class among 2 labels",
                "AUROC[2]": "no labels",
            },
        ),
        (Task(2, loss="bce"), [[0.0, 1.0], [1.0, 1.0]], ["AUROC"], {"AUROC[1]": "only one class among 2 labels"}),
        (Task(2, loss="mse"), [[0.0, NAN], [1.0, 4.0]], ["MAE", "R2"], {"R2[1]": "only 1 label"}),
    ],
)
def test_left_out_with_a_reason(task: Task, y: Any, values: list[str], left_out: dict[str, str]) -> None:
    results = one(task, y)
    assert list(results["a"]) == values
    assert results.left_out == {("a", metric): why for metric, why in left_out.items()}


def test_nothing_counted() -> None:
    results = TaskMetrics(TASKS).compute()
    assert all(values == {} for values in results.values())
    assert set(results.left_out.values()) == {"no labels"}
    assert len(results.left_out) == 20  # MAE and R2 of eight tasks, and one of four
    assert results.positives == {}


def test_infinite_values_are_left_out() -> None:
    results = one(Task(1, loss="poisson_nll"), [1.0, 2.0], torch.tensor([[1000.0], [1.0]]))
    assert results["a"] == {}
    assert results.left_out == {("a", "MAE"): "came out as inf", ("a", "R2"): "came out as -inf"}


def test_tasks_without_metrics() -> None:
    tasks: dict[str, Task | int] = {
        "free": 3,
        "own": Task(2, loss=torch.nn.functional.mse_loss),
        "a": Task(1, loss="l1"),
    }
    metrics = TaskMetrics(tasks)
    metrics.update({"a": torch.zeros(2, 1)}, {"own": torch.ones(2, 2), "a": torch.ones(2)})  # outputs of "a" do
    results = metrics.compute()
    assert dict(results) == {"free": {}, "own": {}, "a": {"MAE": 1.0}}
    assert results.left_out == {("a", "R2"): "all 2 labels are equal"}
    matrix = torch.tensor([[NAN, 0.0, 1.0], [NAN, 0.0, 1.0]])
    metrics.update({"a": torch.zeros(2, 1)}, matrix)
    assert metrics.compute().labels == {"free": 0, "own": 0, "a": 4}
    matrix[1, 0] = 1.0
    with pytest.raises(ValueError, match=r"y\['free'\]: expected no labels"):
        metrics.update({"a": torch.zeros(2, 1)}, matrix)


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
