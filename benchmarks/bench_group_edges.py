"""Grouping the edges of a graph by one end, against PyTorch's and PyG's sorts.

    python benchmarks/bench_group_edges.py [--threads 1 2] [--json FILE]

- ``sort``: ``torch.sort(key, stable=True)`` alone, without ``ptr`` and ``index``;
- ``index_sort``: PyG's, alone too;
- ``reference``: the whole result in plain PyTorch;
- ``copy``: the limit, a copy that reads and writes the bytes of ``key`` and ``other``, and of ``index``, ``perm`` and
  ``ptr``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import keep_freed_memory, print_table, save, settings, time_side_by_side
from torch_geometric.utils import index_sort

from torch_mtl_pyg.ops import group_edges, reference_graph

# Nodes, edges, how the keys are spread.
GRAPHS = [
    (2_708, 10_556, "uniform"),
    (50_000, 500_000, "uniform"),
    (200_000, 3_000_000, "uniform"),
    (200_000, 3_000_000, "power law"),
    (200_000, 3_000_000, "one hub"),
    (200_000, 3_000_000, "sorted"),
]


def keys(n: int, e: int, spread: str) -> torch.Tensor:
    """Target nodes of the edges."""
    uniform = torch.randint(n, (e,))
    if spread == "power law":  # the k-th node has a share of 1 / k
        return torch.randperm(n)[(n ** torch.rand(e, dtype=torch.float64)).long().clamp(max=n - 1)]
    if spread == "one hub":
        return torch.where(torch.rand(e) < 0.9, 7, uniform)
    return uniform.sort()[0] if spread == "sorted" else uniform


def bench(n: int, e: int, spread: str) -> dict[str, float]:
    """Times one graph, and checks the result first."""
    torch.manual_seed(0)
    key, other = keys(n, e, spread), torch.randint(n, (e,))
    expected = reference_graph.group_edges(key, other, n)
    if not all(map(torch.equal, group_edges(key, other, n, n), expected)):
        raise SystemExit(f"{n} nodes, {e} edges, {spread}: wrong result")
    bytes_read, bytes_written = torch.zeros(2 * e, dtype=torch.int64), torch.zeros(2 * e + n, dtype=torch.int64)

    def copy() -> None:
        bytes_written[: 2 * e].copy_(bytes_read)
        bytes_written[2 * e :].zero_()

    return time_side_by_side(
        {
            "ours": lambda: group_edges(key, other, n, n),
            "sort": lambda: torch.sort(key, stable=True),
            "index_sort": lambda: index_sort(key, n),
            "reference": lambda: reference_graph.group_edges(key, other, n),
            "copy": copy,
        },
        rounds=7,
    )


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description="Times the grouping of edges.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    print(settings())
    rows, results = [], []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for n, e, spread in GRAPHS:
            times = bench(n, e, spread)
            results.append({"nodes": n, "edges": e, "spread": spread, "threads": threads, "ms": times})
            best = min(times[name] for name in ("sort", "index_sort", "reference"))
            rows.append(
                [f"{n} nodes, {e} edges, {spread}", str(threads)]
                + [f"{times[name]:.3f}" for name in ("ours", "sort", "index_sort", "reference", "copy")]
                + [f"{best / times['ours']:.1f}"]
            )
    print_table(["graph (ms)", "threads", "ours", "sort", "index_sort", "reference", "copy", "best peer / ours"], rows)
    save(arguments.json, {**settings(), "results": results})


if __name__ == "__main__":
    main()
