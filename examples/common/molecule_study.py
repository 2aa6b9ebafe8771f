"""A program that trains on a set of molecules: its options, all its models, and what it prints and saves."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_geometric
from torch_geometric.datasets import MoleculeNet
from tqdm import tqdm

from torch_mtl_pyg import backend_info
from torch_mtl_pyg.balancing import Balancer

from .molecule_checkpoint import CheckpointError
from .molecule_kinds import KINDS
from .molecule_report import in_words, save_all, summarise
from .molecule_training import Run, Settings, train
from .molecules import SPLITS, Molecules, load_molecules

METHODS = ("none", "upgrad", "mgda", "pcgrad", "uw")


@dataclass(frozen=True)
class MoleculeSet:
    """A set of molecules and how to train on it.

    Args:
        name: Name of its folder and file.
        title: What it is called.
        settings: The default settings; their kind tells what labels the set has.
        methods: The methods that ``--compare`` compares with the first one.
        single_task: Whether models of one task each can be asked for.
    """

    name: str
    title: str
    settings: Settings
    methods: Sequence[str] = METHODS
    single_task: bool = True


def parser(of: MoleculeSet) -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=f"Multi-task GINE on {of.title}.")
    also = ", or PyG's MoleculeNet" if of.name in MoleculeNet.names else ""
    p.add_argument("--root", type=Path, required=True, help=f"folder that holds {of.name}/{of.name}.npz{also}")
    p.add_argument("--split", choices=SPLITS, default="random", help="molecules at random, or by scaffold")
    p.add_argument(
        "--balancing",
        nargs="+",
        default=["none"],
        metavar="METHOD",
        help=f"how tasks are weighted: {', '.join(of.methods)} or another of TorchJD's; several are compared with none",
    )
    p.add_argument("--compare", action="store_true", help=f"the same as --balancing {' '.join(of.methods)} --runs 3")
    if of.single_task:
        p.add_argument("--single-task", action="store_true", help="compare with models of one task each too")
    p.add_argument("--epochs", type=int, default=of.settings.epochs)
    p.add_argument("--seed", type=int, default=0, help="first seed: of weights and order (not of the split)")
    p.add_argument("--runs", type=int, help="number of seeds, counted up from --seed (default: 1, with --compare 3)")
    p.add_argument("--batch-size", type=int, default=of.settings.batch_size)
    p.add_argument("--hidden", type=int, default=of.settings.hidden, help="width of the trunk and of the embedding")
    out = Path("demo_output") / of.name
    p.add_argument("--out", type=Path, default=out, help="folder for the figures, the metrics and the checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out, where there are some")
    p.add_argument("--device", default="cpu", help="a torch device")
    p.add_argument("--amp", action="store_true", help="the model under bfloat16 autocast")
    p.add_argument("--compile", action="store_true", help="the trunk under torch.compile")
    p.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal)")
    return p


def main(of: MoleculeSet, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program and returns what it saves as ``metrics.json``."""
    start = time.perf_counter()
    p = parser(of)
    args = p.parse_args(argv)
    args.runs = args.runs if args.runs is not None else 3 if args.compare else 1
    args.single_task = of.single_task and args.single_task
    for name, least in (("epochs", 1), ("runs", 1), ("batch_size", 2), ("hidden", 1)):
        if getattr(args, name) < least:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    methods = list(dict.fromkeys(of.methods if args.compare else args.balancing))
    if (len(methods) > 1 or args.single_task) and "none" not in methods:
        methods.insert(0, "none")
    kind = KINDS[of.settings.kind]
    try:
        device = torch.empty(0, device=args.device).device
        molecules = load_molecules(args.root, of.name, args.split)
        if of.settings.kind == "regression":
            molecules = molecules.standardised()
        for method in methods:
            Balancer(method, tasks=kind.tasks(molecules.task_names))
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # AssertionError: no CUDA
        p.error(str(error))
    own = {name: getattr(args, name) for name in ("epochs", "batch_size", "hidden", "amp", "compile")}
    settings = dataclasses.replace(of.settings, device=str(device), **own)
    args.out.mkdir(parents=True, exist_ok=True)
    describe(of, molecules, args, settings)
    try:
        runs, single = run_all(molecules, methods, args, settings)
    except CheckpointError as error:
        p.error(f"--resume: {error}")
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
    print(f"\n{in_words(runs, summary, molecules)}\n")
    print(f"Saved {', '.join(map(str, save_all(runs, single, summary, args.out)))}.")
    print(f"{time.perf_counter() - start:.1f} s in all, after the imports.")
    return summary


def describe(of: MoleculeSet, molecules: Molecules, args: argparse.Namespace, settings: Settings) -> None:
    """Prints what is trained on."""
    sizes = [len(molecules.indices(part)) for part in ("train", "val", "test")]
    present = ~molecules.y.isnan()
    labels = f"{1 - float(present.float().mean()):.1%} of the labels missing"
    if settings.kind == "binary":
        labels += f", {float(molecules.y.nansum() / present.sum()):.1%} of the others positive"
    print(
        f"{of.title}: {len(molecules):,} molecules ({args.split} split: {sizes[0]:,} train, {sizes[1]:,} validation, "
        f"{sizes[2]:,} test), {molecules.x.shape[0]:,} atoms, {molecules.y.shape[1]} tasks, {labels}."
    )
    print(
        f"GINE, {settings.layers} layers of width {settings.hidden}; batches of {settings.batch_size}; "
        f"{settings.epochs} epochs; losses on the backend {backend_info().backend!r}.\n"
    )


def run_all(
    molecules: Molecules, methods: list[str], args: argparse.Namespace, settings: Settings
) -> tuple[dict[str, list[Run]], list[dict[str, Run]]]:
    """All models: by method and seed; and by seed and task, if single-task models are wanted."""
    kind, seeds = KINDS[settings.kind], range(args.seed, args.seed + args.runs)
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    single: list[dict[str, Run]] = []
    names = molecules.task_names if args.single_task else ()
    every_epoch = len(methods) * args.runs == 1 and not names
    # None lets tqdm switch itself off where there is no terminal.
    disable = True if args.no_progress else None
    with tqdm(total=args.runs * (len(methods) + len(names)) * args.epochs, unit="epoch", disable=disable) as bar:

        def on_epoch(run: Run) -> None:
            bar.update(len(run.total) - bar.n % args.epochs)  # a resumed run begins with several
            loss, val = run.total[-1], run.val[-1]
            bar.set_postfix_str(f"loss {loss:.3f}, validation {kind.title} {val:.4f}")
            if every_epoch:
                epoch = len(run.total)
                bar.write(f"epoch {epoch:3d}: total loss {loss:.4f}, validation mean {kind.title} {val:.4f}")

        def one(model: str, data: Molecules, method: str, seed: int) -> Run:
            bar.set_description(f"seed {seed}, {model}")
            file = args.out / "checkpoints" / f"{model.replace('/', '_')}_seed{seed}.pt"
            if args.resume:
                bar.write(f"seed {seed}, {model}: {'going on from' if file.is_file() else 'no'} checkpoint {file}")
            return train(data, method, seed, settings, on_epoch, file, args.resume)

        for seed in seeds:
            for method in methods:
                run = one(method, molecules, method, seed)
                runs[method].append(run)
                bar.write(
                    f"seed {seed}, {method}: test mean {kind.title} {run.score:.4f} at epoch {run.best_epoch}, the "
                    f"best on validation ({kind.best(run.val):.4f}); {np.median(run.seconds):.2f} s per epoch"
                )
            if names:
                single.append({name: one(f"only {name}", molecules.only(name), "none", seed) for name in names})
                mean = np.mean([run.score for run in single[-1].values()])
                bar.write(f"seed {seed}, {len(names)} single-task models: test mean {kind.title} {mean:.4f}")
    return runs, single
