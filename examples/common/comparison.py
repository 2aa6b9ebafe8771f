"""Several methods over several seeds: the paired differences to one of them, as a table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from .report import aligned, mean_std

Rows = Mapping[str, Mapping[str, Sequence[float]]]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t-interval of the mean; infinite for a single value."""
    n = len(differences)
    if n < 2:
        return float(np.mean(differences)), float("inf")
    error = np.std(differences, ddof=1) / np.sqrt(n)
    return float(np.mean(differences)), float(scipy.stats.t.ppf(0.975, df=n - 1) * error)


def paired(rows: Rows, name: str, baseline: str, metric: str = "AUROC") -> list[float]:
    """Differences of the mean test metric to the baseline, seed by seed."""
    return [a - b for a, b in zip(rows[name][metric], rows[baseline][metric], strict=True)]


def comparison_table(rows: Rows, baseline: str, metric: str = "AUROC") -> str:
    """One line per method.

    Args:
        rows: Method to the metric (its mean over the tasks, on test), ``"conflicts"`` (share of pairs; empty where
            there are none) and ``"seconds"`` (per epoch; the median over the seeds is shown), each with one value per
            seed.
        baseline: The method that the others are compared with.
        metric: What the metric is called.
    """
    differs = f"difference to {baseline}"
    lines: list[Sequence[str]] = [
        ("method", f"mean test {metric}", differs, "95 % interval", "pairs in conflict", "s per epoch")
    ]
    for name, row in rows.items():
        difference, reach = "", ""
        if name != baseline:
            mean, half = interval(paired(rows, name, baseline, metric))
            difference = f"{mean:+.4f}"
            reach = f"{mean - half:+.4f} to {mean + half:+.4f}" if np.isfinite(half) else "needs 2 seeds"
        conflicts = f"{np.mean(row['conflicts']):.1%}" if len(row["conflicts"]) else "-"
        lines.append((name, mean_std(row[metric]), difference, reach, conflicts, f"{np.median(row['seconds']):.2f}"))
    return aligned(lines, left=1)


def comparison_verdict(rows: Rows, baseline: str, metric: str = "AUROC", higher: bool = True) -> str:
    """What the differences of the mean test metric say; ``higher`` tells whether more of it is better.

    A difference counts as one only where the 95 % t-interval over at least three seeds leaves out zero. The seeds share
    one data set and split, so this is about seeds, not about other data.
    """
    seeds = len(rows[baseline][metric])
    if seeds < 3:
        return f"{seeds} seed(s) cannot tell a difference to {baseline} from noise; use 3 or more."
    words: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for name in rows:
        if name != baseline:
            mean, half = interval(paired(rows, name, baseline, metric))
            key = "no clear difference" if abs(mean) <= half else "better" if (mean > 0) == higher else "worse"
            words[key].append(f"{name} ({mean:+.4f})")
    found = "; ".join(f"{key}: {', '.join(names)}" for key, names in words.items() if names)
    paired_by = f"over {seeds} seeds (95 % t-interval of the paired difference)"
    return f"Mean test {metric} against {baseline} {paired_by}: {found}."


def tasks_table(scores: Mapping[str, Mapping[str, Sequence[float]]], metric: str = "AUROC") -> str:
    """One line per task, one column per method: the metric on test.

    Args:
        scores: Method to task to one value per seed; a seed in which the metric is not defined has none.
    """
    tasks = list(dict.fromkeys(task for method in scores.values() for task in method))
    lines: list[Sequence[str]] = [(f"test {metric}", *scores)]
    for task in tasks:
        values = [method.get(task, ()) for method in scores.values()]
        lines.append((task, *(mean_std(v) if len(v) else "-" for v in values)))
    return aligned(lines, left=1)
