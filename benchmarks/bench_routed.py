"""Rows routed to the head of their own task, against what is written by hand today.

    python benchmarks/bench_routed.py [--quick] [--threads 2] [--json FILE]

Rows ``[N, 128]``, linear heads of 8 classes, a random task for each row. ``forward`` gives the outputs, ``step`` the
outputs and the gradients of rows and parameters from given gradients of the outputs; ``loss`` is the step of
``heads.loss(x, y, task=idx)``, which the peers' steps do not contain. Peers:

- ``HeteroLinear``: PyG's, which without pyg-lib loops over types;
- ``masks``: a loop over the tasks with boolean masks;
- ``bmm``: each row's weights gathered, ``[N, 8, 128]``, and one batched product (left out above 4 GiB);
- ``sort``: rows sorted by task, split, one linear layer per task, and put back.

All are checked against the last one in float64 first. ``copy`` is the time to copy the rows once: a step reads them
and writes their gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import keep_freed_memory, machine, print_table, save, settings, time_side_by_side
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.nn import HeteroLinear

import torch_mtl_pyg as mtl

D, C = 128, 8
# Rows, tasks, sorted.
SHAPES = [(10_000, t, False) for t in (3, 30, 1000)] + [(10_000, 30, True)]
SHAPES += [(1_000_000, t, False) for t in (3, 30, 1000)]
QUICK = [(200, 3, False), (500, 40, True)]
BMM_BYTES = 4 << 30
# A loop over this many tasks and rows takes seconds a step, and says nothing new.
LOOP_MOST = 3e8


def by_sort(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a careful user writes; ``weight`` ``[T, C, D]``, ``bias`` ``[T, C]``."""
    order = torch.argsort(idx, stable=True)
    counts = torch.bincount(idx, minlength=weight.shape[0]).tolist()
    parts = x[order].split(counts)
    out = torch.cat([F.linear(p, w, b) for p, w, b in zip(parts, weight.unbind(), bias.unbind(), strict=True)])
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0])
    return out[place]


def by_masks(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A boolean mask for each task."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for t in range(weight.shape[0]):
        mine = idx == t
        out[mine] = F.linear(x[mine], weight[t], bias[t])
    return out


def by_bmm(x: Tensor, idx: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Weights of each row."""
    return torch.baddbmm(bias[idx].unsqueeze(2), weight[idx], x.unsqueeze(2)).squeeze(2)


def bench(n: int, tasks: int, in_order: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every peer, by pass."""
    torch.manual_seed(0)
    heads = mtl.MultiTaskHeads(D, {f"t{i}": mtl.Task(C, loss="cross_entropy") for i in range(tasks)})
    assert heads.bias is not None
    weight = heads.weight.detach().reshape(tasks, C, D).clone().requires_grad_()
    bias = heads.bias.detach().reshape(tasks, C).clone().requires_grad_()
    hetero = HeteroLinear(D, C, tasks)
    with torch.no_grad():
        hetero.weight.copy_(weight.transpose(1, 2))
        hetero.bias.copy_(bias)
    x = torch.randn(n, D, requires_grad=True)
    idx = torch.randint(0, tasks, (n,))
    idx = idx.sort()[0] if in_order else idx
    y, grad = torch.randint(0, C, (n,)), torch.randn(n, C)
    peers: dict[str, Callable[[], Any]] = {
        "ours": lambda: heads(x, task=idx),
        "HeteroLinear": lambda: hetero(x, idx),
        "masks": lambda: by_masks(x, idx, weight, bias),
        "bmm": lambda: by_bmm(x, idx, weight, bias),
        "sort": lambda: by_sort(x, idx, weight, bias),
    }
    if n * C * D * 4 > BMM_BYTES:
        del peers["bmm"]
    if n * tasks > LOOP_MOST:
        del peers["masks"], peers["HeteroLinear"]
    parameters = [x, weight, bias, *heads.parameters(), *hetero.parameters()]

    def clear() -> None:
        for p in parameters:
            p.grad = None

    check(peers, x, grad, by_sort(x.detach().double(), idx, weight.detach().double(), bias.detach().double()), clear)

    def step(function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            clear()
            function().backward(grad)

        return run

    def loss() -> None:
        clear()
        heads.loss(x, y, task=idx).total.backward()

    target = torch.empty(n, D)
    steps: dict[str, Callable[[], Any]] = {name: step(f) for name, f in peers.items()}
    steps |= {"loss": loss, "copy": lambda: target.copy_(x.detach())}
    with torch.no_grad():
        forward = time_side_by_side(peers, rounds, most=2.0)
    return {"forward": forward, "step": time_side_by_side(steps, rounds, most=2.0)}


def check(
    peers: dict[str, Callable[[], Any]], x: Tensor, grad: Tensor, exact: Tensor, clear: Callable[[], None]
) -> None:
    """All peers give the same outputs and gradients."""
    first: Tensor | None = None
    for name, function in peers.items():
        clear()
        out = function()
        out.backward(grad)
        first = x.grad if first is None else first
        assert first is not None and x.grad is not None
        for what, got, wanted in (("outputs", out.detach(), exact), ("gradients", x.grad, first)):
            error = float((got.double() - wanted).norm() / wanted.double().norm())
            if not error < 1e-5:
                raise SystemExit(f"{name}: {what} wrong by {error:.3g} (relative)")


def main() -> None:
    """Runs all shapes and prints two tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(f"{machine()}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, ms\n")
    results = []
    tables: dict[str, list[list[str]]] = {"forward": [], "step": []}
    for n, tasks, in_order in QUICK if args.quick else SHAPES:
        ms = bench(n, tasks, in_order, 3 if args.quick else 5 if n > 100_000 else 9)
        results.append({"n": n, "tasks": tasks, "sorted": in_order, "ms": ms})
        for name, table in tables.items():
            own = ms[name]
            peers = [own[peer] for peer in ("HeteroLinear", "masks", "bmm", "sort") if peer in own]
            shown = [own.get(c) for c in ("ours", "HeteroLinear", "masks", "bmm", "sort", "loss", "copy")]
            cells = ["-" if t is None else f"{t:.2f}" for t in (shown if name == "step" else shown[:5])]
            shape = f"{n:,} rows, {tasks} tasks{', sorted' if in_order else ''}"
            table.append([shape, *cells, f"{min(peers) / own['ours']:.2f}"])
    columns = ["ours", "HeteroLinear", "masks", "bmm", "sort"]
    for name, table in tables.items():
        print(f"{name}:")
        print_table(["shape", *columns, *(["loss", "copy"] if name == "step" else []), "best/ours"], table)
        print()
    save(args.json, {"settings": head, "results": results})


if __name__ == "__main__":
    main()
