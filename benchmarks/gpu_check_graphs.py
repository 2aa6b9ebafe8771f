"""The part of gpu_check.py for convolutions: checks against float64, and times against PyG's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GraphConv, SAGEConv

import torch_mtl_pyg as mtl
from torch_mtl_pyg import ops
from torch_mtl_pyg.adjacency import Adjacency

Times = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]
Expect = Callable[[str, Tensor, Tensor, torch.dtype], None]

# Nodes, edges, columns, the share of the edges that go to one node.
CHECKS = ((1, 0, 8, 0.0), (300, 2000, 36, 0.0), (700, 4000, 130, 0.5))
# Nodes, edges.
SHAPES = ((50_000, 500_000), (200_000, 3_000_000))
D, TASKS, CLASSES = 128, 8, 16


def graph_of(n: int, edges: int, to_one: float, device: torch.device) -> Tensor:
    """``[2, E]`` in random order."""
    edge_index = torch.randint(n, (2, edges))
    edge_index[1, torch.rand(edges) < to_one] = 0
    return edge_index.to(device)


def check(device: torch.device, dtypes: tuple[torch.dtype, ...], expect: Expect) -> int:
    """Outputs and gradients of every aggregation and dtype; returns their number."""
    done = 0
    for n, edges, d, to_one in CHECKS:
        for aggr in ("mean", "sum", "max", "min"):
            for dtype in dtypes:
                torch.manual_seed(0)
                # Distinct as float64 and in 16 bits alike, so that the same neighbour is the largest.
                x = torch.randint(-64, 64, (n, d)).to(device, dtype) / 8
                x.requires_grad_()
                edge_index = graph_of(n, edges, to_one, device)
                conv = mtl.MultiTaskConv(d, {"a": 5, "b": 16, "c": 1}, aggr=aggr, return_packed=True).to(device, dtype)
                exact_conv, exact_x = copy.deepcopy(conv).double(), x.detach().double().requires_grad_()
                out = conv(x, edge_index)
                grad = torch.randn(out.shape, device=device).to(dtype)
                parameters = list(conv.parameters())
                got = torch.autograd.grad(out, (x, *parameters), grad)
                with mtl.use_backend("reference"):
                    exact = exact_conv(exact_x, edge_index)
                    wanted = torch.autograd.grad(exact, (exact_x, *exact_conv.parameters()), grad.double())
                what = f"convolution of {n} nodes, {edges} edges, {aggr}: "
                names = ["output", "dx", *(f"d{name}" for name, _ in conv.named_parameters())]
                for name, a, b in zip(names, (out, *got), (exact, *wanted), strict=True):
                    expect(what + name, a, b, dtype)
                if not torch.equal(conv(x, edge_index), out):
                    raise SystemExit(f"{what}not the same in a second run")
                done += 1
    return done


def bench(n: int, edges: int, dtype: torch.dtype, compiled: bool, times: Times) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward, of a step, and of the aggregation alone."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    device = torch.device("cuda")
    edge_index = graph_of(n, edges, 0.0, device)
    kept = EdgeIndex(edge_index, sparse_size=(n, n)).sort_by("col").values.fill_cache_()
    x = torch.randn(n, D, device=device, dtype=dtype, requires_grad=True)
    ours = mtl.MultiTaskConv(D, {f"t{i}": CLASSES for i in range(TASKS)}, aggr="mean", return_packed=True)
    layers: dict[str, Any] = {
        "ours": ours,
        "sage": SAGEConv(D, TASKS * CLASSES, aggr="mean"),
        "graph": GraphConv(D, TASKS * CLASSES, aggr="mean"),
    }
    layers = {name: layer.to(device, dtype) for name, layer in layers.items()}
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: layers["ours"](x, edge_index),
        "ours, kept": lambda: layers["ours"](x, kept),
        "sage": lambda: layers["sage"](x, edge_index),
    }
    if dtype == torch.float32:  # PyG's fused path multiplies with a matrix of float32, which cuSPARSE wants for x too
        runs["graph, kept"] = lambda: layers["graph"](x, kept)
    if compiled:
        fast = torch.compile(layers["sage"])
        runs["sage+c"] = lambda: fast(x, edge_index)
    grad = torch.randn(n, TASKS * CLASSES, device=device, dtype=dtype)
    parameters = {name: (x, *layers[name.split(",")[0].split("+")[0]].parameters()) for name in runs}

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(runs[name](), parameters[name], grad)

    def forward(name: str) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return runs[name]()

        return run

    adjacency = Adjacency.of(edge_index, n)
    ptr, index, _ = adjacency.by_target()
    csr = torch.sparse_csr_tensor(ptr, index, torch.ones(edges, device=device, dtype=dtype), size=(n, n))
    flat = x.detach()
    alone = {"ours": lambda: ops.aggregate(flat, adjacency, reduce="sum"), "csr @ x": lambda: csr @ flat}
    return {
        "forward": times({name: forward(name) for name in runs}),
        "step": times({name: step(name) for name in runs}),
        "aggregation": times(alone),
    }


def rows_of(compiled: bool, copies: float, times: Times) -> tuple[list[dict[str, Any]], list[list[str]], list[str]]:
    """Figures, and a table: the best peer with the same input over ours."""
    results: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    columns = ["ours", "sage", "sage+c", "ours, kept", "graph, kept", "csr @ x"]
    for dtype in (torch.float32, torch.bfloat16):
        for n, edges in SHAPES:
            for what, ms in bench(n, edges, dtype, compiled, times).items():
                plain = min(t for name, t in ms.items() if not name.startswith("ours"))
                best = plain / min(t for name, t in ms.items() if name.startswith("ours"))
                rate = (edges + n) * D * dtype.itemsize / ms["ours"] / 1e6 / copies if what == "aggregation" else 0.0
                results.append({"shape": (n, edges), "dtype": str(dtype), "what": what, "ms": ms, "of_copies": rate})
                cells = [f"{ms[c]:.3f}" if c in ms else "-" for c in columns]
                name = f"{what} {n}/{edges}, {str(dtype).removeprefix('torch.')}"
                rows.append([name, *cells, f"{best:.2f}", f"{rate:.2f}" if rate else "-"])
    return results, rows, ["convolution, ms", *columns, "best/ours", "of copies"]
