"""What the runs on molecules say: tables and a sentence, figures, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torch_mtl_pyg.plot import conflict_heatmap, conflicts_over_time, loss_curves

from .comparison import comparison_table, comparison_verdict, interval, paired
from .molecule_tables import save_csv, scores_table, test_table
from .molecule_training import Run
from .molecules import Molecules
from .report import mean_std, save_json

BASELINE = "none"
SINGLE = "single-task"


def summarise(runs: Mapping[str, Sequence[Run]], single: Sequence[Mapping[str, Run]]) -> dict[str, Any]:
    """The numbers of all runs as plain data.

    Args:
        runs: Method to one run per seed.
        single: Per seed, task to the run of the model that has this task alone; may be empty.

    Returns:
        ``methods`` maps a method to one value per seed of the metric (``AUROC`` or ``MAE/std``, its mean over the tasks
        on test), ``conflicts`` (share of task pairs), ``seconds`` (per epoch of training, their median), ``tasks`` (the
        metric of each) and to its ``runs``. With several methods also ``differences`` and ``verdict``.
    """
    kind = next(iter(runs.values()))[0].kind
    metric = kind.title
    methods = {method: _row(per_seed) for method, per_seed in runs.items()}
    if single:
        methods[SINGLE] = {
            metric: [float(np.mean([run.score for run in models.values()])) for models in single],
            "conflicts": [],
            "seconds": [float(sum(np.median(run.seconds) for run in models.values())) for models in single],
            "tasks": {task: [models[task].score for models in single] for task in single[0]},
            "runs": [{task: _run(run) for task, run in models.items()} for models in single],
        }
    summary: dict[str, Any] = {"methods": methods}
    if len(methods) > 1:
        seeds = len(methods[BASELINE][metric])
        summary["differences"] = {}
        for method in methods:
            if method != BASELINE:
                mean, half = interval(paired(methods, method, BASELINE, metric))
                summary["differences"][method] = {"mean": mean, "half_width_95": half if seeds > 1 else None}
        summary["verdict"] = comparison_verdict(methods, BASELINE, metric, kind.higher)
    return summary


def in_words(runs: Mapping[str, Sequence[Run]], summary: Mapping[str, Any], molecules: Molecules) -> str:
    """The tables, and with several methods the verdict."""
    methods = summary["methods"]
    first = next(iter(runs.values()))
    metric = first[0].kind.title
    chosen = f"best mean validation {metric}"
    if len(methods) == 1 and len(first) == 1:
        run = first[0]
        text = f"Test, at epoch {run.best_epoch}, the one with the {chosen}:\n\n{test_table(run, molecules)}"
        return f"{text}\n\n{run.conflicts:.1%} of the task pairs in conflict (mean over the steps looked at)."
    seeds = f" (mean +- standard deviation over {len(first)} seeds)" if len(first) > 1 else ""
    text = f"Test {metric}, at the epoch with the {chosen}{seeds}:\n\n"
    text += scores_table({method: row["tasks"] for method, row in methods.items()}, first[0])
    if len(methods) == 1:
        row = methods[next(iter(methods))]
        conflicts = f"{np.mean(row['conflicts']):.1%}"
        return f"{text}\n\nMean over the tasks: {mean_std(row[metric])}. Task pairs in conflict: {conflicts}."
    return f"{text}\n\n{comparison_table(methods, BASELINE, metric)}\n\n{summary['verdict']}"


def save_all(
    runs: Mapping[str, Sequence[Run]], single: Sequence[Mapping[str, Run]], summary: dict[str, Any], out: Path
) -> list[Path]:
    """Saves ``metrics.json``, ``tasks.csv`` and the figures of the first seed of each method; returns the files."""
    paths = [out / "metrics.json", out / "tasks.csv"]
    save_json(summary, paths[0])
    save_csv(runs, single, paths[1])
    for method, per_seed in runs.items():
        run = per_seed[0]
        figures = [out / f"{figure}_{method}.png" for figure in ("conflicts", "conflicts_over_time", "losses")]
        conflict_heatmap(run.cosines, run.names, thirds=len(run.cosines) > 1, path=figures[0])
        conflicts_over_time(run.cosines, steps=run.steps, path=figures[1])
        loss_curves(run.losses, run.names, xlabel="epoch", path=figures[2])
        paths += figures
    return paths


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    tests = [run.test for run in runs if run.test is not None]
    kind = runs[0].kind
    names, metric = runs[0].names, kind.metric
    return {
        kind.title: [run.score for run in runs],
        "conflicts": [run.conflicts for run in runs],
        "seconds": [float(np.median(run.seconds)) for run in runs],
        "tasks": {task: [test[task][metric] for test in tests if metric in test[task]] for task in names},
        "runs": [_run(run) for run in runs],
    }


def _run(run: Run) -> dict[str, Any]:
    assert run.test is not None
    return {
        "seed": run.seed,
        "parameters": run.parameters,
        "total_loss": run.total,
        f"validation_{run.kind.title}": run.val,
        "best_epoch": run.best_epoch,
        "test": run.test.to_dict(),
    }
