"""A convolution to several tasks, against one convolution per task and against one wide convolution.

    python benchmarks/bench_conv.py [--threads 2] [--only hub] [--no-compile] [--fresh] [--quick] [--json FILE]

Three sets of tables, all on the same random graphs; everything is first checked against float64.

**Layers**: 128 features to 8 tasks of 16 outputs, mean of the neighbours, with root and bias; forward without
gradients, and a step: forward and the gradients of x and all parameters, from a random gradient of each task's output.
Peers:

- ``convs``: a ``ModuleList`` of one layer per task;
- ``wide``: one layer of all outputs, and ``split``; ``wide+c``: the same under ``torch.compile``.

Each gets the graph in three ways: ``COO``, a plain ``edge_index`` in random order; ``EdgeIndex``, sorted by target, its
caches filled; ``CSR``, the transposed ``torch.sparse`` matrix. The peers are ``SAGEConv``, and for an ``EdgeIndex``
``GraphConv(aggr="mean")``: the same maths, and the one of the two that has a fused path for it in PyG 2.8. Where
torch_scatter is installed, PyG uses it by itself; the header says so. ``x best`` is the best peer's time over ours, of
peers with the same input: COO, or either of the sorted ones.

**Aggregation alone**: ``ops.aggregate`` on a kept graph, against PyTorch's and torch_scatter's, without gradients. The
GB/s are those of one row of features read per edge, and the output written; where rows are read again while they are in
a cache, they exceed what memory gives. ``of copy`` is their share of the rate at which a large tensor is copied, timed
in the same turns.

**Grouping**: what bringing the edges in the order of their targets costs, which COO pays in every forward, and in every
step a second time, by source.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_geometric
from common import keep_freed_memory, print_table, save, settings, time_side_by_side
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GraphConv, SAGEConv

import torch_mtl_pyg as mtl
from torch_mtl_pyg import ops
from torch_mtl_pyg.adjacency import Adjacency
from torch_mtl_pyg.ops import reference_graph

try:
    import torch_scatter
except ImportError:
    torch_scatter = None

# Name, nodes, edges, exponent of Zipf's law of the targets (0: all alike).
CASES = [
    ("cora", 2708, 10_800, 0.0),
    ("50k", 50_000, 500_000, 0.0),
    ("200k", 200_000, 3_000_000, 0.0),
    ("hub", 100_000, 1_000_000, 1.0),
]
QUICK = [("cora", 60, 240, 0.0), ("hub", 100, 1000, 1.0)]
D, TASKS, CLASSES = 128, 8, 16
WIDTHS = (16, 128, 512)
# Messages [E, D] of torch_scatter that are not worth their memory.
MOST_BYTES = 3 << 30


def random_graph(n: int, edges: int, exponent: float) -> Tensor:
    """``[2, E]``, in random order; the probability of a target falls with a power of its rank."""
    source = torch.randint(n, (edges,))
    if not exponent:
        return torch.stack((source, torch.randint(n, (edges,))))
    share = torch.arange(1, n + 1, dtype=torch.float64).pow(-exponent).cumsum(0)
    rank = torch.searchsorted(share, torch.rand(edges, dtype=torch.float64) * share[-1])
    return torch.stack((source, torch.randperm(n)[rank]))


def formats(edge_index: Tensor, n: int) -> dict[str, Any]:
    """The graph as layers take it."""
    kept = EdgeIndex(edge_index, sparse_size=(n, n)).sort_by("col").values.fill_cache_()
    (ptr, index), _ = kept.get_csc()
    csr = torch.sparse_csr_tensor(ptr, index, torch.ones(index.shape[0]), size=(n, n))
    return {"COO": edge_index, "EdgeIndex": kept, "CSR": csr}


# ---- Layers.


class Convs(nn.Module):
    def __init__(self, kind: type[nn.Module], weights: Sequence[Tensor]) -> None:
        super().__init__()
        parts = zip(*(t.split(CLASSES) for t in weights), strict=True)
        self.convs = nn.ModuleList([pyg_layer(kind, part) for part in parts])

    def forward(self, x: Tensor, graph: Any) -> list[Tensor]:
        return [conv(x, graph) for conv in self.convs]


class Wide(nn.Module):
    def __init__(self, kind: type[nn.Module], weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.conv = pyg_layer(kind, weights)

    def forward(self, x: Tensor, graph: Any) -> list[Tensor]:
        return list(self.conv(x, graph).split(CLASSES, dim=1))


class Ours(nn.Module):
    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.conv = mtl.MultiTaskConv(D, {f"t{i}": CLASSES for i in range(TASKS)}, aggr="mean")
        fill((self.conv.weight, self.conv.weight_root, self.conv.bias), weights)

    def forward(self, x: Tensor, graph: Any) -> list[Tensor]:
        return list(self.conv(x, graph).values())


def pyg_layer(kind: type[nn.Module], weights: Sequence[Tensor]) -> nn.Module:
    layer: Any = kind(D, weights[0].shape[0], aggr="mean")
    neighbours, root = (layer.lin_l, layer.lin_r) if kind is SAGEConv else (layer.lin_rel, layer.lin_root)
    fill((neighbours.weight, root.weight, neighbours.bias), weights)
    return layer


def fill(parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Weight, root weight, bias of each layer, in this order, layer by layer."""
    named = dict(model.named_parameters())
    ends = ("lin_l.weight", "lin_rel.weight", "conv.weight"), ("lin_r.weight", "root.weight", "_root"), ("bias",)
    return [p for kind in ends for name, p in named.items() if name.endswith(kind)]


def step(model: nn.Module, x: Tensor, graph: Any, grads: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    inputs = [x, *weights_of(model)]
    return lambda: torch.autograd.grad(model(x, graph), inputs, grads)


def forward(model: nn.Module, x: Tensor, graph: Any) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            out: list[Tensor] = model(x, graph)
        return out

    return run


def exact_step(x: Tensor, edge_index: Tensor, weights: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of x, weight, root weight and bias in float64, written out."""
    n = x.shape[0]
    x, grad, weight, root, bias = (t.detach().double() for t in (x, grad, *weights))
    mean = mean_matrix(edge_index, n)
    h = mean @ x
    back = torch.sparse_coo_tensor(mean.indices().flip(0), mean.values(), (n, n)).coalesce() @ (grad @ weight)
    out = h @ weight.t() + x @ root.t() + bias
    return [out, back + grad @ root, grad.t() @ h, grad.t() @ x, grad.sum(0)]


def mean_matrix(edge_index: Tensor, n: int) -> Tensor:
    """``[N, N]`` in float64: row i takes the mean of the neighbours of i."""
    share = 1 / torch.bincount(edge_index[1], minlength=n).double()[edge_index[1]]
    return torch.sparse_coo_tensor(edge_index.flip(0), share, (n, n)).coalesce()


def check(what: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = float((a.double() - b).norm() / b.norm())
        if not error <= 2e-5:
            raise SystemExit(f"{what}, result {i}: wrong by {error:.3g} (relative), allowed 2e-5")


def bench_layers(
    case: tuple[str, int, int, float], compiled: bool, timing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Times the layers on one graph; one result for forward and step of each input."""
    name, n, edges, exponent = case
    torch.manual_seed(0)
    edge_index = random_graph(n, edges, exponent)
    graphs = formats(edge_index, n)
    x = torch.randn(n, D).requires_grad_()
    k = TASKS * CLASSES
    weights = [torch.randn(k, D) / D**0.5, torch.randn(k, D) / D**0.5, torch.randn(k)]
    grads = [torch.randn(n, CLASSES) for _ in range(TASKS)]
    exact = exact_step(x, edge_index, weights, torch.cat(grads, dim=1))
    functions: dict[str, dict[tuple[str, str], Callable[[], Any]]] = {"forward": {}, "step": {}}
    torch._dynamo.reset()
    for given, graph in graphs.items():
        kind = GraphConv if given == "EdgeIndex" else SAGEConv
        peers: dict[str, Any] = {"convs": Convs(kind, weights), "wide": Wide(kind, weights), "ours": Ours(weights)}
        if compiled and given != "CSR":  # which has no fake tensors yet
            peers["wide+c"] = torch.compile(Wide(kind, weights))
        for peer, model in peers.items():
            run, train = forward(model, x, graph), step(model, x, graph, grads)
            dx, *others = train()
            layers = len(others) // 3
            packed = [torch.cat(others[i : i + layers]) for i in range(0, len(others), layers)]
            check(f"{name}, {given}, {peer}", [torch.cat(run(), dim=1), dx, *packed], exact)
            functions["forward"][given, peer] = run
            functions["step"][given, peer] = train
    del exact
    results = []
    for what, own in functions.items():
        ms = time_side_by_side(own, **timing)  # type: ignore[arg-type]
        for given in graphs:
            alike = [key for key in ms if (key[0] == "COO") == (given == "COO") and key[1] != "ours"]
            best = min(alike, key=ms.__getitem__)
            ours = ms[given, "ours"]
            results.append(
                {
                    "case": name,
                    "n": n,
                    "edges": edges,
                    "largest_degree": int(torch.bincount(edge_index[1]).max()),
                    "what": what,
                    "input": given,
                    "ms": {peer: t for (where, peer), t in ms.items() if where == given},
                    "best": list(best),
                    "ratio_to_best": ms[best] / ours,
                    "ratio_to_convs": ms[given, "convs"] / ours,
                }
            )
    return results


# ---- Aggregation alone.


def bench_aggregation(
    case: tuple[str, int, int, float], width: int, copied: int, timing: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Times sum and mean on one graph, with its groupings kept."""
    name, n, edges, exponent = case
    torch.manual_seed(0)
    edge_index = random_graph(n, edges, exponent)
    x = torch.randn(n, width)
    adjacency = Adjacency.of(edge_index, n)
    ptr, index, _ = adjacency.by_target()
    csr = torch.sparse_csr_tensor(ptr, index, torch.ones(edges), size=(n, n))
    large = torch.randn(copied // 4)
    copy = torch.empty_like(large)
    mean = mean_matrix(edge_index, n) @ x.double()
    exact = {"mean": mean, "sum": mean * ptr.diff().unsqueeze(1)}
    results = []
    for reduce in ("mean", "sum"):
        functions: dict[str, Callable[[], Tensor]] = {
            "ours": lambda reduce=reduce: ops.aggregate(x, adjacency, reduce=reduce),
            "sparse.mm": lambda reduce=reduce: torch.sparse.mm(csr, x, reduce),
        }
        if reduce == "sum":
            functions["A @ x"] = lambda: csr @ x
        if torch_scatter is not None and edges * width * 4 <= MOST_BYTES:
            functions["segment_csr"] = lambda reduce=reduce: torch_scatter.segment_csr(x[index], ptr, reduce=reduce)
        for peer, function in functions.items():
            check(f"{name}, {width} features, {reduce}, {peer}", [function()], [exact[reduce]])
        ms = time_side_by_side({**functions, "copy": lambda: copy.copy_(large)}, **timing)  # type: ignore[arg-type]
        best = min((peer for peer in functions if peer != "ours"), key=ms.__getitem__)
        rate = (edges + n) * width * 4 / ms["ours"] / 1e6
        copy_rate = 2 * large.numel() * 4 / ms["copy"] / 1e6
        results.append(
            {
                "case": name,
                "features": width,
                "reduce": reduce,
                "ms": ms,
                "best": best,
                "ratio_to_best": ms[best] / ms["ours"],
                "gb_per_s": rate,
                "copy_gb_per_s": copy_rate,
                "of_copy": rate / copy_rate,
            }
        )
    return results


# ---- Grouping.


def bench_grouping(case: tuple[str, int, int, float], timing: Mapping[str, float]) -> dict[str, Any]:
    """Times the grouping of one graph by target."""
    name, n, edges, exponent = case
    torch.manual_seed(0)
    source, target = random_graph(n, edges, exponent)
    functions = {
        "ours": lambda: ops.group_edges(target, source, n, n),
        "sort": lambda: torch.sort(target, stable=True),
        # With what a sort leaves to do: pointers, and the other end in the new order.
        "sort and rest": lambda: reference_graph.group_edges(target, source, n),
    }
    for a, b in zip(functions["ours"](), functions["sort and rest"](), strict=True):
        if not torch.equal(a, b):
            raise SystemExit(f"{name}: the groupings differ")
    ms = time_side_by_side(functions, **timing)  # type: ignore[arg-type]
    return {"case": name, "ms": ms, "ns_per_edge": ms["ours"] / edges * 1e6}


# ---- Tables.


def print_layers(results: list[dict[str, Any]], what: str) -> None:
    print(f"\n{what}, ms")
    names = ["convs", "wide", "wide+c", "ours"]
    rows = [
        [
            f"{r['case']} {r['n']}/{r['edges']}",
            str(r["largest_degree"]),
            r["input"],
            *(f"{r['ms'][peer]:.3f}" if peer in r["ms"] else "-" for peer in names),
            f"{r['ratio_to_best']:.2f} ({' '.join(reversed(r['best']))})",
            f"{r['ratio_to_convs']:.1f}",
        ]
        for r in results
        if r["what"] == what
    ]
    print_table(["nodes/edges", "largest degree", "graph", *names, "x best", "x convs"], rows)


def print_aggregation(results: list[dict[str, Any]]) -> None:
    print("\nAggregation alone, ms")
    names = ["sparse.mm", "A @ x", "segment_csr", "ours"]
    rows = [
        [
            r["case"],
            str(r["features"]),
            r["reduce"],
            *(f"{r['ms'][peer]:.3f}" if peer in r["ms"] else "-" for peer in names),
            f"{r['ratio_to_best']:.2f} ({r['best']})",
            f"{r['gb_per_s']:.1f}",
            f"{r['copy_gb_per_s']:.1f}",
            f"{r['of_copy']:.2f}",
        ]
        for r in results
    ]
    print_table(["graph", "features", "", *names, "x best", "GB/s", "copy GB/s", "of copy"], rows)


def print_grouping(results: list[dict[str, Any]]) -> None:
    print("\nGrouping edges by target, ms")
    names = ["sort", "sort and rest", "ours"]
    rows = [
        [
            r["case"],
            *(f"{r['ms'][peer]:.3f}" for peer in names),
            f"{r['ms']['sort'] / r['ms']['ours']:.1f}",
            f"{r['ns_per_edge']:.1f}",
        ]
        for r in results
    ]
    print_table(["graph", *names, "x sort", "ns per edge"], rows)


def main() -> None:
    """Runs the cases and prints the tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--only", action="append", help="a case's name; may be repeated")
    p.add_argument("--no-compile", action="store_true", help="leave the peers under torch.compile out")
    p.add_argument("--fresh", action="store_true", help="let the allocator give large blocks back at every step")
    p.add_argument("--quick", action="store_true", help="tiny graphs, hardly timed: does it run, is it right?")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args()
    if not args.fresh:
        keep_freed_memory()
    warnings.simplefilter("ignore")  # torch.compile's own, and that CSR is new
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # torch.compile cannot see into an EdgeIndex, and says so
    torch.set_num_threads(args.threads)
    mtl.use_backend("fused")
    head = settings()
    scatter = None if torch_scatter is None else torch_scatter.__version__
    print(
        f"{head['machine']}, {head['threads']} threads, {head['isa']}, torch {head['versions']['torch']}, "
        f"PyG {torch_geometric.__version__}, torch_scatter {scatter or 'not installed'}, float32"
    )
    print("x best, x convs: time of the best peer, of one layer per task, over ours.")
    timing: dict[str, float] = {"rounds": 5, "most": 4.0}
    if args.quick:
        timing = {"rounds": 1, "seconds": 0.0, "warm_up": 0.0}
    copied = 1 << 20 if args.quick else 1 << 28
    layers, aggregation, grouping = [], [], []
    for case in QUICK if args.quick else CASES:
        if args.only and case[0] not in args.only:
            continue
        layers += bench_layers(case, not args.no_compile, timing)
        for width in WIDTHS:
            aggregation += bench_aggregation(case, width, copied, timing)
        grouping.append(bench_grouping(case, timing))
        print(f"  {case[0]} done", file=sys.stderr, flush=True)
    for what in ("forward", "step"):
        print_layers(layers, what)
    print_aggregation(aggregation)
    print_grouping(grouping)
    head["versions"]["torch_scatter"] = scatter
    results = {"layers": layers, "aggregation": aggregation, "grouping": grouping}
    save(args.json, {"settings": head, "fresh": args.fresh, "results": results})


if __name__ == "__main__":
    main()
