"""Tables of the test metrics of each task: all of a few, quantiles and the ends of many, and a CSV of everything."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .comparison import tasks_table
from .molecule_training import Run
from .molecules import Molecules
from .report import aligned

MOST_SHOWN = 30  # tasks that have room for a line each
ENDS = 5  # of more tasks, how many of the best and of the worst are named
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def test_table(run: Run, molecules: Molecules) -> str:
    """The test metrics of one run, a line for each task if they are few."""
    assert run.test is not None
    if len(run.names) > MOST_SHOWN:
        return many_table({"all": {task: [v[run.kind.metric]] for task, v in _found(run).items()}}, run)
    return run.test.table() if molecules.scale is None else units_table(run, molecules)


def scores_table(scores: Mapping[str, Mapping[str, Sequence[float]]], run: Run) -> str:
    """The test metric of several methods.

    Args:
        scores: Method to task to one value per seed; a seed in which the metric is not defined has none.
        run: One of the runs, which knows the tasks.
    """
    return tasks_table(scores, run.kind.title) if len(run.names) <= MOST_SHOWN else many_table(scores, run)


def units_table(run: Run, molecules: Molecules) -> str:
    """One run's test errors in the units of the labels beside those of the standardised labels."""
    assert run.test is not None and molecules.scale is not None
    lines: list[Sequence[str]] = [("task", "labels", "std (train)", "MAE", "MAE/std", "R2")]
    for task, scale in zip(run.names, molecules.scale.tolist(), strict=True):
        values, labels = run.test[task], run.test.labels[task]
        error, r2 = values["MAE"], f"{values['R2']:.3f}" if "R2" in values else "-"
        lines.append((task, str(labels), f"{scale:.4f}", f"{error * scale:.4f}", f"{error:.3f}", r2))
    r2s = [values["R2"] for values in run.test.values() if "R2" in values]
    mean = f"{np.mean(r2s):.3f}" if r2s else "-"
    return aligned([*lines, ("mean", "", "", "", f"{run.test.mean('MAE'):.3f}", mean)], left=1)


def many_table(scores: Mapping[str, Mapping[str, Sequence[float]]], run: Run) -> str:
    """Quantiles over the tasks, and the tasks at both ends; of several seeds each task's mean."""
    assert run.test is not None
    means = {method: {t: float(np.mean(v)) for t, v in tasks.items() if len(v)} for method, tasks in scores.items()}
    title = f"test {run.kind.title}"
    lines: list[Sequence[str]] = [("quantile over the tasks", *(f"{title}, {method}" for method in means))]
    for q in QUANTILES:
        lines.append((f"{q:.0%}", *(f"{np.quantile(list(values.values()), q):.3f}" for values in means.values())))
    lines.append(("mean", *(f"{np.mean(list(values.values())):.3f}" for values in means.values())))
    lines.append(("tasks that have it", *(f"{len(values)} of {len(run.names)}" for values in means.values())))
    text = [aligned(lines, left=1)]
    first, values = next(iter(means.items()))
    order = sorted(values, key=lambda task: values[task], reverse=run.kind.higher)
    ends = {"best": order[:ENDS], "worst": order[-ENDS:]}
    rows: list[Sequence[str]] = [(f"of {first}", "task", "test labels", "positives", title)]
    for end, tasks in ends.items():
        for task in tasks:
            positives = run.test.positives.get(task)
            share = "-" if positives is None else f"{positives:.3f}"
            rows.append((end, task, str(run.test.labels[task]), share, f"{values[task]:.3f}"))
    return "\n\n".join([*text, aligned(rows, left=2)])


def save_csv(runs: Mapping[str, Sequence[Run]], single: Sequence[Mapping[str, Run]], path: Path) -> None:
    """Writes the test metrics of each task, method and seed, a row each; empty where a metric is not defined."""
    every = [(method, run, run.names) for method, per_seed in runs.items() for run in per_seed]
    every += [("single-task", run, (task,)) for models in single for task, run in models.items()]
    metrics = list(dict.fromkeys(m for _, run, _ in every for values in _found(run).values() for m in values))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "task", "test_labels", "positives", *metrics])
        for method, run, tasks in every:
            assert run.test is not None
            for task in tasks:
                values = [run.test[task].get(metric, "") for metric in metrics]
                about = [run.test.labels[task], run.test.positives.get(task, "")]
                writer.writerow([method, run.seed, task, *about, *values])


def _found(run: Run) -> dict[str, dict[str, float]]:
    assert run.test is not None
    return {task: values for task, values in run.test.items() if run.kind.metric in values}
