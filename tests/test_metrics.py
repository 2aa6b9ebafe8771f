"""TaskMetrics against scikit-learn on the labels that are there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_common import (
    NAN,
    SINGLE,
    TASKS,
    TaskMetrics,
    agree,
    one,
    sk,
    some,
)

from torch_mtl_pyg import Task

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
