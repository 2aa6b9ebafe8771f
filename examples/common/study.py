"""One multi-task model against one single-task model per task: options, all runs, tables, figure and JSON."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sklearn
import torch
import torch_geometric
from tqdm import tqdm

from .baselines import own_features
from .data import MultiTaskGraph
from .plots import learning_curves
from .report import metrics_table, models_table, save_json, summarise, verdict
from .training import ModelOf, MultiTaskGNN, Result, train


def parser(description: str, out: Path) -> argparse.ArgumentParser:
    """The options that all studies have."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--out", type=Path, default=out, help="folder for the figure and the metrics")
    p.add_argument("--epochs", type=int, help="training epochs of every model (default: the data set's)")
    p.add_argument("--seed", type=int, default=0, help="first seed: of split (digits), weights and dropout")
    p.add_argument("--runs", type=int, default=3, help="number of seeds, counted up from --seed")
    p.add_argument("--device", default="cpu", help="a torch device")
    p.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")
    return p


def parsed(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, numbers checked; ends the program with a message where one is wrong."""
    args = p.parse_args(argv)
    for name in ("epochs", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} must be at least 1, got {value}")
    return args


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds of the runs."""
    return range(args.seed, args.seed + args.runs)


def study(
    graphs: Sequence[MultiTaskGraph], args: argparse.Namespace, multi_task: ModelOf = MultiTaskGNN,
    single_task: ModelOf = MultiTaskGNN,
) -> dict[str, Any]:  # fmt: skip
    """Trains all models, prints the tables, and returns what it saves as ``metrics.json``.

    Args:
        graphs: One for each seed.
        args: The options of :func:`parser`.
        multi_task: Makes the model of all tasks.
        single_task: Makes the model of one task, given that one.
    """
    start = time.perf_counter()
    seeds = seeds_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    graph = graphs[0]
    epochs = args.epochs or graph.epochs
    describe(graph, seeds, epochs)
    own = [own_features(graph) for graph in graphs]
    single: list[dict[str, Result]] = []
    multi: list[Result] = []
    # None lets tqdm switch itself off where there is no terminal.
    disable = True if args.no_progress else None
    with tqdm(total=args.runs * (len(graph.tasks) + 1) * epochs, unit="epoch", disable=disable) as bar:
        for seed, graph in zip(seeds, graphs, strict=True):

            def run(names: list[str], model: ModelOf, graph: MultiTaskGraph = graph, seed: int = seed) -> Result:
                bar.set_description(f"seed {seed}, {names[0] if len(names) == 1 else 'multi-task'}")
                return train(graph, names, seed, epochs, torch.device(args.device), bar.update, model)

            single.append({name: run([name], single_task) for name in graph.tasks})
            multi.append(run(list(graph.tasks), multi_task))

    summary = summarise(graphs[0], own, single, multi)
    summary["settings"] = {
        "dataset": graphs[0].name,
        "seeds": list(seeds),
        "epochs": epochs,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_geometric": torch_geometric.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    save_json(summary, args.out / "metrics.json")
    learning_curves(graphs[0], single, multi, args.out / "learning_curves.png")
    print("Test metrics" + (f", mean +- standard deviation over {args.runs} seeds" if args.runs > 1 else "") + ":\n")
    print(metrics_table(summary["tasks"]))
    print(f"\n{verdict(summary['tasks'])}\n")
    print(models_table(summary["models"]))
    print(f"\nSaved {args.out / 'learning_curves.png'} and {args.out / 'metrics.json'}.")
    print(f"{time.perf_counter() - start:.1f} s in all, after the imports and the data.")
    return summary


def describe(graph: MultiTaskGraph, seeds: range, epochs: int) -> None:
    """Prints the graph, the split and the tasks."""
    data = graph.data
    sizes = [int(mask.sum()) for mask in (data.train_mask, data.val_mask, data.test_mask)]
    print(
        f"{graph.name}: {data.num_nodes:,} nodes, {data.num_edges:,} directed edges, {data.x.size(1):,} features; "
        f"{sizes[0]} train, {sizes[1]} validation, {sizes[2]} test nodes."
    )
    print(f"Seeds {', '.join(map(str, seeds))}; {epochs} epochs.")
    for name, task in graph.tasks.items():
        print(f"  {name}: {task.description} ({task.kind}, loss weight {task.weight:g})")
    print()
