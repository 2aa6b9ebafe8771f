"""A balanced step through the Gramian, against a plain step and against TorchJD's ``mtl_backward``.

    python benchmarks/bench_balancing.py [--threads 2] [--json FILE]

The model is an MLP trunk of two layers with linear heads, two classes per task. Steps, all with the gradients of trunk
and heads:

- ``plain``: ``heads.loss(x, y).total.backward()``;
- ``gramian``: with ``gramian=True``, the weights of UPGrad from it, and one backward with these weights;
- ``mtl_backward``: T losses, their gradients at the embedding by T backward passes, one batched backward through the
  trunk, and UPGrad on the ``[T, P]`` Jacobian of the trunk's parameters.

The weighting itself is a quadratic program of TorchJD, in both. ``gramian*`` and ``mtl_backward*`` are
the same steps without it: ours computes the Gramian and takes weights known before, theirs takes the mean of the
Jacobian's rows. The two Gramians are not the same: ours is that of the embedding, TorchJD's that of the trunk's
parameters.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import print_table, save, settings, time_side_by_side
from torch import nn
from torch.nn import functional as F
from torchjd.aggregation import Aggregator, Mean, UPGrad, UPGradWeighting
from torchjd.autojac import jac_to_grad, mtl_backward

import torch_mtl_pyg as mtl

# Rows, embedding, tasks.
SHAPES = [(512, 256, 12), (1024, 256, 64)]


def bench(n: int, d: int, tasks: int) -> dict[str, float]:
    """Times one shape, and checks the Gramian first."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU())
    heads = mtl.MultiTaskHeads(d, {f"t{i}": mtl.Task(2, loss="cross_entropy") for i in range(tasks)})
    modules = nn.ModuleList(heads.to_modules().values())
    x, y = torch.randn(n, d), torch.randint(0, 2, (n, tasks))
    labels = list(y.unbind(1))
    weighting, fixed = UPGradWeighting(), torch.rand(tasks)
    parameters = [*trunk.parameters(), *heads.parameters(), *modules.parameters()]

    def clear() -> None:
        for p in parameters:
            p.grad = None

    def check() -> None:
        z = trunk(x).detach().requires_grad_()
        losses = [F.cross_entropy(m(z), label) for m, label in zip(modules, labels, strict=True)]
        rows = [torch.autograd.grad(loss, z, retain_graph=True)[0].double().flatten() for loss in losses]
        exact = torch.stack(rows) @ torch.stack(rows).t()
        error = float((heads.loss(z, y, gramian=True).gramian.double() - exact).norm() / exact.norm())
        if not error < 1e-4:
            raise SystemExit(f"Gramian: wrong by {error:.3g} (relative)")

    def plain() -> None:
        clear()
        heads.loss(trunk(x), y).total.backward()

    def gramian(weights: Callable[[torch.Tensor], torch.Tensor]) -> None:
        clear()
        losses = heads.loss(trunk(x), y, gramian=True)
        (weights(losses.gramian) @ losses.per_task).backward()

    def torchjd(aggregator: Aggregator) -> None:
        clear()
        z = trunk(x)
        mtl_backward([F.cross_entropy(m(z), label) for m, label in zip(modules, labels, strict=True)], features=z)
        jac_to_grad(list(trunk.parameters()), aggregator)

    check()
    matrix = heads.loss(trunk(x), y, gramian=True).gramian
    steps: dict[str, Callable[[], object]] = {
        "plain": plain,
        "gramian": lambda: gramian(weighting),
        "gramian*": lambda: gramian(lambda _: fixed),
        "weighting": lambda: weighting(matrix),
        "mtl_backward": lambda: torchjd(UPGrad()),
        "mtl_backward*": lambda: torchjd(Mean()),
    }
    return time_side_by_side(steps)


def main() -> None:
    """Runs the shapes and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(f"{head['machine']}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, ms\n")
    results, rows = [], []
    for n, d, tasks in SHAPES:
        ms = bench(n, d, tasks)
        results.append({"n": n, "d": d, "tasks": tasks, "ms": ms})
        rows.append(
            [
                f"{n}x{d}, {tasks} tasks",
                *(f"{t:.2f}" for t in ms.values()),
                f"{ms['gramian*'] / ms['plain']:.2f}",
                f"{ms['mtl_backward*'] / ms['gramian*']:.1f}",
                f"{ms['mtl_backward'] / ms['gramian']:.1f}",
            ]
        )
    print_table(["shape", *results[0]["ms"], "gramian*/plain", "mtl*/gramian*", "mtl/gramian"], rows)
    print("\n* without the weighting")
    save(args.json, {"settings": head, "results": results})


if __name__ == "__main__":
    main()
