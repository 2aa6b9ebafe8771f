"""Trains a GINE model on Tox21: 12 binary tasks on 7,831 molecules, with 17 % of the labels missing.

The loss of all tasks is computed from the embedding in one pass, ``heads.loss(x, y)``, on the label matrix as it is:
a missing label is NaN. ``--balancing`` weights the tasks by a method of TorchJD in place of the plain sum, and several
methods, or ``--compare``, are run over the same seeds and compared with the sum. ``--single-task`` adds 12 models with
one task each.

A test metric is the one at the epoch with the best mean validation AUROC (of a single-task model: its task's).
examples/README.md says how the settings were chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_geometric
from common.molecule_report import in_words, save_all, summarise
from common.molecule_training import Run, Settings, binary, train
from common.molecules import SPLITS, Molecules, load_molecules
from tqdm import tqdm

from torch_mtl_pyg import backend_info
from torch_mtl_pyg.balancing import Balancer

METHODS = ("none", "upgrad", "mgda", "pcgrad", "uw")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Multi-task GINE on Tox21.")
    p.add_argument("--root", type=Path, required=True, help="folder that holds tox21/tox21.npz, or PyG's MoleculeNet")
    p.add_argument("--split", choices=SPLITS, default="random", help="molecules at random, or by scaffold")
    p.add_argument(
        "--balancing",
        nargs="+",
        default=["none"],
        metavar="METHOD",
        help=f"how tasks are weighted: {', '.join(METHODS)} or another of TorchJD's; several are compared with none",
    )
    p.add_argument("--compare", action="store_true", help=f"the same as --balancing {' '.join(METHODS)} --runs 3")
    p.add_argument("--single-task", action="store_true", help="compare with 12 models of one task each too")
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--seed", type=int, default=0, help="first seed: of weights and order (not of the split)")
    p.add_argument("--runs", type=int, help="number of seeds, counted up from --seed (default: 1, with --compare 3)")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--hidden", type=int, default=96, help="width of the trunk and of the embedding")
    p.add_argument("--out", type=Path, default=Path("demo_output/tox21"), help="folder for the figures and the metrics")
    p.add_argument("--device", default="cpu", help="a torch device")
    p.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")
    return p


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program and returns what it saves as ``metrics.json``."""
    start = time.perf_counter()
    p = parser()
    args = p.parse_args(argv)
    args.runs = args.runs if args.runs is not None else 3 if args.compare else 1
    for name, least in (("epochs", 1), ("runs", 1), ("batch_size", 2), ("hidden", 1)):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    methods = list(dict.fromkeys(METHODS if args.compare else args.balancing))
    if (len(methods) > 1 or args.single_task) and "none" not in methods:
        methods.insert(0, "none")
    try:
        device = torch.empty(0, device=args.device).device
        molecules = load_molecules(args.root, "tox21", args.split)
        for method in methods:
            Balancer(method, tasks=binary(molecules.task_names))
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # AssertionError: no CUDA
        p.error(str(error))
    settings = Settings(args.epochs, args.batch_size, args.hidden, layers=3, lr=3e-3, device=str(device))
    args.out.mkdir(parents=True, exist_ok=True)
    describe(molecules, args, settings)
    runs, single = run_all(molecules, methods, args, settings)
    summary = summarise(runs, single)
    summary["settings"] = {
        **dataclasses.asdict(settings),
        "split": args.split,
        "seeds": list(range(args.seed, args.seed + args.runs)),
        "backend": backend_info().backend,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_geometric": torch_geometric.__version__,
            "torchjd": version("torchjd"),
        },
    }
    print(f"\n{in_words(runs, summary)}\n")
    print(f"Saved {', '.join(map(str, save_all(runs, summary, args.out)))}.")
    print(f"{time.perf_counter() - start:.1f} s in all, after the imports.")
    return summary


def describe(molecules: Molecules, args: argparse.Namespace, settings: Settings) -> None:
    """Prints what is trained on."""
    sizes = [len(molecules.indices(part)) for part in ("train", "val", "test")]
    present = ~molecules.y.isnan()
    print(
        f"Tox21: {len(molecules):,} molecules ({args.split} split: {sizes[0]:,} train, {sizes[1]:,} validation, "
        f"{sizes[2]:,} test), {molecules.x.shape[0]:,} atoms, {molecules.y.shape[1]} tasks, "
        f"{1 - float(present.float().mean()):.1%} of the labels missing, "
        f"{float(molecules.y.nansum() / present.sum()):.1%} of the others positive."
    )
    print(
        f"GINE, {settings.layers} layers of width {settings.hidden}; batches of {settings.batch_size}; "
        f"{settings.epochs} epochs; losses on the backend {backend_info().backend!r}.\n"
    )


def run_all(
    molecules: Molecules, methods: list[str], args: argparse.Namespace, settings: Settings
) -> tuple[dict[str, list[Run]], list[dict[str, Run]]]:
    """All models: by method and seed; and by seed and task, if single-task models are wanted."""
    seeds = range(args.seed, args.seed + args.runs)
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    single: list[dict[str, Run]] = []
    names = molecules.task_names if args.single_task else ()
    every_epoch = len(methods) * args.runs == 1 and not names
    # None lets tqdm switch itself off where there is no terminal.
    disable = True if args.no_progress else None
    with tqdm(total=args.runs * (len(methods) + len(names)) * args.epochs, unit="epoch", disable=disable) as bar:

        def on_epoch(run: Run) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {run.total[-1]:.3f}, validation AUROC {run.val[-1]:.4f}")
            if every_epoch:
                epoch = len(run.total)
                bar.write(f"epoch {epoch:3d}: total loss {run.total[-1]:.4f}, validation mean AUROC {run.val[-1]:.4f}")

        for seed in seeds:
            for method in methods:
                bar.set_description(f"seed {seed}, {method}")
                run = train(molecules, method, seed, settings, on_epoch)
                runs[method].append(run)
                bar.write(
                    f"seed {seed}, {method}: test mean AUROC {run.auroc:.4f} at epoch {run.best_epoch}, the best on "
                    f"validation ({max(run.val):.4f}); {np.median(run.seconds):.2f} s per epoch"
                )
            if names:
                models = {}
                for name in names:
                    bar.set_description(f"seed {seed}, only {name}")
                    models[name] = train(molecules.only(name), "none", seed, settings, on_epoch)
                single.append(models)
                auroc = np.mean([run.auroc for run in models.values()])
                bar.write(f"seed {seed}, {len(models)} single-task models: test mean AUROC {auroc:.4f}")
    return runs, single


if __name__ == "__main__":
    main()
