"""Figures: what is drawn, read back from the axes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_mtl_pyg import TaskLosses
from torch_mtl_pyg.balancing import task_cosine
from torch_mtl_pyg.plot import conflict_heatmap, conflicts_over_time, loss_curves

pytest.importorskip("matplotlib", reason="figures need the extra [plot]")
NAN = math.nan
LONG = "a name that is longer than any axis wants to show"


def gramians(steps: int, tasks: int) -> Tensor:
    rows = torch.randn(steps, tasks, 6)
    return rows @ rows.mT


def shown(ax: Any) -> np.ndarray:
    """The matrix of a heat map, NaN where nothing is shown."""
    return np.ma.filled(ax.images[0].get_array(), NAN)


def drawn(ax: Any) -> list[np.ndarray]:
    """The y values of the lines, without the dots of lonely points."""
    return [np.asarray(line.get_ydata()) for line in ax.lines if line.get_marker() == "None"]


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def overlap(figure: Any) -> bool:
    """Whether a legend covers an axes."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    return any(legend.get_window_extent(renderer).overlaps(box) for legend in figure.legends for box in boxes)


def test_heatmap_is_the_mean_where_both_have_a_gradient() -> None:
    given = gramians(7, 4)
    given[:3, 2], given[:3, :, 2] = 0.0, 0.0
    given[5] = NAN
    figure = conflict_heatmap(list(given), ["a", "b", "c$", LONG])
    ax, bar = figure.axes
    cosines = task_cosine(given)
    expected = cosines[[0, 1, 2, 3, 4, 6]].mean(0)
    expected[2], expected[:, 2] = cosines[[3, 4, 6], 2].mean(0), cosines[[3, 4, 6], :, 2].mean(0)
    np.testing.assert_allclose(shown(ax), expected, rtol=1e-5, atol=1e-6)
    assert ax.images[0].get_clim() == (-1.0, 1.0)
    red, _, blue, _ = ax.images[0].cmap(0.0)
    assert red > blue and "conflict" in bar.get_ylabel()
    assert ax.get_title() == "mean over 7 steps"
    assert texts(ax)[1] == f"{expected[0, 1]:.2f}" and len(texts(ax)) == 16
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[:3] == ["a", "b", r"c\$"] and len(names[3]) == 24
    figure.draw_without_rendering()


def test_heatmap_of_cosines_is_that_of_gramians() -> None:
    given = gramians(3, 5)
    for part in (given, given[0]):
        first, second = (conflict_heatmap(matrix).axes[0] for matrix in (part, task_cosine(part)))
        np.testing.assert_allclose(shown(first), shown(second), rtol=1e-5, atol=1e-6)
    assert first.get_title() == "one step"


def test_heatmap_thirds_and_pairs_without_a_gradient() -> None:
    given = gramians(8, 3)
    given[:3, 1], given[:3, :, 1] = 0.0, 0.0
    first, last, _ = conflict_heatmap(given, thirds=True).axes
    assert (first.get_title(), last.get_title()) == ("steps 1 to 3", "steps 6 to 8")
    assert np.isnan(shown(first)).sum() == 5 and texts(first)[1] == ""
    np.testing.assert_allclose(shown(last), task_cosine(given[5:]).mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="thirds: expected at least two steps, got 1"):
        conflict_heatmap(given[0], thirds=True)


@pytest.mark.parametrize("tasks", [1, 20, 21, 60, 61, 617])
def test_heatmap_of_few_and_many(tasks: int, tmp_path: Path) -> None:
    file = tmp_path / "map.png"
    ax = conflict_heatmap(gramians(2, tasks), [f"task number {i}" for i in range(tasks)], path=file).axes[0]
    assert file.stat().st_size > 1000
    assert len(ax.texts) == (tasks**2 if tasks <= 20 else 0)
    assert any("task number" in label.get_text() for label in ax.get_xticklabels()) == (tasks <= 60)
    assert ax.get_xlabel() == ("index of the task" if tasks > 60 else "")


def test_conflicts_over_time() -> None:
    opposed, agreed = torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.ones(2, 2)
    three = torch.block_diag(opposed, torch.ones(1, 1))
    three[2, 0] = three[0, 2] = 0.1
    absent = three.clone()
    absent[2], absent[:, 2] = 0.0, 0.0
    nothing = torch.zeros(3, 3)
    ax = conflicts_over_time([three, absent, nothing, three], steps=[0, 10, 20, 30], xlabel="epoch").axes[0]
    np.testing.assert_allclose(drawn(ax)[0], [1 / 3, 1.0, NAN, 1 / 3])
    assert ax.lines[0].get_xdata().tolist() == [0, 10, 20, 30]  # type: ignore[union-attr]
    assert ax.lines[1].get_xdata().tolist() == [30]  # type: ignore[union-attr]
    assert ax.get_xlabel() == "epoch" and "share" in ax.get_ylabel() and ax.get_ylim()[1] < 1.1
    figure = conflicts_over_time([opposed] * 60 + [agreed] * 60)
    each, smooth = drawn(figure.axes[0])
    assert each.tolist() == [1.0] * 60 + [0.0] * 60
    np.testing.assert_allclose(smooth[[0, 50, 59, 60, 61, 119]], [1, 1, 4 / 6, 3 / 6, 2 / 6, 0])
    assert not overlap(figure)
    assert conflicts_over_time(torch.ones(4, 1, 1)).axes[0].get_title() == "One task: no pairs"


def losses(per_task: list[float], count: list[int]) -> TaskLosses:
    values = torch.tensor(per_task, requires_grad=True)
    return TaskLosses(("kind", "flag"), values, values.sum(), torch.tensor(count))


@pytest.mark.parametrize("kind", ["losses", "tensors", "matrix", "dict"])
def test_loss_curves_have_gaps(kind: str) -> None:
    rows = [[3.0, 1.0], [2.0, NAN], [1.5, 0.5], [1.0, NAN]]
    history: Any = {
        "losses": [losses([a, 0.0 if b != b else b], [5, int(b == b)]) for a, b in rows],
        "tensors": [torch.tensor(row) for row in rows],
        "matrix": torch.tensor(rows),
        "dict": {"kind": [row[0] for row in rows], "flag": [1.0, None, 0.5, math.inf]},
    }[kind]
    figure = loss_curves(history, ["kind", "flag"] if kind in ("tensors", "matrix") else None)
    (ax,) = figure.axes
    np.testing.assert_array_equal(drawn(ax), np.array(rows).T)
    dots = [line for line in ax.lines if line.get_marker() == "." and len(line.get_xdata())]  # type: ignore[arg-type]
    assert [line.get_xdata().tolist() for line in dots] == [[1.0, 3.0]]  # type: ignore[union-attr]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kind", "flag"]
    assert not overlap(figure)
    assert figure.get_supylabel() == "loss (mean over labels)" and figure.get_supxlabel() == "step"


@pytest.mark.parametrize("tasks", [1, 6, 7, 12, 30])
def test_each_task_is_a_line(tasks: int, tmp_path: Path) -> None:
    history = torch.rand(9, tasks)
    figure = loss_curves(history, [LONG, *(f"t{i}" for i in range(1, tasks))], xlabel="epoch", path=tmp_path / "a.svg")
    assert len(figure.axes) == (1 if tasks <= 6 else tasks)
    lines = [line for ax in figure.axes for line in drawn(ax)]
    np.testing.assert_allclose(lines, history.T)
    assert len(figure.legends) == (1 < tasks <= 6) and not overlap(figure)
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_many_tasks_are_bands() -> None:
    history = torch.rand(20, 617)
    history[3, 5:], history[7] = NAN, NAN
    figure = loss_curves(history)
    (ax,) = figure.axes
    assert "617 tasks" in ax.get_title() and "quantiles" in ax.get_title()
    medians = [NAN if row.isnan().all() else np.nanmedian(row.numpy()) for row in history]
    np.testing.assert_allclose(drawn(ax)[0], medians, rtol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["5 to 95 %", "25 to 75 %", "median"]
    assert not overlap(figure)


def test_log_scale() -> None:
    figure = loss_curves(torch.tensor([[1.0, 2.0], [0.1, 0.0], [0.01, -1.0]]), log=True)
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(drawn(ax), [[1.0, 0.1, 0.01], [2.0, NAN, NAN]])
    assert "values of 0 or less left out" in figure.get_supylabel()
    for low, high in ((0.3, 0.7), (0.9, 1.1), (1e-9, 1.0), (0.02, 0.9)):
        ax = loss_curves(torch.linspace(low, high, 9).unsqueeze(1), log=True).axes[0]
        bottom, top = ax.get_ylim()
        assert 2 <= sum(bottom <= tick <= top for tick in ax.get_yticks()) <= 10
        assert "left out" not in ax.figure.get_supylabel()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: conflict_heatmap([]),
            ValueError,
            r"gramians: expected matrices \[T, T\] of one size, got shapes \[\]",
        ),
        (lambda: conflict_heatmap([torch.eye(2), torch.eye(3)]), ValueError, r"got shapes \[\(2, 2\), \(3, 3\)\]"),
        (lambda: conflict_heatmap(torch.ones(2, 3)), ValueError, r"got shapes \[\(2, 3\)\]"),
        (lambda: conflict_heatmap([1.0]), TypeError, "gramians: expected a tensor or a sequence of tensors, got list"),
        (lambda: conflict_heatmap(torch.eye(2), ["a"]), ValueError, "names: expected 2, one per task, got 1"),
        (lambda: conflicts_over_time(torch.eye(2), steps=[1, 2]), ValueError, "steps: expected 1, one per step, got 2"),
        (lambda: loss_curves([]), ValueError, "history: expected losses .* of 0 steps"),
        (lambda: loss_curves([torch.ones(2), torch.ones(3)]), ValueError, "history: expected losses .* of 2 steps"),
        (lambda: loss_curves({}), ValueError, "history: expected losses"),
        (lambda: loss_curves({"a": [1.0], "b": [1.0, 2.0]}), ValueError, "history: expected as many losses of each"),
        (lambda: loss_curves({"a": [1.0]}, ["b"]), ValueError, r"names: expected some of \['a'\], got \['b'\]"),
        (lambda: loss_curves([losses([1.0, 2.0], [1, 1]), torch.ones(2)]), ValueError, "history: .*the same tasks"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_global_state() -> None:
    code = """
import sys
import torch, torch_mtl_pyg, torch_mtl_pyg.plot as plot
assert "matplotlib" not in sys.modules
figure = plot.conflict_heatmap(torch.eye(3))
plot.loss_curves(torch.rand(4, 8)), plot.conflicts_over_time(torch.eye(3))
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")] + ["matplotlib"]:
    sys.modules[name] = None
try:
    plot.conflict_heatmap(torch.eye(3))
except ImportError as error:
    assert "torch_mtl_pyg[plot]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
