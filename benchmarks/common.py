"""What the benchmarks share: timing side by side, the machine's limits, a table, a JSON file."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_geometric

import torch_mtl_pyg as mtl


def keep_freed_memory() -> None:
    """Starts this program anew with a glibc that keeps large blocks when they are freed, unless it does already.

    Otherwise every large output is fresh memory from the system, whose pages cost more than the mathematics of some
    shapes, for every peer alike.
    """
    keep = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
    if any(os.environ.get(name) != value for name, value in keep.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})  # read when a process starts


def time_side_by_side(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    seconds: float = 0.02,
    warm_up: float = 0.25,
    most: float = math.inf,
) -> dict[str, float]:
    """Median milliseconds of each function.

    Every round times every function once, so that a change of the machine's speed meets all of them. One timing
    repeats a function for about ``seconds``. A function that would take more than ``most`` seconds is timed in every
    second or third round only.
    """
    repeats, every = {}, {}
    for name, function in functions.items():
        # For some time, since memory that the system hands out for the first time can be several times slower.
        begin = time.perf_counter()
        once = 0.0
        while once == 0.0 or time.perf_counter() - begin < warm_up:
            start = time.perf_counter()
            function()
            once = time.perf_counter() - start
        repeats[name] = max(1, int(seconds / max(once, 1e-6)))
        every[name] = max(1, min(3, math.ceil(rounds * max(once, seconds) / most)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i % every[name]:
                continue
            function = functions[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_rate(dtype: torch.dtype, n: int = 1536) -> float:
    """GFLOP/s of PyTorch's own product of two large square matrices: the machine's practical limit."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / time_side_by_side({"mm": lambda: a @ b}, rounds=5)["mm"] / 1e6


def copy_rate(size: int = 1 << 28) -> float:
    """GB/s, read and written, of copying a large tensor of ``size`` bytes: what memory gives."""
    large = torch.randn(size // 4)
    copy = torch.empty_like(large)
    return 2 * size / time_side_by_side({"copy": lambda: copy.copy_(large)}, rounds=5)["copy"] / 1e6


def multiply_add_rate(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """GFLOP/s of our register tile on data in the first-level cache: the multiply-adds that this machine has."""
    like = torch.empty(1, dtype=dtype)
    return statistics.median(torch.ops.torch_mtl_pyg.multiply_add_rate(like, seconds) for _ in range(3))


def peak_memory(function: Callable[[], object]) -> float | None:
    """MiB by which a call raises the memory of this process; None where the system does not tell.

    The call is made once before. Memory that was freed is given back first, so that it counts when it is used again.
    """

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    function()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = kilobytes("VmRSS")
        function()
        return max(0, kilobytes("VmHWM") - before) / 1024
    except (OSError, AttributeError, StopIteration):
        return None


def machine() -> str:
    """The processor's name, if the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "")
        features = [f for f in ("avx2", "avx512f", "avx512_bf16") if f" {f}" in flags]
        return f"{names[0]} ({', '.join(features)})" if names else platform.processor()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def settings() -> dict[str, Any]:
    """Machine, threads and versions."""
    info = mtl.backend_info()
    return {
        "machine": machine(),
        "threads": info.threads,
        "backend": info.backend,
        "isa": info.isa,
        "versions": {**info.versions, "torch_geometric": torch_geometric.__version__},
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first one to the left."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for row in table:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]))


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes the figures as JSON where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
        print(f"\nSaved {path}.")
