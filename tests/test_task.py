"""Task and TaskLayout."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import torch_mtl_pyg as mtl
from torch_mtl_pyg import Task
from torch_mtl_pyg.task import LOSSES, TaskLayout


def test_task_keeps_what_it_was_given() -> None:
    task = Task(7, loss="cross_entropy", label_smoothing=0.1, class_weight=torch.arange(7.0))
    assert (task.out_channels, task.loss, task.weight, task.label_smoothing) == (7, "cross_entropy", 1.0, 0.1)
    assert task.class_weight == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert Task(1, loss="bce", pos_weight=4.0).pos_weight == 4.0
    assert Task(2, loss="bce", pos_weight=[1, 2]).pos_weight == (1.0, 2.0)
    assert Task(1, loss="huber", delta=2, weight=0.5) == Task(1, "huber", 0.5, delta=2.0)
    assert Task(3, loss="bce", pos_weight=np.float32(4)).pos_weight == 4.0
    assert Task(np.int64(3)).out_channels == 3
    assert Task(1, loss=torch.nn.functional.mse_loss).loss is torch.nn.functional.mse_loss
    assert Task(1).level is None
    for level in ("node", "edge", "graph"):
        assert Task(1, level=level).level == level
    for loss in LOSSES:
        assert Task(2, loss=loss).loss == loss


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_channels": 0}, ValueError, "out_channels: expected at least 1, got 0"),
        ({"out_channels": -3}, ValueError, "out_channels: expected at least 1, got -3"),
        ({"out_channels": 2.0}, TypeError, "out_channels: expected an int, got float"),
        ({"out_channels": True}, TypeError, "out_channels: expected an int, got bool"),
        ({"out_channels": "3"}, TypeError, "out_channels: expected an int, got str"),
        ({"loss": "nll"}, ValueError, "loss: expected one of cross_entropy.*got 'nll'"),
        ({"loss": 3}, TypeError, "loss: expected a string, a callable or None, got int"),
        ({"out_channels": 3, "loss": "gaussian_nll"}, ValueError, "two per target.*got 3"),
        ({"level": "hyperedge"}, ValueError, "level: expected one of node, edge, graph, or None, got 'hyperedge'"),
        ({"level": 1}, TypeError, "level: expected a string or None, got int"),
        ({"weight": -1.0}, ValueError, "weight: expected a finite number of at least 0, got -1"),
        ({"weight": float("nan")}, ValueError, "weight: expected a finite number"),
        ({"weight": "1"}, TypeError, "weight: expected a number, got str"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing: is an option of the loss 'cross_entropy'"),
        (
            {"loss": "mse", "pos_weight": 2.0},
            ValueError,
            "pos_weight: is an option of the loss 'bce', got it for 'mse'",
        ),
        ({"loss": "cross_entropy", "label_smoothing": 1.5}, ValueError, r"label_smoothing: .* in \[0, 1\], got 1.5"),
        ({"loss": "cross_entropy", "class_weight": [1.0]}, ValueError, "class_weight: expected 2 numbers.*got 1"),
        ({"loss": "bce", "pos_weight": [1.0, -2.0]}, ValueError, "pos_weight: expected a finite number"),
        (
            {"loss": "bce", "class_weight": np.ones(2)},
            ValueError,
            "class_weight: is an option of the loss 'cross_entropy'",
        ),
        ({"loss": "cross_entropy", "class_weight": 3.0}, TypeError, "class_weight: expected 2 numbers.*got float"),
        ({"loss": "cross_entropy", "class_weight": {0: 1.0, 1: 2.0}}, TypeError, "class_weight: .*numbers.*got dict"),
        ({"loss": "cross_entropy", "class_weight": {1.0, 2.0}}, TypeError, "class_weight: .*numbers.*got set"),
        ({"loss": "bce", "pos_weight": {0: 1.0, 1: 2.0}}, TypeError, "pos_weight: .*got dict"),
        ({"weight": torch.ones(2)}, TypeError, "weight: expected a number, got Tensor"),
        ({"loss": "huber", "delta": 0.0}, ValueError, "delta: expected more than 0"),
    ],
)
def test_bad_task(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Task(**{"out_channels": 2, **arguments})


def test_layout_is_in_the_order_given() -> None:
    layout = TaskLayout({"b": 3, "a": Task(1), "c": 4})
    assert layout.names == ("b", "a", "c")
    assert layout.widths == (3, 1, 4)
    assert layout.offsets == (0, 3, 4)
    assert layout.total == 8
    assert dict(layout.slices) == {"b": slice(0, 3), "a": slice(3, 4), "c": slice(4, 8)}
    assert layout.describe() == [("b", 3), ("a", 1), ("c", 4)]
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other.describe() == layout.describe()
    with pytest.raises(TypeError):
        layout.tasks["d"] = Task(1)  # type: ignore[index]


def test_task_names_and_indices() -> None:
    layout = TaskLayout({"b": 3, "a": 1})
    assert [layout.name(t) for t in ("a", 0, 1, np.int64(1))] == ["a", "b", "a", "a"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task: expected one of 'b', 'a', got 'c'"):
        layout.name("c")
    for index in (2, -1):
        with pytest.raises(IndexError, match=rf"task: expected an index in \[0, 2\), got {index}"):
            layout.name(index)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match="task: expected an int"):
            layout.name(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ({}, ValueError, "tasks: expected at least one task, got an empty dict"),
        ([("a", 1)], TypeError, "tasks: expected a dict.*got list"),
        (3, TypeError, "tasks: expected a dict.*got int"),
        ({1: 2}, TypeError, "tasks: expected names that are strings, got 1"),
        ({"": 2}, ValueError, "names that are not empty"),
        ({"a": 0}, ValueError, r"tasks\['a'\]: out_channels: expected at least 1, got 0"),
        ({"a": "7"}, TypeError, r"tasks\['a'\]: expected a Task or an int, got str"),
        ({"a": None}, TypeError, r"tasks\['a'\]: expected a Task or an int, got NoneType"),
    ],
)
def test_bad_tasks(tasks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskLayout(tasks)


def test_an_array_is_no_index_of_a_task() -> None:
    heads = mtl.MultiTaskHeads(4, {"a": 1, "b": 1})
    with pytest.raises(TypeError, match="task: expected an int, got ndarray"):
        heads(torch.randn(2, 4), task=np.array([0, 1]))  # type: ignore[arg-type]
