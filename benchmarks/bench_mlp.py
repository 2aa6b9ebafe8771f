"""A training step of heads with hidden layers: losses, and gradients of the embedding and all parameters.

    python benchmarks/bench_mlp.py [--quick] [--threads 2] [--no-compile] [--json FILE]

Every task is a classification with two classes or seven, every row has all labels. Peers:

- ``list``: a ``ModuleList`` of MLPs and a loop over them and their losses;
- ``wide``: the first layer as one wide ``Linear``, the others as ``baddbmm``, and one loss, as widths are equal;
- both under ``torch.compile``.

All are checked against the list in float64 first. ``of peak``: flops of all products a second, by
those of the register tile on data in the cache in the same run.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import keep_freed_memory, machine, print_table, save, settings, time_side_by_side
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

# Rows, embedding, tasks, classes, hidden layers.
SHAPES: list[tuple[int, int, int, int, list[int]]] = [
    (128, 64, 12, 2, [16]),
    (512, 256, 12, 2, [64]),
    (2708, 128, 3, 7, [64, 32]),
    (4096, 128, 12, 2, [64]),
    (1024, 256, 128, 2, [32]),
    (100_000, 128, 12, 2, [64]),
]
QUICK = [(60, 16, 3, 2, [8]), (90, 20, 5, 3, [8, 4])]


def wide_step(n: int, tasks: int, y: Tensor, x: Tensor, *layers: Tensor) -> Tensor:
    """Losses of all tasks; ``layers``: weight and bias of each, those behind the first as batches."""
    h = F.linear(x, layers[0], layers[1]).reshape(n, tasks, -1).transpose(0, 1)
    for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
        h = torch.baddbmm(bias, h.relu(), weight.transpose(1, 2))
    return F.cross_entropy(h.reshape(tasks * n, -1), y) * tasks


def bench(
    n: int, d: int, tasks: int, classes: int, hidden: Sequence[int], compiled: bool, rounds: int
) -> dict[str, float]:
    """Milliseconds of every peer."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    names = {f"t{i}": mtl.Task(classes, loss="cross_entropy") for i in range(tasks)}
    heads = mtl.MultiTaskHeads(d, names, hidden_channels=list(hidden))
    modules = nn.ModuleList(heads.to_modules().values())
    x, labels = torch.randn(n, d, requires_grad=True), torch.randint(0, classes, (n, tasks))
    matrix, columns, flat = labels.float(), labels.unbind(1), labels.t().reshape(-1)
    layers: list[Tensor] = []
    for i in range(heads.depth):
        weight, bias = (getattr(heads, name).detach().clone() for name in heads.layer_names(i))
        if i:
            weight, bias = weight.reshape(tasks, -1, weight.shape[1]), bias.reshape(tasks, 1, -1)
        layers += [weight.requires_grad_(), bias.requires_grad_()]

    def of_list(modules: nn.ModuleList, x: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(m(x), y) for m, y in zip(modules, columns, strict=True)]).sum()

    def of_wide(x: Tensor, *layers: Tensor) -> Tensor:
        return wide_step(n, tasks, flat, x, *layers)

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: heads.loss(x, matrix).total,
        "list": lambda: of_list(modules, x),
        "wide": lambda: of_wide(x, *layers),
    }
    if compiled:
        fast_wide = torch.compile(of_wide)
        losses["wide*"] = lambda: fast_wide(x, *layers)
        if tasks <= 12:  # the graph of 128 MLPs takes minutes to compile
            fast_list = torch.compile(of_list)
            losses["list*"] = lambda: fast_list(modules, x)
    parameters = [x, *heads.parameters(), *modules.parameters(), *layers]

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for p in parameters:
                p.grad = None
            losses[name]().backward()

        return run

    exact_x = x.detach().double().requires_grad_()
    exact = of_list(copy.deepcopy(modules).double(), exact_x)  # type: ignore[arg-type]
    exact.backward()
    assert exact_x.grad is not None
    steps = {name: step(name) for name in losses}
    for name, run in steps.items():
        run()
        assert x.grad is not None
        error = float((x.grad.double() - exact_x.grad).norm() / exact_x.grad.norm())
        if not error < 1e-4:
            raise SystemExit(f"{name}: gradient wrong by {error:.3g} (relative)")
    return time_side_by_side(steps, rounds, most=3.0)


def flops(n: int, d: int, tasks: int, classes: int, hidden: Sequence[int]) -> float:
    """Of all products of a step: three for each layer."""
    sizes = [d, *hidden, classes]
    return 6.0 * n * tasks * sum(a * b for a, b in pairwise(sizes))


def main() -> None:
    """Runs all shapes and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    keep_freed_memory()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(f"{machine()}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, ms\n")
    columns = ["ours", "list", "list*", "wide", "wide*"]
    results: list[dict[str, Any]] = []
    rows = []
    for shape in QUICK if args.quick else SHAPES:
        n, d, tasks, classes, hidden = shape
        ms = bench(*shape, not (args.no_compile or args.quick), 3 if args.quick else 5 if n > 50_000 else 11)
        peak = float(torch.ops.torch_mtl_pyg.multiply_add_rate(torch.zeros(1), 0.2))  # GFLOP/s of all threads
        share = flops(*shape) / 1e6 / ms["ours"] / peak
        results.append({"shape": shape, "ms": ms, "flops": flops(*shape), "of_peak": share})
        rows.append(
            [
                f"{n} x {d}, {tasks} x {classes}, hidden {hidden}",
                *(f"{ms[name]:.2f}" if name in ms else "-" for name in columns),
                f"{ms['list'] / ms['ours']:.2f}",
                f"{min(t for name, t in ms.items() if name != 'ours') / ms['ours']:.2f}",
                f"{flops(*shape) / 1e9:.2f}",
                f"{share:.2f}",
            ]
        )
    print_table(["shape", *columns, "list/ours", "best/ours", "GFLOP", "of peak"], rows)
    print("\n* under torch.compile")
    save(args.json, {"settings": head, "results": results})


if __name__ == "__main__":
    main()
