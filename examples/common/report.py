"""The table of test metrics, its plain-words reading, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from .data import MultiTaskGraph
from .training import Result

HEADER = ("task", "type", "metric", "chance", "own features", "single-task", "multi-task", "difference")


def summarise(
    graph: MultiTaskGraph, own: Sequence[dict[str, float]], single: Sequence[dict[str, Result]], multi: Sequence[Result]
) -> dict[str, Any]:
    """Test metrics of every task, one value per seed; the three sequences run over the seeds.

    Args:
        graph: The graph the models were trained on; gives each task's type and metric.
        own: Test metrics of the linear models on a node's own features.
        single: The single-task models, by task name.
        multi: The multi-task models.

    Returns:
        ``tasks`` maps each task to its type, metric, chance level, per-seed lists and the difference multi - single;
        ``models`` maps each model to its number of parameters and its mean training time in seconds.
    """
    tasks = {}
    for name, task in graph.tasks.items():
        columns = {
            "own features": [scores[name] for scores in own],
            "single-task": [models[name].test[name] for models in single],
            "multi-task": [model.test[name] for model in multi],
        }
        columns["difference"] = [m - s for m, s in zip(columns["multi-task"], columns["single-task"], strict=True)]
        tasks[name] = {"type": task.kind, "metric": task.spec.metric_name, "chance": task.chance, **columns}
    trained = {f"single-task {name}": [models[name] for models in single] for name in graph.tasks}
    trained["multi-task"] = list(multi)
    models = {
        name: {"parameters": runs[0].parameters, "seconds": float(np.mean([run.seconds for run in runs]))}
        for name, runs in trained.items()
    }
    return {"tasks": tasks, "models": models}


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows as text with aligned columns, the first ``left`` columns to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines = ["  ".join(f(cell, w) for f, cell, w in zip(align, row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def mean_std(values: Sequence[float], sign: str = "") -> str:
    """``mean +- std`` over the seeds; the mean alone for a single seed."""
    mean = f"{np.mean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} +- {np.std(values, ddof=1):.3f}"


def metrics_table(tasks: dict[str, Any]) -> str:
    """One row per task: chance, own features, single-task, multi-task and their difference."""
    rows: list[Sequence[str]] = [HEADER]
    for name, t in tasks.items():
        cells = [mean_std(t[column]) for column in ("own features", "single-task", "multi-task")]
        rows.append([name, t["type"], t["metric"], f"{t['chance']:.3f}", *cells, mean_std(t["difference"], "+")])
    return aligned(rows, left=3)


def models_table(models: dict[str, Any]) -> str:
    """One row per model: parameters and seconds."""
    rows: list[Sequence[str]] = [("model", "parameters", "seconds")]
    rows += [(name, f"{m['parameters']:,}", f"{m['seconds']:.1f}") for name, m in models.items()]
    total = sum(m["seconds"] for name, m in models.items() if name != "multi-task")
    parameters = sum(m["parameters"] for name, m in models.items() if name != "multi-task")
    rows.append(("all single-task models", f"{parameters:,}", f"{total:.1f}"))
    return aligned(rows, left=1)


def verdict(tasks: dict[str, Any]) -> str:
    """What the differences say, task by task.

    A difference counts as one only where the 95 % t-interval of its mean over at least three seeds leaves out zero. The
    seeds share one data set, so this is about seeds (and splits), not about other data.
    """
    seeds = len(next(iter(tasks.values()))["difference"])
    if seeds < 3:
        return f"{seeds} seed(s) cannot tell a difference between multi-task and single-task from noise; use 3 or more."
    words: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for name, t in tasks.items():
        mean, error = np.mean(t["difference"]), np.std(t["difference"], ddof=1) / np.sqrt(seeds)
        half_width = scipy.stats.t.ppf(0.975, df=seeds - 1) * error
        key = "no clear difference" if abs(mean) <= half_width else "better" if mean > 0 else "worse"
        words[key].append(name)
    found = "; ".join(f"{key}: {', '.join(names)}" for key, names in words.items() if names)
    return f"Multi-task against single-task over {seeds} seeds (95 % t-interval of the paired difference): {found}."


def save_json(summary: dict[str, Any], path: Path) -> None:
    """Writes the summary, readable by people too."""
    path.write_text(json.dumps(summary, indent=2) + "\n")
