"""Heads with a hidden layer, losses and gradients in one pass, against what people write today.

    python benchmarks/bench_mlp.py [--dtype float32] [--threads 2] [--only tox21] [--no-compile] [--quick] [--json FILE]

One step: hidden layers (relu), logits, the cross-entropy of every task, and the gradients of x and of all parameters.
Every shape is first checked against float64. Peers:

- ``list``: a ``ModuleList`` of MLPs and a loop over tasks and losses;
- ``wide``: one ``Linear`` of all first layers, then ``baddbmm`` for the others, and one loss over all tasks;
- ``list+c``, ``wide+c``: the same under ``torch.compile``, forward and backward.

``of peak`` is the step's multiply-adds (three products of each layer) over those of our register tile on data in the
first-level cache, measured in the same run on as many threads. ``MiB`` is by how much a step raises the memory of the
process, gradients included.

The benchmark has glibc keep freed blocks while it times (``--fresh`` does not), see bench_loss.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    keep_freed_memory,
    matrix_rate,
    multiply_add_rate,
    peak_memory,
    print_table,
    save,
    settings,
    time_side_by_side,
)
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

# Name, rows, embedding, tasks, classes of each, hidden layers.
Shape = tuple[str, int, int, int, int, list[int]]
SHAPES: list[Shape] = [
    ("small", 128, 64, 12, 2, [16]),
    ("tox21", 512, 256, 12, 2, [64]),
    ("rows4k", 4096, 128, 12, 2, [64]),
    ("rows100k", 100_000, 128, 12, 2, [64]),
    ("pcba", 1024, 256, 128, 2, [32]),
    ("cora", 2708, 128, 3, 7, [64, 32]),
]
QUICK: list[Shape] = [("quick", 60, 12, 4, 3, [8]), ("quick-deep", 33, 5, 2, 2, [6, 4])]


class ListModel(nn.Module):
    def __init__(self, d: int, tasks: int, classes: int, hidden: list[int]) -> None:
        super().__init__()
        sizes = [d, *hidden, classes]
        self.heads = nn.ModuleList()
        for _ in range(tasks):
            parts: list[nn.Module] = []
            for a, b in itertools.pairwise(sizes):
                parts += [nn.Linear(a, b), nn.ReLU()]
            self.heads.append(nn.Sequential(*parts[:-1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        for head, labels in zip(self.heads, y.unbind(1), strict=True):
            total = total + F.cross_entropy(head(x), labels)
        return total


class WideModel(nn.Module):
    def __init__(self, d: int, tasks: int, classes: int, hidden: list[int]) -> None:
        super().__init__()
        self.tasks, self.first = tasks, nn.Linear(d, tasks * hidden[0])
        sizes = [*hidden, classes]
        self.weights = nn.ParameterList([torch.empty(tasks, a, b) for a, b in itertools.pairwise(sizes)])
        self.biases = nn.ParameterList([torch.empty(tasks, 1, b) for b in sizes[1:]])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(x).view(x.shape[0], self.tasks, -1).transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = torch.baddbmm(bias, h.relu(), weight)
        # The sum of the means, since every task has all labels.
        return F.cross_entropy(h.flatten(0, 1), y.t().flatten()) * self.tasks


class Ours(nn.Module):
    def __init__(self, d: int, tasks: int, classes: int, hidden: list[int]) -> None:
        super().__init__()
        named = {f"t{i}": mtl.Task(classes, loss="cross_entropy") for i in range(tasks)}
        self.heads = mtl.MultiTaskHeads(d, named, hidden_channels=hidden)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.heads.loss(x, y).total


def models(d: int, tasks: int, classes: int, hidden: list[int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The peers and ours, all with the same weights."""
    listed, wide = ListModel(d, tasks, classes, hidden), WideModel(d, tasks, classes, hidden)
    ours = Ours(d, tasks, classes, hidden)
    with torch.no_grad():
        for layer in range(len(hidden) + 1):
            linears = [head[2 * layer] for head in listed.heads]
            weight, bias = (torch.stack([getattr(linear, p) for linear in linears]) for p in ("weight", "bias"))
            names = ours.heads.layer_names(layer)
            getattr(ours.heads, names[0]).copy_(weight.flatten(0, 1))
            getattr(ours.heads, names[1]).copy_(bias.flatten())
            if layer == 0:
                wide.first.weight.copy_(weight.flatten(0, 1))
                wide.first.bias.copy_(bias.flatten())
            else:
                wide.weights[layer - 1].copy_(weight.transpose(1, 2))
                wide.biases[layer - 1].copy_(bias.unsqueeze(1))
    return {name: model.to(dtype) for name, model in (("list", listed), ("wide", wide), ("ours", ours))}


def check(peers: dict[str, nn.Module], x: Tensor, y: Tensor) -> None:
    """All agree with float64: loss, gradient of x, gradients of the first and the last layer's weights."""
    exact = gradients(copy.deepcopy(peers["list"]).double(), x.detach().double().requires_grad_(), y)
    tolerance = 3e-5 if x.dtype == torch.float32 else 16 * torch.finfo(x.dtype).eps
    for name, model in peers.items():
        for got, expected in zip(gradients(model, x, y), exact, strict=True):
            error = float((got.double() - expected).norm() / expected.norm())
            if not error <= tolerance:
                raise SystemExit(f"{name}: wrong by {error:.3g} (relative), allowed {tolerance:.3g}")


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Loss and gradients: of x, of the weights of the first layer and of the last, as ``[T, inputs, outputs]``."""
    x.grad = None
    model.zero_grad()
    loss = model(x, y)
    loss.backward()
    assert x.grad is not None
    tasks = y.shape[1]
    if isinstance(model, ListModel):
        first, last = (torch.stack([h[i].weight.grad for h in model.heads]).transpose(1, 2) for i in (0, -1))
    elif isinstance(model, WideModel):
        first = model.first.weight.grad.view(tasks, -1, x.shape[1]).transpose(1, 2)
        last = model.weights[-1].grad
    else:
        first = model.heads.hidden_weight_0.grad.view(tasks, -1, x.shape[1]).transpose(1, 2)
        last = model.heads.weight.grad
        last = last.view(tasks, -1, last.shape[1]).transpose(1, 2)
    return [loss.detach(), x.grad, first, last]


def bench(shape: Shape, dtype: torch.dtype, compiled: bool, timing: dict[str, float]) -> dict[str, Any]:
    """Times one shape."""
    name, n, d, tasks, classes, hidden = shape
    torch.manual_seed(0)
    x = torch.randn(n, d).to(dtype).requires_grad_()
    y = torch.randint(0, classes, (n, tasks))
    peers = models(d, tasks, classes, hidden, dtype)
    check(peers, x, y)
    if compiled:
        torch._dynamo.reset()
        for peer in ("list", "wide"):
            # Hundreds of separate products or losses take minutes to compile.
            if peer == "wide" or tasks <= 64:
                peers[f"{peer}+c"] = torch.compile(peers[peer])  # type: ignore[assignment]

    def step(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            x.grad = None
            model.zero_grad()
            model(x, y).backward()

        return run

    peak = multiply_add_rate(dtype)
    ms = time_side_by_side({peer: step(model) for peer, model in peers.items()}, **timing)  # type: ignore[arg-type]
    peak = (peak + multiply_add_rate(dtype)) / 2
    memory = {peer: peak_memory(step(model)) for peer, model in peers.items()}
    others = {peer: t for peer, t in ms.items() if peer != "ours"}
    best = min(others, key=others.__getitem__)
    sizes = [d, *hidden, classes]
    flops = 6 * n * tasks * sum(a * b for a, b in itertools.pairwise(sizes))
    return {
        "shape": name, "n": n, "d": d, "tasks": tasks, "classes": classes, "hidden": hidden, "flops": flops,
        "peak": peak, "matrix_rate": matrix_rate(dtype), "ms": ms, "mib": memory, "best": best,
        "ratio_to_best": others[best] / ms["ours"], "ratio_to_list": ms["list"] / ms["ours"],
        "fraction_of_peak": flops / ms["ours"] / 1e6 / peak,
    }  # fmt: skip


def main() -> None:
    """Runs the shapes and prints two tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", action="append", help="a shape's name; may be repeated")
    p.add_argument("--no-compile", action="store_true", help="leave the peers under torch.compile out")
    p.add_argument("--fresh", action="store_true", help="let the allocator give large blocks back at every step")
    p.add_argument("--quick", action="store_true", help="tiny shapes, hardly timed: does it run, is it right?")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    if not args.fresh:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # torch.compile's own
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(
        f"{head['machine']}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, {args.dtype}"
    )
    print("One step, ms. x best: time of the best peer over ours; x list: time of the ModuleList over ours.\n")
    timing = {"rounds": 1, "seconds": 0.0, "warm_up": 0.0} if args.quick else {"most": 0.5}
    names = ["list", "list+c", "wide", "wide+c", "ours"]
    results, rows, memory = [], [], []
    for shape in QUICK if args.quick else SHAPES:
        if args.only and shape[0] not in args.only:
            continue
        r = bench(shape, getattr(torch, args.dtype), not args.no_compile, timing)  # type: ignore[arg-type]
        results.append(r)
        title = f"{r['shape']} {r['n']}x{r['d']}, {r['tasks']}x{r['classes']}, hidden {r['hidden']}"
        rows.append(
            [
                title,
                *(f"{r['ms'][peer]:.3f}" if peer in r["ms"] else "-" for peer in names),
                f"{r['ratio_to_best']:.2f} ({r['best']})",
                f"{r['ratio_to_list']:.1f}",
                f"{r['flops'] / 1e9:.2f}",
                f"{r['fraction_of_peak']:.2f}",
                f"{r['peak']:.0f}",
                f"{r['matrix_rate']:.0f}",
            ]
        )
        mib = [r["mib"].get(peer) for peer in names]
        memory.append([title, *("-" if v is None else f"{v:.1f}" for v in mib)])
        print(f"  {title}: {rows[-1][-6]}", file=sys.stderr, flush=True)
    header = ["shape", *names, "x best", "x list", "GFLOP", "of peak", "peak GFLOP/s", "mm GFLOP/s"]
    print_table(header, rows)
    print("\nMiB of a step.\n")
    print_table(["shape", *names], memory)
    save(args.json, {"settings": head, "dtype": args.dtype, "fresh": args.fresh, "results": results})


if __name__ == "__main__":
    main()
