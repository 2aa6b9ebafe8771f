"""Each row through the head of its own task, against what people write today: forward, step, and step with the loss.

    python benchmarks/bench_routed.py [--threads 2] [--only 1M] [--no-compile] [--quick] [--json FILE]

A step is forward, cross-entropy (mean over the rows), and the gradients of x and of all parameters. Every case is first
checked against float64. Peers:

- ``hetero``: PyG's ``HeteroLinear`` of the widest head's width, which sorts the rows by type;
- ``masks``: a ``ModuleList``, and a loop over tasks with boolean masks (not where a step of it takes many seconds);
- ``gather``: each row's own weight, ``weight[task]``, and ``baddbmm`` (not where that needs more than 8 GB);
- ``sort``: rows sorted by task, a ``Linear`` on each task's run of rows, and back;
- ``hetero+c``, ``masks+c``, ``gather+c``, ``sort+c``: the same under ``torch.compile``, where it compiles.

Where the heads' widths differ, the columns that a row's head does not have are hidden from the loss. ``loss`` is
``heads.loss(x, y, task=task)`` with its backward, weighted so that its total is the mean over the rows, against the
best peer's step.

``of limit``: the time that the machine needs at the least, over ours: the multiply-adds at the rate of our register
tile, or the bytes of x, outputs (and their gradients, in a step) at that of copying a large tensor, what is more.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import copy_rate, keep_freed_memory, multiply_add_rate, print_table, save, settings, time_side_by_side
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import HeteroLinear

import torch_mtl_pyg as mtl

MOST_BYTES = 8e9
MOST_MASKED = 3e8  # rows times tasks
MOST_UNROLLED = 64  # compiling more tasks than this one by one takes minutes


class Case(NamedTuple):
    name: str
    rows: int
    tasks: int
    widths: tuple[int, int] = (8, 8)  # of the narrowest and the widest head
    is_sorted: bool = False
    hidden: int = 0
    d: int = 128

    @property
    def classes(self) -> list[int]:
        low, high = self.widths
        return [low + i * 7 % (high - low + 1) for i in range(self.tasks)]


CASES = [
    *(Case(f"{n}-{tasks}", rows, tasks) for n, rows in (("10k", 10_000), ("1M", 1_000_000)) for tasks in (3, 30, 1000)),
    Case("10k-30-ragged", 10_000, 30, (1, 16)),
    Case("1M-30-ragged", 1_000_000, 30, (1, 16)),
    Case("10k-30-sorted", 10_000, 30, is_sorted=True),
    Case("1M-30-sorted", 1_000_000, 30, is_sorted=True),
    Case("100k-30-mlp", 100_000, 30, hidden=64),
]
QUICK = [
    Case("quick", 70, 5, (3, 3), d=12),
    Case("quick-ragged", 40, 6, (1, 4), is_sorted=True, d=7),
    Case("quick-mlp", 50, 4, (2, 2), hidden=6, d=5),
]


# ---- Peers: each returns [N, widest], whatever the columns hold that a row's head does not have.


class Layers(nn.Module):
    """Weights ``[T, inputs, outputs]`` and biases ``[T, outputs]`` of one layer of all heads, padded to the widest."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = [case.d, *([case.hidden] if case.hidden else []), max(case.classes)]
        self.case, self.sizes = case, list(itertools.pairwise(sizes))


class Hetero(Layers):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.layers = nn.ModuleList([HeteroLinear(a, b, case.tasks, is_sorted=case.is_sorted) for a, b in self.sizes])

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x.relu() if i else x, task)
        return x

    def fill(self, layer: int, weight: Tensor, bias: Tensor) -> None:
        self.layers[layer].weight.copy_(weight)
        self.layers[layer].bias.copy_(bias)

    def first_gradient(self) -> Tensor:
        return self.layers[0].weight.grad


class Masks(Layers):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.heads = nn.ModuleList()
        for width in case.classes:
            parts: list[nn.Module] = [nn.Linear(case.d, case.hidden), nn.ReLU()] if case.hidden else []
            self.heads.append(nn.Sequential(*parts, nn.Linear(case.hidden or case.d, width)))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], max(self.case.classes))
        for i, head in enumerate(self.heads):
            rows = task == i
            part = head(x[rows])
            out[rows, : part.shape[1]] = part
        return out

    def fill(self, layer: int, weight: Tensor, bias: Tensor) -> None:
        for head, w, b in zip(self.heads, weight, bias, strict=True):
            linear = head[2 * layer]
            linear.weight.copy_(w.t()[: linear.out_features])
            linear.bias.copy_(b[: linear.out_features])

    def first_gradient(self) -> Tensor:
        grads = [head[0].weight.grad.t() for head in self.heads]
        widest = max(g.shape[1] for g in grads)
        return torch.stack([F.pad(g, (0, widest - g.shape[1])) for g in grads])


class Gather(Layers):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.weights = nn.ParameterList([torch.empty(case.tasks, a, b) for a, b in self.sizes])
        self.biases = nn.ParameterList([torch.empty(case.tasks, b) for _, b in self.sizes])

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x.relu() if i else x
            x = torch.baddbmm(bias[task].unsqueeze(1), x.unsqueeze(1), weight[task]).squeeze(1)
        return x

    def fill(self, layer: int, weight: Tensor, bias: Tensor) -> None:
        self.weights[layer].copy_(weight)
        self.biases[layer].copy_(bias)

    def first_gradient(self) -> Tensor:
        return self.weights[0].grad

    def bytes(self) -> int:
        return 4 * self.case.rows * sum(a * b for a, b in self.sizes)


class Sort(Masks):
    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        widest = max(self.case.classes)
        counts = torch.bincount(task, minlength=self.case.tasks).tolist()
        if not self.case.is_sorted:
            task, order = torch.sort(task, stable=True)
            x = x[order]
        parts = [head(part) for head, part in zip(self.heads, x.split(counts), strict=True)]
        out = torch.cat([p if p.shape[1] == widest else F.pad(p, (0, widest - p.shape[1])) for p in parts])
        if self.case.is_sorted:
            return out
        return torch.empty_like(out).index_copy(0, order, out)


class Ours(Layers):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        tasks = {f"t{i}": mtl.Task(width, loss="cross_entropy") for i, width in enumerate(case.classes)}
        self.heads = mtl.MultiTaskHeads(case.d, tasks, hidden_channels=case.hidden or None)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return self.heads(x, task=task)  # type: ignore[return-value]

    def fill(self, layer: int, weight: Tensor, bias: Tensor) -> None:
        names = self.heads.layer_names(layer)
        for i, name in enumerate(self.heads.tasks):
            rows = self.heads.rows_of(layer, name)
            getattr(self.heads, names[0])[rows] = weight[i].t()[: rows.stop - rows.start]
            getattr(self.heads, names[1])[rows] = bias[i, : rows.stop - rows.start]

    def first_gradient(self) -> Tensor:
        grad = getattr(self.heads, self.heads.layer_names(0)[0]).grad
        grads = [grad[self.heads.rows_of(0, name)].t() for name in self.heads.tasks]
        return torch.stack([F.pad(g, (0, self.sizes[0][1] - g.shape[1])) for g in grads])


class OursLoss(Ours):
    """The loss in the same pass. Each task's mean times its share of the rows: the mean over the rows."""

    def weigh(self, task: Tensor) -> None:
        shares = torch.bincount(task, minlength=self.case.tasks) / task.shape[0]
        tasks = {
            f"t{i}": mtl.Task(width, "cross_entropy", weight=float(share))
            for i, (width, share) in enumerate(zip(self.case.classes, shares, strict=True))
        }
        state = self.heads.state_dict()
        self.heads = mtl.MultiTaskHeads(self.case.d, tasks, hidden_channels=self.case.hidden or None)
        self.heads.load_state_dict(state)

    def loss(self, x: Tensor, task: Tensor, y: Tensor) -> Tensor:
        return self.heads.loss(x, y, task=task).total


PEERS: dict[str, type[Any]] = {
    "hetero": Hetero, "masks": Masks, "gather": Gather, "sort": Sort, "ours": Ours, "loss": OursLoss,
}  # fmt: skip


# ---- One case.


class Inputs(NamedTuple):
    x: Tensor
    task: Tensor
    y: Tensor
    hidden_columns: Tensor | None  # [T, widest]: -inf where a head has no column


def inputs_of(case: Case) -> Inputs:
    task = torch.randint(0, case.tasks, (case.rows,))
    task = task.sort().values if case.is_sorted else task
    classes = torch.tensor(case.classes)
    y = (torch.rand(case.rows) * classes[task]).long()
    widest = max(case.classes)
    outside = torch.where(torch.arange(widest) < classes.unsqueeze(1), 0.0, -torch.inf)
    x = torch.randn(case.rows, case.d, requires_grad=True)
    return Inputs(x, task, y, outside if min(case.classes) < widest else None)


def row_mean(out: Tensor, i: Inputs) -> Tensor:
    """Cross-entropy over the columns of each row's head."""
    if i.hidden_columns is not None:
        out = out + i.hidden_columns.to(out.dtype)[i.task]
    return F.cross_entropy(out, i.y)


def run_step(model: Any, x: Tensor, i: Inputs, with_loss: bool) -> Tensor:
    x.grad = None
    model.zero_grad()
    loss = model.loss(x, i.task, i.y) if with_loss else row_mean(model(x, i.task), i)
    loss.backward()
    return loss.detach()  # type: ignore[no-any-return]


def models(case: Case, task: Tensor) -> dict[str, Any]:
    """The peers and ours, all with the same weights."""
    found: dict[str, Any] = {name: peer(case) for name, peer in PEERS.items()}
    if 2 * found["gather"].bytes() > MOST_BYTES:
        del found["gather"]
    if case.rows * case.tasks > MOST_MASKED:
        del found["masks"]
    with torch.no_grad():
        for layer, (a, b) in enumerate(found["ours"].sizes):
            weight, bias = torch.randn(case.tasks, a, b) / a**0.5, torch.randn(case.tasks, b)
            for model in found.values():
                model.fill(layer, weight, bias)
    found["loss"].weigh(task)
    return found


def check(peers: Mapping[str, Any], i: Inputs) -> None:
    """All agree with float64: outputs, loss, gradient of x and of the first layer's weights."""
    reference = copy.deepcopy(peers["sort"]).double()
    exact_x = i.x.detach().double().requires_grad_()
    exact_loss = run_step(reference, exact_x, i, False)
    widths = torch.tensor(reference.case.classes)
    valid = torch.arange(int(widths.max())) < widths[i.task].unsqueeze(1)
    exact_out = reference(exact_x, i.task).detach()[valid]
    assert exact_x.grad is not None
    for name, model in peers.items():
        loss = run_step(model, i.x, i, name == "loss")
        pairs = [(loss, exact_loss), (i.x.grad, exact_x.grad), (model.first_gradient(), reference.first_gradient())]
        if name != "loss":
            pairs.append((model(i.x, i.task).detach()[valid], exact_out))
        for got, expected in pairs:
            error = float((got.double() - expected).norm() / expected.norm())  # type: ignore[union-attr]
            if not error <= 3e-5:
                raise SystemExit(f"{name}: wrong by {error:.3g} (relative), allowed 3e-5")


def compiled_peers(peers: Mapping[str, Any], i: Inputs) -> dict[str, Any]:
    """Those peers under torch.compile that compile."""
    found = {}
    torch._dynamo.reset()
    for name, model in peers.items():
        unrolled = name in ("masks", "sort", "hetero")
        if name in ("ours", "loss") or (unrolled and model.case.tasks > MOST_UNROLLED):
            continue
        try:
            compiled = torch.compile(model)
            run_step(compiled, i.x, i, False)
            with torch.no_grad():
                compiled(i.x, i.task)
        except Exception as error:  # whatever the compiler makes of it
            print(f"  {name}: does not compile: {type(error).__name__}", file=sys.stderr)
            continue
        found[f"{name}+c"] = compiled
    return found


def bench(case: Case, compiled: bool, timing: Mapping[str, float], limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Times one case: forward, step, step with the loss in it."""
    torch.manual_seed(0)
    i = inputs_of(case)
    peers = models(case, i.task)
    check(peers, i)
    if compiled:
        peers |= compiled_peers(peers, i)

    def forward(model: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return model(i.x, i.task)

        return run

    def step(name: str, model: Any) -> Callable[[], object]:
        return lambda: run_step(model, i.x, i, name == "loss")

    products = sum(a * b for a, b in peers["ours"].sizes)
    widest = max(case.classes)
    results = []
    for what, functions in (
        ("forward", {name: forward(model) for name, model in peers.items() if name != "loss"}),
        ("step", {name: step(name, model) for name, model in peers.items()}),
    ):
        ms = time_side_by_side(functions, **timing)  # type: ignore[arg-type]
        best = min((name for name in ms if name not in ("ours", "loss")), key=ms.__getitem__)
        for ours in ("ours", "loss") if what == "step" else ("ours",):
            passes = 1 if what == "forward" else 3
            rate, bandwidth = limits
            # x read, outputs written. A step reads x again and writes its gradient, and has those of the outputs.
            moved = 4 * case.rows * (case.d + widest)
            if what == "step":
                moved = 4 * case.rows * (3 * case.d + 3 * widest if ours == "ours" else 2 * case.d)
            least = max(2 * passes * case.rows * products / rate / 1e6, moved / bandwidth / 1e6)
            results.append(
                {
                    "case": case._asdict(),
                    "what": what if ours == "ours" else "loss",
                    "ms": {name: t for name, t in ms.items() if name not in {"ours", "loss"} - {ours}},
                    "ours": ms[ours],
                    "best": best,
                    "ratio_to_best": ms[best] / ms[ours],
                    "least_ms": least,
                    "of_limit": least / ms[ours],
                }
            )
    return results


def main() -> None:
    """Runs the cases and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", action="append", help="part of a case's name; may be repeated")
    p.add_argument("--no-compile", action="store_true", help="leave the peers under torch.compile out")
    p.add_argument("--fresh", action="store_true", help="let the allocator give large blocks back at every step")
    p.add_argument("--quick", action="store_true", help="tiny cases, hardly timed: does it run, is it right?")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    if not args.fresh:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # torch.compile's own
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64
    mtl.use_backend("fused")
    head = settings()
    limits = (multiply_add_rate(torch.float32), copy_rate(1 << 20 if args.quick else 1 << 28))
    print(f"{head['machine']}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, "
          f"torch_geometric {head['versions']['torch_geometric']}, float32")  # fmt: skip
    print(f"Multiply-adds {limits[0]:.0f} GFLOP/s, copying {limits[1]:.1f} GB/s.")
    print("ms; x best: time of the best peer over ours.\n")
    timing = {"rounds": 1, "seconds": 0.0, "warm_up": 0.0} if args.quick else {"most": 0.5}
    names = [f"{name}{c}" for name in ("hetero", "masks", "gather", "sort") for c in ("", "+c")]
    results, rows = [], []
    for case in QUICK if args.quick else CASES:
        if args.only and not any(only in case.name for only in args.only):
            continue
        for r in bench(case, not args.no_compile, timing, limits):
            results.append(r)
            low, high = case.widths
            size = f"{case.rows}x{case.d}, {case.tasks}x{low if low == high else f'{low}-{high}'}"
            rows.append(
                [
                    f"{case.name}: {size}",
                    r["what"],
                    *(f"{r['ms'][peer]:.3f}" if peer in r["ms"] else "-" for peer in names),
                    f"{r['ours']:.3f}",
                    f"{r['ratio_to_best']:.2f} ({r['best']})",
                    f"{r['of_limit']:.2f}",
                ]
            )
            print(f"  {rows[-1][0]}, {r['what']}: {rows[-1][-2]}", file=sys.stderr, flush=True)
    print_table(["case", "", *names, "ours", "x best", "of limit"], rows)
    save(args.json, {"settings": head, "gflops": limits[0], "copy_gb_per_s": limits[1], "results": results})


if __name__ == "__main__":
    main()
