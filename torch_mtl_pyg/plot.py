"""Figures of a multi-task training: which tasks conflict, and how the losses fall. Needs the extra ``[plot]``.

All return a ``matplotlib.figure.Figure``, made without pyplot: no global state, no window, no backend chosen. With
``path``, they save it; the ending tells the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .balancing.conflicts import Floats, Gramians, as_matrices, conflicting_share, mean_cosine, mean_of
from .task import TaskLosses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | PathLike[str]
History = Mapping[str, Sequence[float | None]] | Sequence[TaskLosses] | Sequence[Tensor] | Tensor

# Okabe-Ito, told apart with every common colour blindness; lines differ in style too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_MOST_NUMBERED = 20  # tasks whose cells have room for a number
_MOST_NAMED = 60  # tasks whose names have room beside a matrix
_MOST_PANELS = 30  # tasks that have room for a panel each


def conflict_heatmap(
    gramians: Gramians, names: Sequence[str] | None = None, *, thirds: bool = False, path: Path | None = None
) -> Figure:
    """Shows which tasks conflict: the mean cosine of their gradients, as a matrix.

    The mean of a pair is over the steps in which both have a gradient (a task without labels has none); a pair that
    never has is grey. NaN, of a step that went wrong, does not count either. Up to 20 tasks have their numbers in the
    cells, and up to 60 their names at the sides. Colours run from -1 (red) over 0 (white) to 1 (blue).

    Args:
        gramians: ``[T, T]``, ``[S, T, T]`` or a sequence of ``[T, T]``: the Gramians (or cosines) of ``S`` steps.
        names: Names of the ``T`` tasks.
        thirds: Shows the first and the last third of the steps side by side, instead of the mean over all.
        path: Where to save the figure, if anywhere.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: ``gramians`` are no square matrices of one size, ``names`` are not ``T``, or ``thirds``
            has fewer than two steps.
    """
    matrices = as_matrices(gramians)
    steps, tasks = len(matrices), len(matrices[0])
    labels = _labels(names, tasks)
    parts = {"one step" if steps == 1 else f"mean over {steps} steps": matrices}
    if thirds:
        if steps < 2:
            raise ValueError(f"thirds: expected at least two steps, got {steps}.")
        third = math.ceil(steps / 3)
        parts = {f"steps 1 to {third}": matrices[:third], f"steps {steps - third + 1} to {steps}": matrices[-third:]}
    side = min(max(0.42 * tasks, 2.6), 10.0)
    room = 0.08 * max(map(len, labels)) if tasks <= _MOST_NAMED else 0.4
    figure = _figure((side + room) * len(parts) + 1.2, side + room + 0.4)
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for ax, (title, part) in zip(panels, parts.items(), strict=True):
        image = _matrix(ax, mean_cosine(part), labels)
        ax.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=list(panels), label="cosine of the gradients (below 0: conflict)", shrink=0.9)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def conflicts_over_time(
    gramians: Gramians, *, steps: Sequence[float] | None = None, xlabel: str = "step", path: Path | None = None
) -> Figure:
    """Shows the share of task pairs that conflict (cosine below 0), step by step.

    The share is of the pairs in which both tasks have a gradient; a step without any is a gap. With more than 50 steps,
    a running mean over a twentieth of them is drawn on top.

    Args:
        gramians: As for :func:`conflict_heatmap`, which also tells the errors.
        steps: ``S`` positions on the x axis; 1, 2, ... by default.
        xlabel: What they are.
        path: Where to save the figure, if anywhere.
    """
    matrices = as_matrices(gramians)
    count, tasks = len(matrices), len(matrices[0])
    x, share = _positions(steps, count), np.array([conflicting_share(matrix) for matrix in matrices])
    figure = _figure(6.4, 3.8)
    ax = figure.subplots()
    many, window = count > 50, max(count // 20, 2)
    _line(ax, x, share, color=_COLOURS[0], linewidth=1.0, alpha=0.35 if many else 1.0, label="each step")
    if many:
        near = np.lib.stride_tricks.sliding_window_view(np.pad(share, window // 2, constant_values=np.nan), window)
        _line(ax, x, mean_of(near[:count].T), color=_COLOURS[0], label=f"mean over {window} steps")
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    ax.set(xlabel=xlabel, ylabel="share of task pairs with cosine < 0", ylim=(-0.03, 1.03))
    ax.set_title(
        f"Conflicts among {tasks} tasks ({tasks * (tasks - 1) // 2} pairs)" if tasks > 1 else "One task: no pairs"
    )
    _grid(ax, steps is None)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def loss_curves(
    history: History,
    names: Sequence[str] | None = None,
    *,
    log: bool = False,
    steps: Sequence[float] | None = None,
    xlabel: str = "step",
    path: Path | None = None,
) -> Figure:
    """Shows the loss of each task over the steps.

    Up to 6 tasks are lines in one panel, up to 30 have a panel each with a y axis of its own. More are drawn as the
    median over the tasks and bands of quantiles, as the title says. A task without labels in a step leaves a gap,
    and so does a loss that is not finite.

    Args:
        history: The losses of ``S`` steps: :class:`~torch_mtl_pyg.TaskLosses`, which know where labels were missing, or
            ``[T]`` each (or ``[S, T]``), with NaN where they were; or a dict from name to ``S`` numbers or None.
        names: Names of the ``T`` tasks, for losses that do not bring them.
        log: Logarithmic y axis. Losses that are not positive have no place there; the axis says if there are any.
        steps: ``S`` positions on the x axis; 1, 2, ... by default.
        xlabel: What they are.
        path: Where to save the figure, if anywhere.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The history is empty, its steps differ in their tasks, or ``names`` or ``steps`` do not fit it.
    """
    losses, names = _losses(history, names)
    count, tasks = losses.shape
    labels, x = _labels(names, tasks), _positions(steps, count)
    ylabel = "loss (mean over labels)"
    if log and (losses <= 0).any():
        ylabel += ",\nvalues of 0 or less left out"
        losses = np.where(losses > 0, losses, np.nan)
    if len(_COLOURS) < tasks <= _MOST_PANELS:
        columns = math.ceil(math.sqrt(tasks * 1.2))
        rows = math.ceil(tasks / columns)
        figure = _figure(2.3 * columns, 1.7 * rows + 0.6)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for ax in grid[tasks:]:
            ax.remove()
        for i, ax in enumerate(grid[:tasks]):
            _line(ax, x, losses[:, i], color=_COLOURS[0])
            ax.set_title(labels[i], fontsize="small")
            _grid(ax, steps is None, log)
            ax.tick_params(labelsize="x-small", labelbottom=i + columns >= tasks)
        figure.suptitle("Loss of each task")
    else:
        figure = _figure(6.8, 4.0)
        ax = figure.subplots()
        if tasks <= len(_COLOURS):
            ax.set_title("Loss of each task" if tasks > 1 else f"Loss of {labels[0]}")
            for i, name in enumerate(labels):
                _line(ax, x, losses[:, i], color=_COLOURS[i], linestyle=_STYLES[i], label=name)
        else:
            ax.set_title(f"Losses of {tasks} tasks:\nmedian and quantiles over the tasks")
            _bands(ax, x, losses)
        _grid(ax, steps is None, log)
        if tasks > 1:
            figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


# ---- What is drawn.


def _matrix(ax: Axes, mean: Floats, labels: Sequence[str]) -> Any:
    from matplotlib import colormaps

    image = ax.imshow(mean, cmap=colormaps["RdBu"].with_extremes(bad="0.85"), vmin=-1.0, vmax=1.0)
    if len(labels) > _MOST_NAMED:
        ax.set(xlabel="index of the task", ylabel="index of the task")
        return image
    size = 9.0 if len(labels) <= 30 else 5.5
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    if len(labels) <= _MOST_NUMBERED:
        for (i, j), value in np.ndenumerate(mean):
            colour = "white" if abs(value) > 0.6 else "black"
            text = "" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
            ax.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    return image


def _line(ax: Axes, x: Floats, y: Floats, **style: Any) -> None:
    """A line with gaps at NaN, and dots for points that have no neighbour."""
    ax.plot(x, y, **style)
    gap = np.isnan(np.pad(y, 1, constant_values=np.nan))
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]
    ax.plot(x[alone], y[alone], ".", color=style["color"], alpha=style.get("alpha", 1.0))


def _bands(ax: Axes, x: Floats, losses: Floats) -> None:
    levels = np.full((5, len(x)), np.nan)
    seen = ~np.isnan(losses).all(1)
    if seen.any():
        levels[:, seen] = np.nanquantile(losses[seen], [0.05, 0.25, 0.5, 0.75, 0.95], axis=1)
    ax.fill_between(x, levels[0], levels[4], color=_COLOURS[0], alpha=0.15, linewidth=0, label="5 to 95 %")
    ax.fill_between(x, levels[1], levels[3], color=_COLOURS[0], alpha=0.35, linewidth=0, label="25 to 75 %")
    _line(ax, x, levels[2], color=_COLOURS[0], label="median")


def _grid(ax: Axes, whole: bool, log: bool = False) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=whole, steps=[1, 2, 5, 10]))
    if log:
        ax.set_yscale("log")
        # Powers of ten alone would leave a narrow axis with one number or none.
        low, high = ax.dataLim.intervaly
        few = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
        ax.yaxis.set_major_locator(MaxNLocator(4) if high < 4 * low else few)
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'torch_mtl_pyg[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- What is given.


def _losses(history: Any, names: Sequence[str] | None) -> tuple[Floats, Sequence[str] | None]:
    """``[S, T]``, and the names if they are known."""
    if isinstance(history, Mapping):
        names = list(history) if names is None else names
        if set(names) - set(history):
            raise ValueError(f"names: expected some of {list(history)}, got {list(names)}.")
        if len({len(history[name]) for name in names}) > 1:
            raise ValueError("history: expected as many losses of each task.")
        rows: list[Any] = list(zip(*(history[name] for name in names), strict=True))
    else:
        rows = list(history)
        if rows and isinstance(rows[0], TaskLosses):
            if any(not isinstance(row, TaskLosses) or row.names != rows[0].names for row in rows):
                raise ValueError("history: expected the same tasks in every step.")
            names = rows[0].names if names is None else names
            rows = [torch.where(row.count > 0, row.per_task, float("nan")) for row in rows]
        rows = [row.detach().cpu().double().numpy() if isinstance(row, Tensor) else row for row in rows]
    shapes = {np.shape(row) for row in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] == 0:
        raise ValueError(f"history: expected losses [T] of the same tasks in every step, of {len(rows)} steps.")
    losses = np.array(rows, dtype=np.float64)
    return np.where(np.isfinite(losses), losses, np.nan), names


def _labels(names: Sequence[str] | None, tasks: int) -> list[str]:
    names = [f"task {i}" for i in range(tasks)] if names is None else names
    if len(names) != tasks:
        raise ValueError(f"names: expected {tasks}, one per task, got {len(names)}.")
    short = [name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    return [name.replace("$", r"\$") for name in short]  # a dollar sign would start a formula


def _positions(steps: Sequence[float] | None, count: int) -> Floats:
    if steps is not None and len(steps) != count:
        raise ValueError(f"steps: expected {count}, one per step, got {len(steps)}.")
    return np.arange(1.0, count + 1.0) if steps is None else np.asarray(steps, dtype=np.float64)
