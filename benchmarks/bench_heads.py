"""All task heads at once, against what people write today: forward, and forward with backward.

    python benchmarks/bench_heads.py [--dtype float32] [--threads 2] [--only wide] [--no-compile] [--json FILE]

Every shape is first checked against float64. Peers:

- ``list``: a ``ModuleList`` of ``Linear``, one call per task;
- ``wide``: one ``Linear`` of all classes, and ``split``;
- ``baddbmm``: one batched product (tasks of equal width only);
- ``list+c``, ``wide+c``: the first two under ``torch.compile``.

``backward`` starts from a gradient for each task's output, and computes those of x, weights and biases.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import matrix_rate, print_table, save, settings, time_side_by_side
from torch import Tensor, nn

import torch_mtl_pyg as mtl

# Name, rows, embedding, classes of each task.
SHAPES: list[tuple[str, int, int, list[int]]] = [
    ("cora", 2708, 128, [7] * 3),
    ("node100k", 100_000, 128, [16] * 8),
    ("tox21", 512, 256, [2] * 12),
    ("toxcast", 1024, 256, [2] * 617),
    ("wide", 20_000, 256, [64] * 16),
    ("pcba", 8192, 300, [2] * 128),
    ("single-12", 4096, 128, [1] * 12),
    ("single-128", 8192, 256, [1] * 128),
    ("ragged-9", 10_000, 128, [1, 7, 3, 19, 2, 40, 1, 5, 11]),
    ("ragged-60", 4096, 256, [1 + i * 7 % 13 for i in range(60)]),
]


class ModuleListHeads(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(in_channels, width) for width in widths])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


class WideHeads(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths
        self.linear = nn.Linear(in_channels, sum(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.linear(x).split(self.widths, dim=1))


class BatchedHeads(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(widths), in_channels, widths[0]))
        self.bias = nn.Parameter(torch.empty(len(widths), 1, widths[0]))

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(torch.baddbmm(self.bias, x.expand(self.weight.shape[0], *x.shape), self.weight).unbind(0))


class OurHeads(nn.Module):
    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        self.heads = mtl.MultiTaskHeads(in_channels, {f"task{i}": width for i, width in enumerate(widths)})

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.heads(x).values())


def models(in_channels: int, widths: list[int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The peers and ours, all with the same weights."""
    peers: dict[str, nn.Module] = {"list": ModuleListHeads(in_channels, widths), "wide": WideHeads(in_channels, widths)}
    if len(set(widths)) == 1:
        peers["baddbmm"] = BatchedHeads(in_channels, widths)
    peers["ours"] = OurHeads(in_channels, widths)
    weight = torch.randn(sum(widths), in_channels) / in_channels**0.5
    bias = torch.randn(sum(widths))
    with torch.no_grad():
        for model in peers.values():
            model.to(dtype)
        for linear, w, b in zip(peers["list"].heads, weight.split(widths), bias.split(widths), strict=True):
            linear.weight.copy_(w)
            linear.bias.copy_(b)
        peers["wide"].linear.weight.copy_(weight)
        peers["wide"].linear.bias.copy_(bias)
        peers["ours"].heads.weight.copy_(weight)
        peers["ours"].heads.bias.copy_(bias)
        if "baddbmm" in peers:
            peers["baddbmm"].weight.copy_(torch.stack(weight.split(widths)).transpose(1, 2))
            peers["baddbmm"].bias.copy_(torch.stack(bias.split(widths)).unsqueeze(1))
    return peers


def check(peers: dict[str, nn.Module], x: Tensor, grads: list[Tensor]) -> None:
    """All agree with float64, outputs and gradient of x."""
    wide = peers["wide"].linear
    exact = (x.detach().double() @ wide.weight.double().t() + wide.bias.double()).detach()
    exact_dx = torch.cat(grads, 1).double() @ wide.weight.detach().double()
    tolerance = 1e-5 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    for name, model in peers.items():
        out = model(x)
        (dx,) = torch.autograd.grad(out, x, grads)
        for got, expected in ((torch.cat(out, 1).detach(), exact), (dx, exact_dx)):
            error = float((got.double() - expected).norm() / expected.norm())
            if not error <= tolerance:
                raise SystemExit(f"{name}: wrong by {error:.3g} (relative), allowed {tolerance:.3g}")


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def step(model: nn.Module, x: Tensor, grads: list[Tensor]) -> Callable[[], object]:
    def run() -> None:
        x.grad = None
        model.zero_grad()
        torch.autograd.backward(model(x), grads)

    return run


def bench(shape: tuple[str, int, int, list[int]], dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    """Times one shape."""
    name, n, d, widths = shape
    torch.manual_seed(0)
    x = torch.randn(n, d).to(dtype).requires_grad_()
    grads = [torch.randn(n, width).to(dtype) for width in widths]
    peers = models(d, widths, dtype)
    check(peers, x, grads)
    rate = matrix_rate(dtype)
    if compiled:
        torch._dynamo.reset()
        for peer in ("list", "wide"):
            # 617 separate products take minutes to compile, and each call of them is slow.
            if peer == "wide" or len(widths) <= 64:
                peers[f"{peer}+c"] = torch.compile(peers[peer])
    result: dict[str, Any] = {"shape": name, "n": n, "d": d, "widths": widths, "matrix_rate": rate, "ms": {}}
    flops = 2 * n * d * sum(widths)
    for what, products, make in (
        ("forward", 1, lambda m: forward(m, x)),
        ("forward+backward", 3, lambda m: step(m, x, grads)),
    ):
        ms = time_side_by_side({peer: make(model) for peer, model in peers.items()})
        others = {peer: t for peer, t in ms.items() if peer != "ours"}
        best = min(others, key=others.__getitem__)
        result["ms"][what] = ms
        result[what] = {
            "best": best,
            "ratio_to_best": others[best] / ms["ours"],
            "ratio_to_list": ms["list"] / ms["ours"],
            "fraction_of_matrix_rate": products * flops / ms["ours"] / 1e6 / rate,
        }
    return result


def main() -> None:
    """Runs the shapes and prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", action="append", help="a shape's name; may be repeated")
    p.add_argument("--no-compile", action="store_true", help="leave the peers under torch.compile out")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    warnings.simplefilter("ignore")  # torch.compile's own
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    print(
        f"{head['machine']}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, {args.dtype}"
    )
    print("ms; x best: time of the best peer over ours; x list: time of the ModuleList over ours.\n")
    results = []
    rows = []
    names = ["list", "list+c", "wide", "wide+c", "baddbmm", "ours"]
    for shape in SHAPES:
        if args.only and shape[0] not in args.only:
            continue
        result = bench(shape, getattr(torch, args.dtype), not args.no_compile)
        results.append(result)
        widths = result["widths"]
        size = f"{widths[0]}" if len(set(widths)) == 1 else f"{min(widths)}-{max(widths)}"
        for what, ms in result["ms"].items():
            cells = [f"{ms[peer]:.3f}" if peer in ms else "-" for peer in names]
            r = result[what]
            rows.append(
                [
                    f"{shape[0]} {shape[1]}x{shape[2]}, {len(widths)}x{size}",
                    "fwd" if what == "forward" else "fwd+bwd",
                    *cells,
                    f"{r['ratio_to_best']:.2f} ({r['best']})",
                    f"{r['ratio_to_list']:.2f}",
                    f"{r['fraction_of_matrix_rate']:.2f}",
                    f"{result['matrix_rate']:.0f}",
                ]
            )
    print_table(["shape", "", *names, "x best", "x list", "of matrix rate", "GFLOP/s"], rows)
    for what in ("forward", "forward+backward"):
        ratios = [r[what]["ratio_to_best"] for r in results]
        print(f"\n{what}: {min(ratios):.2f} to {max(ratios):.2f} times the best peer's speed, "
              f"median {statistics.median(ratios):.2f}")  # fmt: skip
    save(args.json, {"settings": head, "dtype": args.dtype, "results": results})


if __name__ == "__main__":
    main()
