"""Learning curves as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .data import MultiTaskGraph
from .training import Result

# Blue and orange of the Okabe-Ito palette, told apart with every common colour blindness, and by line style in grey.
STYLES = {"single-task": ("#0072B2", "--"), "multi-task": ("#D55E00", "-")}


def learning_curves(
    graph: MultiTaskGraph, single: Sequence[dict[str, Result]], multi: Sequence[Result], path: Path
) -> None:
    """Saves one panel per task: validation metric over the epochs, mean and range over the seeds."""
    figure = Figure(figsize=(4.2 * len(graph.tasks), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(graph.tasks), squeeze=False)[0]
    for ax, (name, task) in zip(axes, graph.tasks.items(), strict=True):
        for label, runs in (("single-task", [models[name] for models in single]), ("multi-task", list(multi))):
            colour, line = STYLES[label]
            values = np.array([run.val[name] for run in runs])
            epochs = runs[0].epochs
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            ax.plot(epochs, values.mean(axis=0), line, color=colour, label=label)
        ax.axhline(task.chance, color="0.5", linewidth=1, linestyle=":", label="chance")
        # The first epochs of R2 can be far below zero; the curves of interest are above chance.
        ax.set_ylim(bottom=task.chance - 0.05 * (1 - task.chance) - 0.02)
        ax.set_title(f"{name} ({task.kind})")
        ax.set_xlabel("epoch")
        unit = {"accuracy": "validation accuracy (fraction)", "AUROC": "validation AUROC", "R2": "validation $R^2$"}
        ax.set_ylabel(unit[task.spec.metric_name])
        ax.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    seeds = f"mean and range over {len(multi)} seeds" if len(multi) > 1 else "one seed"
    figure.suptitle(f"{graph.name}: validation metric while training, {seeds}")
    figure.savefig(path, dpi=130)
