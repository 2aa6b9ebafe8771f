"""Batches of a few rows, where calls and not arithmetic take the time: molecules, or a GPU that waits for its host.

    python benchmarks/bench_small.py [--quick] [--no-compile] [--threads 1] [--json FILE]

Embedding ``[N, 128]``, float32, tasks of cross-entropy. ``forward`` is all outputs without gradients, ``loss`` the sum
of all losses, ready for a backward, ``step`` that with its backward. Peers:

- ``list``: a ``ModuleList`` and a loop over losses;
- ``wide``: one linear layer, ``split``, and a loop over losses;
- ``single``: one linear layer and one loss over ``[N * T, C]``, which needs as many classes in every task;
- ``list+c``, ``single+c``: the same under ``torch.compile``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common import keep_freed_memory, machine, print_table, save, settings, time_side_by_side
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

D = 128
# Rows, tasks, classes.
SHAPES = [(16, 8, 16), (16, 12, 2), (128, 8, 16), (128, 12, 2)]
QUICK = [(4, 3, 2), (8, 2, 5)]


def bench(n: int, tasks: int, classes: int, compiled: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of ``forward``, ``loss`` and ``step``."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(D, {f"t{i}": mtl.Task(classes, loss="cross_entropy") for i in range(tasks)})
    modules = nn.ModuleList(heads.to_modules().values())
    wide = nn.Linear(D, tasks * classes)
    wide.load_state_dict({"weight": heads.weight, "bias": heads.bias})
    x = torch.randn(n, D, requires_grad=True)
    y = torch.randint(0, classes, (n, tasks))
    columns, flat = [c.contiguous() for c in y.unbind(1)], y.reshape(-1)
    labels = dict(zip(heads.layout.names, columns, strict=True))

    def of_list() -> Tensor:
        return torch.stack([F.cross_entropy(m(x), c) for m, c in zip(modules, columns, strict=True)]).sum()

    def of_wide() -> Tensor:
        parts = wide(x).split(classes, 1)
        return torch.stack([F.cross_entropy(p, c) for p, c in zip(parts, columns, strict=True)]).sum()

    def of_single() -> Tensor:
        return F.cross_entropy(wide(x).view(-1, classes), flat) * tasks

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: heads.loss(x, labels).total,
        "list": of_list,
        "wide": of_wide,
        "single": of_single,
    }
    if compiled:
        losses |= {f"{name}+c": torch.compile(losses[name]) for name in ("list", "single")}
    parameters = [x, *heads.parameters(), *modules.parameters(), *wide.parameters()]

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for p in parameters:
                p.grad = None
            losses[name]().backward()

        return run

    steps = {name: step(name) for name in losses}
    check(steps, x)
    forward: dict[str, Callable[[], object]] = {
        "ours": lambda: heads(x),
        "list": lambda: [m(x) for m in modules],
        "wide": lambda: wide(x).split(classes, 1),
    }
    with torch.no_grad():
        times = {"forward": time_side_by_side(forward, rounds)}
    times |= {"loss": time_side_by_side(losses, rounds), "step": time_side_by_side(steps, rounds)}
    return {what: {name: 1e3 * ms for name, ms in own.items()} for what, own in times.items()}


def check(steps: dict[str, Callable[[], None]], x: Tensor) -> None:
    """All peers give the same gradients."""
    exact = None
    for name, step in steps.items():
        step()
        assert x.grad is not None
        exact = x.grad if exact is None else exact
        error = float((x.grad - exact).norm() / exact.norm())
        if not error < 1e-5:
            raise SystemExit(f"{name}: gradients wrong by {error:.3g} (relative)")


def main() -> None:
    """Runs all shapes and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(f"{machine()}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, us\n")
    results, rows = [], []
    columns = ("ours", "list", "wide", "single", "list+c", "single+c")
    for n, tasks, classes in QUICK if args.quick else SHAPES:
        us = bench(n, tasks, classes, not (args.no_compile or args.quick), 3 if args.quick else 15)
        ms = {what: {name: t / 1e3 for name, t in own.items()} for what, own in us.items()}
        results.append({"n": n, "tasks": tasks, "classes": classes, "ms": ms})
        for what, own in us.items():
            cells = [f"{own[c]:.0f}" if c in own else "-" for c in columns]
            best = min(t for name, t in own.items() if name != "ours")
            ratios = [f"{own['list'] / own['ours']:.2f}", f"{best / own['ours']:.2f}"]
            rows.append([f"{what} {n} x {D}, {tasks} x {classes}", *cells, *ratios])
    print_table(["", *columns, "list/ours", "best/ours"], rows)
    save(args.json, {"settings": head, "results": results})


if __name__ == "__main__":
    main()
