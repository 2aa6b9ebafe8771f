"""Heads, losses and gradients in one pass, against what people write today.

    python benchmarks/bench_loss.py [--dtype float32] [--threads 2] [--only tox21] [--no-compile] [--json FILE]

One step: logits, the loss of every task, and the gradients of x, weights and biases. Every shape is first checked
against float64. Peers:

- ``list``: a ``ModuleList`` of ``Linear`` and a loop over tasks and losses;
- ``wide``: one ``Linear`` of all classes, ``split``, and a loop over losses;
- ``single``: one ``Linear`` and one loss over ``[N * T, C]`` (equal losses of equal width only);
- ``list+c``, ``wide+c``, ``single+c``: the same under ``torch.compile``, forward and backward.

Missing labels: the peers use ``ignore_index`` for classes and, for numbers, a mask and the mean over what is left, as
PyG examples do. ``of peak`` is the step's multiply-adds (three products) over those of our register tile on data in the
first-level cache, measured in the same run on as many threads.

Large outputs are fresh memory from the system at every step unless the allocator keeps freed blocks, which costs more
than the mathematics of some shapes, for every peer alike. The benchmark has glibc keep them (``--fresh`` does not).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import keep_freed_memory, matrix_rate, print_table, save, settings, time_side_by_side
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

CE, BCE, MSE = "cross_entropy", "bce", "mse"
MIXED = [(7, CE), (1, BCE), (1, MSE), (2, CE), (1, "l1"), (1, "huber"), (5, CE), (1, BCE), (1, "poisson_nll"), (3, CE),
         (1, BCE), (1, MSE)]  # fmt: skip

# Name, rows, embedding, (classes, loss) of each task, share of labels missing.
SHAPES: list[tuple[str, int, int, list[tuple[int, str]], float]] = [
    ("cora", 2708, 128, [(7, CE)] * 3, 0.0),
    ("node100k", 100_000, 128, [(16, CE)] * 8, 0.0),
    ("tox21", 512, 256, [(2, CE)] * 12, 0.0),
    ("toxcast", 1024, 256, [(2, CE)] * 617, 0.0),
    ("wide", 20_000, 256, [(64, CE)] * 16, 0.0),
    ("pcba", 8192, 300, [(2, CE)] * 128, 0.0),
    ("mixed", 4096, 256, MIXED, 0.0),
    ("mixed-50", 4096, 256, MIXED, 0.5),
    ("bce-50", 512, 256, [(1, BCE)] * 12, 0.5),
    ("bce-617-50", 1024, 256, [(1, BCE)] * 617, 0.5),
    ("pcba-50", 8192, 300, [(2, CE)] * 128, 0.5),
]

LOSSES: dict[str, Callable[..., Tensor]] = {
    BCE: F.binary_cross_entropy_with_logits,
    MSE: F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "poisson_nll": F.poisson_nll_loss,
}


def loss_of(kind: str, out: Tensor, y: Tensor, complete: bool) -> Tensor:
    """One task's loss as users write it."""
    if kind == CE:
        return F.cross_entropy(out, y)
    if complete:
        return LOSSES[kind](out[:, 0], y)
    present = ~torch.isnan(y)
    entries = LOSSES[kind](out[:, 0], torch.where(present, y, 0.0), reduction="none")
    return (entries * present).sum() / present.sum()


class ModuleListLoss(nn.Module):
    def __init__(self, d: int, tasks: list[tuple[int, str]], complete: bool) -> None:
        super().__init__()
        self.tasks, self.complete = tasks, complete
        self.heads = nn.ModuleList([nn.Linear(d, width) for width, _ in tasks])

    def forward(self, x: Tensor, labels: list[Tensor], matrix: Tensor | None) -> Tensor:
        total = x.new_zeros(())
        for head, (_, kind), y in zip(self.heads, self.tasks, labels, strict=True):
            total = total + loss_of(kind, head(x), y, self.complete)
        return total


class WideLoss(nn.Module):
    def __init__(self, d: int, tasks: list[tuple[int, str]], complete: bool) -> None:
        super().__init__()
        self.tasks, self.complete = tasks, complete
        self.widths = [width for width, _ in tasks]
        self.linear = nn.Linear(d, sum(self.widths))

    def forward(self, x: Tensor, labels: list[Tensor], matrix: Tensor | None) -> Tensor:
        outputs = self.linear(x).split(self.widths, dim=1)
        total = x.new_zeros(())
        for out, (_, kind), y in zip(outputs, self.tasks, labels, strict=True):
            total = total + loss_of(kind, out, y, self.complete)
        return total


class SingleLoss(nn.Module):
    """One loss over all tasks: their sum of means, since all have all labels; else each task's mean by masked sums."""

    def __init__(self, d: int, tasks: list[tuple[int, str]], complete: bool) -> None:
        super().__init__()
        self.count, (self.width, self.kind), self.complete = len(tasks), tasks[0], complete
        self.linear = nn.Linear(d, self.width * self.count)

    def forward(self, x: Tensor, labels: list[Tensor], matrix: Tensor | None) -> Tensor:
        assert matrix is not None
        out = self.linear(x)
        if self.kind == CE:
            out = out.view(-1, self.width)
            if self.complete:
                return F.cross_entropy(out, matrix.flatten()) * self.count
            entries = F.cross_entropy(out, matrix.flatten(), reduction="none").view(matrix.shape)
            return (entries.sum(0) / (matrix != -100).sum(0)).sum()
        present = ~torch.isnan(matrix)
        entries = LOSSES[self.kind](out, torch.where(present, matrix, 0.0), reduction="none")
        return ((entries * present).sum(0) / present.sum(0)).sum()


class Ours(nn.Module):
    def __init__(self, d: int, tasks: list[tuple[int, str]], complete: bool) -> None:
        super().__init__()
        self.heads = mtl.MultiTaskHeads(d, {f"t{i}": mtl.Task(w, loss=kind) for i, (w, kind) in enumerate(tasks)})

    def forward(self, x: Tensor, labels: list[Tensor], matrix: Tensor | None) -> Tensor:
        y = dict(zip(self.heads.layout.names, labels, strict=True)) if matrix is None else matrix
        return self.heads.loss(x, y).total


def make_labels(n: int, tasks: list[tuple[int, str]], missing: float) -> tuple[list[Tensor], Tensor | None]:
    """One tensor per task, and one matrix where all tasks take the same kind."""
    labels = []
    for width, kind in tasks:
        if kind == CE:
            y = torch.randint(0, width, (n,))
            y[torch.rand(n) < missing] = -100
        else:
            y = torch.rand(n).round() if kind == BCE else torch.randn(n).abs()
            y[torch.rand(n) < missing] = torch.nan
        labels.append(y)
    kinds = {kind for _, kind in tasks}
    return labels, torch.stack(labels, 1) if len(kinds) == 1 else None


def models(d: int, tasks: list[tuple[int, str]], complete: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The peers and ours, all with the same weights."""
    peers: dict[str, nn.Module] = {"list": ModuleListLoss(d, tasks, complete), "wide": WideLoss(d, tasks, complete)}
    if len(set(tasks)) == 1:
        peers["single"] = SingleLoss(d, tasks, complete)
    peers["ours"] = Ours(d, tasks, complete)
    weight = torch.randn(sum(w for w, _ in tasks), d) / d**0.5
    bias = torch.randn(weight.shape[0])
    widths = [width for width, _ in tasks]
    with torch.no_grad():
        for linear, w, b in zip(peers["list"].heads, weight.split(widths), bias.split(widths), strict=True):
            linear.weight.copy_(w)
            linear.bias.copy_(b)
        for name, linear in (("wide", "linear"), ("single", "linear"), ("ours", "heads")):
            if name in peers:
                getattr(peers[name], linear).weight.copy_(weight)
                getattr(peers[name], linear).bias.copy_(bias)
    for model in peers.values():
        model.to(dtype)
    return peers


def packed_gradient(model: nn.Module) -> Tensor:
    """The gradient of all weights, ``[K, D]``."""
    return torch.cat([p.grad for name, p in model.named_parameters() if name.endswith("weight") and p.grad is not None])


def check(peers: dict[str, nn.Module], x: Tensor, labels: list[Tensor], matrix: Tensor | None) -> None:
    """All agree with float64: loss, gradient of x, gradient of the weights."""
    reference = copy.deepcopy(peers["wide"]).double()
    exact_x = x.detach().double().requires_grad_()
    wide_labels = [y.double() if y.is_floating_point() else y for y in labels]
    exact = reference(exact_x, wide_labels, None)
    exact.backward()
    tolerance = 2e-5 if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
    for name, model in peers.items():
        x.grad = None
        model.zero_grad()
        loss = model(x, labels, matrix)
        loss.backward()
        for got, expected in (
            (loss.detach(), exact.detach()),
            (x.grad, exact_x.grad),
            (packed_gradient(model), packed_gradient(reference)),
        ):
            error = float((got.double() - expected).norm() / expected.norm())
            if not error <= tolerance:
                raise SystemExit(f"{name}: wrong by {error:.3g} (relative), allowed {tolerance:.3g}")


def bench(shape: tuple[str, int, int, list[tuple[int, str]], float], dtype: torch.dtype, compiled: bool) -> dict[str, Any]:  # fmt: skip  # noqa: E501
    """Times one shape."""
    name, n, d, tasks, missing = shape
    torch.manual_seed(0)
    x = torch.randn(n, d).to(dtype).requires_grad_()
    labels, matrix = make_labels(n, tasks, missing)
    peers = models(d, tasks, missing == 0, dtype)
    check(peers, x, labels, matrix)
    if compiled:
        torch._dynamo.reset()
        for peer in ("list", "wide", "single"):
            # Hundreds of separate products or losses take minutes to compile.
            if peer in peers and (peer == "single" or len(tasks) <= 64):
                peers[f"{peer}+c"] = torch.compile(peers[peer])

    def step(model: nn.Module) -> Callable[[], object]:
        def run() -> None:
            x.grad = None
            model.zero_grad()
            model(x, labels, matrix).backward()

        return run

    like = torch.empty(1, dtype=dtype)
    peaks = [torch.ops.torch_mtl_pyg.multiply_add_rate(like, 0.1) for _ in range(3)]
    ms = time_side_by_side({peer: step(model) for peer, model in peers.items()})
    peaks += [torch.ops.torch_mtl_pyg.multiply_add_rate(like, 0.1) for _ in range(3)]
    peak = statistics.median(peaks)
    others = {peer: t for peer, t in ms.items() if peer != "ours"}
    best = min(others, key=others.__getitem__)
    flops = 6 * n * d * sum(w for w, _ in tasks)
    return {
        "shape": name,
        "n": n,
        "d": d,
        "tasks": tasks,
        "missing": missing,
        "peak": peak,
        "matrix_rate": matrix_rate(dtype),
        "ms": ms,
        "best": best,
        "ratio_to_best": others[best] / ms["ours"],
        "ratio_to_list": ms["list"] / ms["ours"],
        "fraction_of_peak": flops / ms["ours"] / 1e6 / peak,
    }


def main() -> None:
    """Runs the shapes and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", action="append", help="a shape's name; may be repeated")
    p.add_argument("--no-compile", action="store_true", help="leave the peers under torch.compile out")
    p.add_argument("--fresh", action="store_true", help="let the allocator give large blocks back at every step")
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
    results, rows = [], []
    names = ["list", "list+c", "wide", "wide+c", "single", "single+c", "ours"]
    for shape in SHAPES:
        if args.only and shape[0] not in args.only:
            continue
        r = bench(shape, getattr(torch, args.dtype), not args.no_compile)
        results.append(r)
        widths = [w for w, _ in r["tasks"]]
        size = f"{widths[0]}" if len(set(widths)) == 1 else f"{min(widths)}-{max(widths)}"
        rows.append(
            [
                f"{r['shape']} {r['n']}x{r['d']}, {len(widths)}x{size}",
                *(f"{r['ms'][peer]:.3f}" if peer in r["ms"] else "-" for peer in names),
                f"{r['ratio_to_best']:.2f} ({r['best']})",
                f"{r['ratio_to_list']:.1f}",
                f"{r['fraction_of_peak']:.2f}",
                f"{r['peak']:.0f}",
                f"{r['matrix_rate']:.0f}",
            ]
        )
        print(f"  {rows[-1][0]}: {rows[-1][-5]}", file=sys.stderr, flush=True)
    print_table(["shape", *names, "x best", "x list", "of peak", "peak GFLOP/s", "mm GFLOP/s"], rows)
    save(args.json, {"settings": head, "dtype": args.dtype, "fresh": args.fresh, "results": results})


if __name__ == "__main__":
    main()
