"""The part of gpu_check.py for hidden layers, routed rows and encoders: checks against float64, and times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

Times = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]
Expect = Callable[[str, Tensor, Tensor, torch.dtype], None]

TASKS: dict[str, mtl.Task] = {
    "classes": mtl.Task(7, loss="cross_entropy", label_smoothing=0.1),
    "two": mtl.Task(2, loss="cross_entropy"),
    "mse": mtl.Task(1, loss="mse", weight=0.5),
}
# Rows, embedding, hidden layers, whether each row goes to one head alone.
CHECKS: tuple[tuple[int, int, list[int], bool], ...] = (
    *((1, 8, [4], False), (300, 70, [16], False), (600, 64, [24, 8], False)),
    *((1, 8, [], True), (900, 40, [], True), (700, 64, [16], True)),
)
# Rows, embedding, tasks, hidden units; rows and tasks of routed linear heads.
SHAPES = ((100_000, 128, 12, 64),)
ROUTED = ((1_000_000, 30), (1_000_000, 1000))
D, CLASSES = 128, 2


def labels_of(n: int, device: torch.device) -> dict[str, Tensor]:
    """Labels of each task, a third of them missing."""
    out = {name: torch.randint(0, task.out_channels, (n,)) for name, task in TASKS.items() if name != "mse"}
    for y in out.values():
        y[torch.rand(n) < 0.3] = -100
    out["mse"] = torch.where(torch.rand(n) < 0.3, torch.nan, torch.randn(n))
    return {name: y.to(device) for name, y in out.items()}


def check(device: torch.device, dtypes: tuple[torch.dtype, ...], expect: Expect) -> int:
    """Outputs, losses and gradients; returns the number of cases."""
    done = 0
    for n, d, hidden, routed in CHECKS:
        for dtype in dtypes:
            torch.manual_seed(0)
            heads = mtl.MultiTaskHeads(d, TASKS, hidden_channels=hidden or None, act="silu" if hidden else "relu")
            heads = heads.to(device, dtype)
            x = torch.randn(n, d).to(device, dtype).requires_grad_()
            y: Any = labels_of(n, device)
            route = torch.randint(0, len(TASKS), (n,), device=device) if routed else None
            if routed:
                y = torch.where(torch.rand(n) < 0.3, torch.nan, torch.randint(0, 2, (n,))).to(device)
            exact_heads, exact_x = copy.deepcopy(heads).double(), x.detach().double().requires_grad_()
            names = ["dx", *(f"d{name}" for name, _ in heads.named_parameters())]
            out, losses = heads(x, route) if routed else heads.packed(x), heads.loss(x, y, route)
            got = torch.autograd.grad(losses.total, (x, *heads.parameters()))
            with mtl.use_backend("reference"):
                exact = exact_heads(exact_x, route) if routed else exact_heads.packed(exact_x)
                wanted = exact_heads.loss(exact_x, y, route)
                grads = torch.autograd.grad(wanted.total, (exact_x, *exact_heads.parameters()))
            what = f"{n} x {d}, hidden {hidden}, {'routed' if routed else 'all rows'}: "
            if not torch.equal(losses.count, wanted.count):
                raise SystemExit(f"{what}counts {losses.count} instead of {wanted.count}")
            for name, a, b in zip(
                ("outputs", "losses", *names),
                (out, losses.per_task, *got),
                (exact, wanted.per_task, *grads),
                strict=True,
            ):
                expect(what + name, a, b, dtype)
            if not torch.equal(heads.loss(x, y, route).per_task, losses.per_task):
                raise SystemExit(f"{what}losses not the same in a second run")
            done += 1
    for dtype in dtypes:
        torch.manual_seed(0)
        widths = {"a": 5, "b": 70, "c": 16}
        encoders = mtl.MultiTaskEncoders(widths, 24).to(device, dtype)
        xs = {name: torch.randn(50 * w, w).to(device, dtype).requires_grad_() for name, w in widths.items()}
        exact_encoders = copy.deepcopy(encoders).double()
        exact_xs = {name: x.detach().double().requires_grad_() for name, x in xs.items()}
        out = torch.cat(list(encoders(xs).values()))
        grad = torch.randn(out.shape).to(device, dtype)
        got = torch.autograd.grad(out, (*xs.values(), *encoders.parameters()), grad)
        with mtl.use_backend("reference"):
            exact = torch.cat(list(exact_encoders(exact_xs).values()))
            inputs = (*exact_xs.values(), *exact_encoders.parameters())
            wanted_grads = torch.autograd.grad(exact, inputs, grad.double())
        for i, (a, b) in enumerate(zip((out, *got), (exact, *wanted_grads), strict=True)):
            expect(f"encoders, result {i}", a, b, dtype)
        done += 1
    return done


class ListOfMLPs(nn.Module):
    """What is written today."""

    def __init__(self, d: int, hidden: int, tasks: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)) for _ in range(tasks)
        )

    def forward(self, x: Tensor, columns: list[Tensor]) -> Tensor:
        losses = [F.cross_entropy(head(x), y) for head, y in zip(self.heads, columns, strict=True)]
        return torch.stack(losses).sum()


def step(loss: Callable[[], Tensor], x: Tensor, model: nn.Module) -> Callable[[], object]:
    parameters = [x, *model.parameters()]
    return lambda: torch.autograd.grad(loss(), parameters)


def bench_hidden(
    n: int, d: int, tasks: int, hidden: int, dtype: torch.dtype, compiled: bool, times: Times
) -> dict[str, float]:
    """Milliseconds of a step with losses."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layout = {f"t{i}": mtl.Task(CLASSES, loss="cross_entropy") for i in range(tasks)}
    heads = mtl.MultiTaskHeads(d, layout, hidden_channels=hidden).to("cuda", dtype)
    mlps = ListOfMLPs(d, hidden, tasks).to("cuda", dtype)
    x = torch.randn(n, d, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.randint(0, CLASSES, (n, tasks), device="cuda")
    columns = [c.contiguous() for c in y.unbind(1)]
    steps = {
        "ours": step(lambda: heads.loss(x, y).total, x, heads),
        "list": step(lambda: mlps(x, columns), x, mlps),
    }
    if compiled:
        fast = torch.compile(mlps)
        steps["list+c"] = step(lambda: fast(x, columns), x, mlps)
    return times(steps)


def bench_routed(n: int, tasks: int, dtype: torch.dtype, times: Times) -> dict[str, float]:
    """Milliseconds of a step with losses, each row through its own head."""
    torch.manual_seed(0)
    heads = mtl.MultiTaskHeads(D, {f"t{i}": mtl.Task(CLASSES, loss="cross_entropy") for i in range(tasks)})
    heads = heads.to("cuda", dtype)
    layers = nn.ModuleList(nn.Linear(D, CLASSES) for _ in range(tasks)).to("cuda", dtype)
    x = torch.randn(n, D, device="cuda", dtype=dtype, requires_grad=True)
    route = torch.randint(0, tasks, (n,), device="cuda")
    y = torch.randint(0, CLASSES, (n,), device="cuda")

    def by_sort() -> Tensor:
        order = torch.argsort(route, stable=True)
        counts = torch.bincount(route, minlength=tasks).tolist()
        parts, labels = x[order].split(counts), y[order].split(counts)
        losses = [F.cross_entropy(f(p), own) for f, p, own in zip(layers, parts, labels, strict=True)]
        return torch.stack(losses).sum()

    return times({"ours": step(lambda: heads.loss(x, y, route).total, x, heads), "list": step(by_sort, x, layers)})


def rows_of(compiled: bool, times: Times) -> tuple[list[dict[str, Any]], list[list[str]], list[str]]:
    """Figures, and a table."""
    results: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for n, d, tasks, hidden in SHAPES:
            ms = bench_hidden(n, d, tasks, hidden, dtype, compiled, times)
            results.append({"what": f"{n} x {d}, {tasks} x {CLASSES}, hidden {hidden}", "dtype": str(dtype), "ms": ms})
        for n, tasks in ROUTED:
            ms = bench_routed(n, tasks, dtype, times)
            results.append({"what": f"routed {n} x {D}, {tasks} tasks", "dtype": str(dtype), "ms": ms})
    rows = []
    for r in results:
        ms = r["ms"]
        best = min(t for name, t in ms.items() if name != "ours") / ms["ours"]
        cells = [f"{ms[name]:.3f}" if name in ms else "-" for name in ("ours", "list", "list+c")]
        rows.append([f"{r['what']}, {r['dtype'].removeprefix('torch.')}", *cells, f"{best:.2f}"])
    return results, rows, ["step, ms", "ours", "list", "list+c", "best/ours"]
