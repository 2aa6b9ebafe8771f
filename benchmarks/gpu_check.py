"""One command on a machine with a GPU: builds, checks against float64, and times against what people write today.

    python benchmarks/gpu_check.py [--checks] [--no-compile] [--quick] [--emulated] [--json FILE]

1. Builds the library with the CUDA kernels (nvcc), and loads it.
2. Checks heads, their gradients, losses and Gramians of every dtype and kind of loss against float64; hidden layers,
   routed rows, encoders (gpu_check_mlp.py) and convolutions (gpu_check_graphs.py) too; steps under torch.compile,
   autocast, a gradient scaler, in threads and on other streams and GPUs (gpu_check_use.py); and captures a step in a
   CUDA graph, which a wait of the host would make fail.
3. Runs the same checks once more under ``compute-sanitizer``, where that is installed.
4. Times a step with losses, the same as a CUDA graph (without the host's part), and heads alone, in turns: a
   ``ModuleList`` and a loop over losses (``list``), one wide ``Linear`` and losses over ``split`` (``wide``), one loss
   over ``[N * T, C]`` (``single``), each under ``torch.compile`` too (``+c``), and Liger's fused cross-entropy where it
   is installed. Beside them the rates of copies and of large matrix products in the same run.

``--checks``: only 1 and 2. ``--quick``: without 3, and of the compiled peers ``single`` alone, the fastest of them on
an H200. ``--emulated``: the checks on emulated kernels, without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_check_graphs
import gpu_check_mlp
import gpu_check_use
import torch
from common import print_table, save, settings
from torch import Tensor, nn
from torch.nn import functional as F

import torch_mtl_pyg as mtl

KINDS: dict[str, mtl.Task] = {
    "classes": mtl.Task(7, loss="cross_entropy", label_smoothing=0.1),
    "two": mtl.Task(2, loss="cross_entropy", class_weight=[0.5, 2.0]),
    "many": mtl.Task(40, loss="cross_entropy"),
    "binary": mtl.Task(3, loss="bce", pos_weight=4.0),
    "mse": mtl.Task(1, loss="mse", weight=0.5),
    "l1": mtl.Task(1, loss="l1"),
    "huber": mtl.Task(2, loss="huber", delta=0.7),
    "counts": mtl.Task(1, loss="poisson_nll"),
    "gaussian": mtl.Task(4, loss="gaussian_nll"),
}
# Cross-entropy alone, which 16-bit heads compute in registers, in fragments of eight columns: of 32, 64 and 128.
PLAIN: tuple[tuple[int, ...], ...] = ((7, 2), (2, 2, 2, 2, 1), (16, 9, 8), (3,) * 7, (40, 17, 2), (16,) * 8)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rows, embedding, the tasks: in one launch, and by way of logits in memory.
NARROW = {name: KINDS[name] for name in ("classes", "two", "mse", "binary")}
CHECKS: tuple[tuple[int, int, Mapping[str, mtl.Task]], ...] = (
    *((1, 8, KINDS), (300, 64, KINDS), (1000, 100, NARROW), (517, 300, KINDS), (64, 33, NARROW), (0, 16, KINDS)),
    *(
        (n, d, {f"t{i}": mtl.Task(c, loss="cross_entropy") for i, c in enumerate(classes)})
        for n, d, classes in zip((1, 700, 1300, 2000, 129, 5000), (8, 128, 100, 64, 33, 72), PLAIN, strict=True)
    ),
)
# Rows, embedding, tasks, classes.
SHAPES = ((100_000, 128, 8, 16), (10_000, 256, 12, 2), (1_000_000, 128, 3, 7), (20_000, 256, 16, 64))


def labels_of(n: int, tasks: Mapping[str, mtl.Task], device: torch.device) -> dict[str, Tensor]:
    """Labels of each kind, a third of them missing."""
    out = {}
    for name, task in tasks.items():
        columns = task.out_channels // 2 if task.loss == "gaussian_nll" else task.out_channels
        if task.loss == "cross_entropy":
            y = torch.randint(0, task.out_channels, (n,))
            y[torch.rand(n) < 0.3] = -100
        else:
            y = torch.rand(n, columns).round() if task.loss == "bce" else torch.rand(n, columns) * 3
            y[torch.rand(n, columns) < 0.3] = float("nan")
        out[name] = y.to(device)
    return out


def expect(what: str, got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The error, relative to the norm: some roundings of the dtype, and of sums in float32."""
    if got.numel() == 0:
        return
    allowed = 4 * torch.finfo(dtype).eps + (1e-12 if dtype == torch.float64 else 2e-5)
    error = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)) if bool(exact.any()) else 0.0
    if not error <= allowed:
        raise SystemExit(f"{what}, {dtype}: error {error:.3g} of the norm, allowed {allowed:.3g}")


def check(device: torch.device) -> int:
    """All checks; returns their number."""
    done = 0
    for n, d, tasks in CHECKS:
        for dtype in DTYPES:
            torch.manual_seed(0)
            heads = mtl.MultiTaskHeads(d, tasks).to(device, dtype)
            x = torch.randn(n, d).to(device, dtype).requires_grad_()
            y = labels_of(n, tasks, device)
            exact_heads, exact_x = copy.deepcopy(heads).double(), x.detach().double().requires_grad_()
            out = heads.packed(x)
            grad = torch.randn(out.shape, device=device).to(dtype)
            got = torch.autograd.grad(out, (x, heads.weight, heads.bias), grad)
            with mtl.use_backend("reference"):
                exact = exact_heads.packed(exact_x)
                wanted = torch.autograd.grad(exact, (exact_x, exact_heads.weight, exact_heads.bias), grad.double())
            for what, a, b in zip(("heads", "dx", "dW", "db"), (out, *got), (exact, *wanted), strict=True):
                expect(f"{what} of {n} x {d}", a, b, dtype)
            losses = heads.loss(x, y)
            losses.total.backward()
            gramian = heads.loss(x.detach(), y, gramian=True).gramian
            with mtl.use_backend("reference"):
                reference = exact_heads.loss(exact_x, y)
                reference.total.backward()
                wanted_gramian = exact_heads.loss(exact_x.detach(), y, gramian=True).gramian
            if not torch.equal(losses.count, reference.count):
                raise SystemExit(f"counts of {n} x {d}, {dtype}: {losses.count} instead of {reference.count}")
            assert gramian is not None and wanted_gramian is not None
            for what, a, b in (
                ("losses", losses.per_task, reference.per_task),
                ("total", losses.total, reference.total),
                ("Gramian", gramian, wanted_gramian),
                ("dx of losses", x.grad, exact_x.grad),
                ("dW of losses", heads.weight.grad, exact_heads.weight.grad),
                ("db of losses", heads.bias.grad, exact_heads.bias.grad),
            ):
                assert isinstance(a, Tensor) and isinstance(b, Tensor)
                expect(f"{what} of {n} x {d}", a, b, dtype)
            again = heads.loss(x, y)
            if not torch.equal(again.per_task, losses.per_task):
                raise SystemExit(f"losses of {n} x {d}, {dtype}: not the same in a second run")
            done += 1
    return done


def check_graph(device: torch.device) -> None:
    """A step in a CUDA graph."""
    heads = mtl.MultiTaskHeads(64, {"a": mtl.Task(5, loss="cross_entropy"), "b": mtl.Task(1, loss="mse")}).to(device)
    x = torch.randn(1000, 64, device=device, requires_grad=True)
    y = {"a": torch.randint(0, 5, (1000,), device=device), "b": torch.randn(1000, device=device)}
    parameters = (x, heads.weight, heads.bias)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = torch.autograd.grad(heads.loss(x, y).total, parameters)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(heads.loss(x, y).total, parameters)
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)):
        raise SystemExit("the gradients of a captured step are not those of a plain one")


# ---- Times.


def times(functions: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds on the GPU, in turns; 256 MiB are written before each, so that no cache helps."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(5):
            function()
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            functions[name]()
            end.record()
            torch.cuda.synchronize()
            measured[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in measured.items()}


def replayed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, which leaves out what the host does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def bench(
    n: int, d: int, tasks: int, classes: int, dtype: torch.dtype, compiled: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds of the step with losses, of the same in a CUDA graph, and of the forward alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(d, {f"t{i}": mtl.Task(classes, loss="cross_entropy") for i in range(tasks)})
    heads = heads.to("cuda", dtype)
    modules = nn.ModuleList(heads.to_modules().values())
    wide = nn.Linear(d, tasks * classes).to("cuda", dtype)
    x = torch.randn(n, d, device="cuda", dtype=dtype, requires_grad=True)
    y = torch.randint(0, classes, (n, tasks), device="cuda")
    columns, flat = [c.contiguous() for c in y.unbind(1)], y.reshape(-1)
    matrix = {f"t{i}": c for i, c in enumerate(columns)}

    def of_list(x: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(m(x), c) for m, c in zip(modules, columns, strict=True)]).sum()

    def of_wide(x: Tensor) -> Tensor:
        parts = wide(x).split(classes, 1)
        return torch.stack([F.cross_entropy(p, c) for p, c in zip(parts, columns, strict=True)]).sum()

    def of_single(x: Tensor) -> Tensor:
        return F.cross_entropy(wide(x).view(-1, classes), flat) * tasks

    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: heads.loss(x, matrix).total,
        "list": of_list,
        "wide": of_wide,
        "single": of_single,
    }
    losses.update({f"{name}+c": torch.compile(losses[name]) for name in compiled})
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        losses["liger"] = lambda x: liger_cross_entropy(wide(x).view(-1, classes), flat) * tasks
    parameters = [x, *heads.parameters(), *modules.parameters(), *wide.parameters()]

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for p in parameters:
                p.grad = None
            losses[name](x).backward()

        return run

    forward: dict[str, Callable[[], object]] = {
        "ours": lambda: heads.packed(x.detach()),
        "list": lambda: [m(x.detach()) for m in modules],
        "wide": lambda: wide(x.detach()),
    }
    with torch.no_grad():
        alone = times(forward)
    steps = {name: step(name) for name in losses}
    return {"step": times(steps), "graph": times({name: replayed(f) for name, f in steps.items()}), "forward": alone}


def matrix_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of PyTorch's own product of two large square matrices."""
    n = 8192
    a, b = torch.randn(n, n, device="cuda", dtype=dtype), torch.randn(n, n, device="cuda", dtype=dtype)
    return 2e-9 * n**3 / times({"mm": lambda: a @ b}, 7)["mm"]


def bench_all(compiled: Sequence[str]) -> list[dict[str, Any]]:
    """All shapes; prints a table for each dtype."""
    copies = float(torch.ops.torch_mtl_pyg.copy_rate(torch.ones(1, device="cuda"), 0.3))
    results: list[dict[str, Any]] = []
    for kind in ("bfloat16", "float32", "tf32"):
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        rate = matrix_rate(dtype)
        print(f"\n{kind}: copies {copies:.0f} GB/s, products {rate:.0f} TFLOP/s")
        rows, columns = [], ["ours", "list", "wide", "single", "list+c", "wide+c", "single+c", "liger"]
        for n, d, tasks, classes in SHAPES:
            ms = bench(n, d, tasks, classes, dtype, compiled)
            k, size = tasks * classes, dtype.itemsize
            of_step = (2 * n * d * size + 8 * n * tasks, 6)
            limits = {"step": of_step, "graph": of_step, "forward": (n * (d + k) * size, 2)}
            for name, (moved, products) in limits.items():
                own = ms[name]
                peers = [t for peer, t in own.items() if peer != "ours"]
                of_copies = moved / own["ours"] / 1e6 / copies
                of_products = products * n * d * k / own["ours"] / 1e9 / rate
                results.append({"shape": (n, d, tasks, classes), "dtype": kind, "what": name, "ms": own,
                                "of_copies": of_copies, "of_products": of_products})  # fmt: skip
                cells = [f"{own[c]:.3f}" if c in own else "-" for c in columns]
                ratios = [f"{own['list'] / own['ours']:.2f}", f"{min(peers) / own['ours']:.2f}"]
                rows.append([f"{name} {n} x {d}, {tasks} x {classes}", *cells, *ratios,
                             f"{of_copies:.2f}", f"{of_products:.2f}"])  # fmt: skip
        print_table(["", *columns, "list/ours", "best/ours", "of copies", "of products"], rows)
    return results


def main() -> None:
    """Everything, in turn."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checks", action="store_true", help="build and check, no times")
    p.add_argument("--no-compile", action="store_true", help="without torch.compile")
    p.add_argument("--quick", action="store_true", help="without compute-sanitizer, one compiled peer")
    p.add_argument("--emulated", action="store_true", help="check emulated kernels on the CPU")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    if not args.emulated and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU, so nothing was run. On a CPU: --emulated.")
    # Read when the library is looked for.
    os.environ.update({"TORCH_MTL_PYG_EMULATE": "cuda"} if args.emulated else {"TORCH_MTL_PYG_CUDA": "1"})
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if args.emulated else "cuda")
    start = time.monotonic()
    mtl.use_backend("fused")
    head = settings()
    print(f"{mtl.backend_info().reason} ({time.monotonic() - start:.0f} s)")
    result: dict[str, Any] = {"settings": head, "checks": check(device)}
    for part in (gpu_check_graphs, gpu_check_mlp):
        result["checks"] += part.check(device, DTYPES, expect)
    result["checks"] += gpu_check_use.check(device, expect)
    print(f"{result['checks']} checks passed.")
    if args.emulated:
        return save(args.json, result)
    result["gpu"] = torch.cuda.get_device_name()
    check_graph(device)
    print(f"A step was captured in a CUDA graph. GPU: {result['gpu']}.")
    if not args.checks:
        sanitizer = shutil.which("compute-sanitizer")
        if args.quick:
            print("compute-sanitizer was left out.")
        elif sanitizer:
            command = [sanitizer, "--error-exitcode", "9", sys.executable, __file__, "--checks"]
            done = subprocess.run(command, capture_output=True, text=True)
            result["sanitizer"] = done.returncode
            print(f"compute-sanitizer: {done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-500:]}")
        else:
            print("compute-sanitizer was not found.")
        compiled = [] if args.no_compile else ["single"] if args.quick else ["list", "wide", "single"]
        result["results"] = bench_all(compiled)
        copies = float(torch.ops.torch_mtl_pyg.copy_rate(torch.ones(1, device="cuda"), 0.3))
        result["graphs"], rows, header = gpu_check_graphs.rows_of(len(compiled) > 1, copies, times)
        print(f"\nGraphs: copies {copies:.0f} GB/s")
        print_table(header, rows)
        result["mlp"], rows, header = gpu_check_mlp.rows_of(len(compiled) > 1, times)
        print("\nHidden layers, and rows routed to one head each")
        print_table(header, rows)
    save(args.json, result)


if __name__ == "__main__":
    main()
