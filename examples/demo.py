"""Trains one multi-task GNN for three related tasks and compares it with three single-task GNNs of the same size.

``digits`` (default, needs no network): the 1,797 handwritten digits that ship with scikit-learn. A node is an image and
sees its left half only; edges join images with similar left halves. Tasks: the digit (of the whole image), whether the
ink encloses background (a property of the whole image's shape, not of the digit), and the ink in the right half. None
of them is a function of the node's own input, since the right half is hidden from both inputs and edges.

``cora`` (needs the raw files, ``--root``): papers with their words and citations. Tasks: the subject, whether a paper
lies on a triangle of citations, and its log-degree; the last two are properties of the graph, absent from the words.

How far a node's own features go is shown, not claimed: the column "own features" is the best of five regularised linear
models on them. All models train for the same number of epochs, and every test metric is taken at the epoch with that
task's lowest validation loss, for the multi-task model as for the single-task ones. So the multi-task numbers of
different tasks may stem from different epochs of the one run. All models share learning rate, weight decay and epochs;
examples/README.md says how they were chosen.
"""

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
from common.baselines import own_features
from common.data import MultiTaskGraph, cora, digits
from common.plots import learning_curves
from common.report import metrics_table, models_table, save_json, summarise, verdict
from common.training import Result, train
from tqdm import tqdm


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Multi-task against single-task GNNs on real data.")
    p.add_argument("--dataset", choices=("digits", "cora"), default="digits")
    p.add_argument("--root", type=Path, help="folder that holds Cora/raw/ind.cora.* (only read; cora only)")
    p.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the figure and the metrics")
    p.add_argument("--epochs", type=int, help="training epochs of every model (default: the data set's)")
    p.add_argument("--seed", type=int, default=0, help="first seed: of split (digits), weights and dropout")
    p.add_argument("--runs", type=int, default=3, help="number of seeds, counted up from --seed")
    p.add_argument("--device", default="cpu", help="a torch device")
    p.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")
    return p


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it saves as ``metrics.json``."""
    start = time.perf_counter()
    p = parser()
    args = p.parse_args(argv)
    if args.dataset == "cora" and args.root is None:
        p.error("--dataset cora needs --root, the folder that holds Cora/raw/ind.cora.*")
    if args.dataset == "digits" and args.root is not None:
        p.error("--root is for --dataset cora; digits ships with scikit-learn")
    for name in ("epochs", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name} must be at least 1, got {value}")
    seeds = range(args.seed, args.seed + args.runs)
    try:
        graphs = [digits(seed) for seed in seeds] if args.dataset == "digits" else [cora(args.root)] * args.runs
    except ValueError as error:
        p.error(str(error))
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

            def run(names: list[str], graph: MultiTaskGraph = graph, seed: int = seed) -> Result:
                bar.set_description(f"seed {seed}, {names[0] if len(names) == 1 else 'multi-task'}")
                return train(graph, names, seed, epochs, torch.device(args.device), bar.update)

            single.append({name: run([name]) for name in graph.tasks})
            multi.append(run(list(graph.tasks)))

    summary = summarise(graphs[0], own, single, multi)
    summary["settings"] = {
        "dataset": args.dataset,
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
    print(f"{time.perf_counter() - start:.1f} s in all, after the imports.")
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


if __name__ == "__main__":
    main()
