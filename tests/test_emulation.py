"""The AVX-512 kernels, run where the CPU has none: their wide vectors are compiled to AVX2.

The sources are the same; the tile sizes, the edges and the packing of bfloat16 pairs are those of AVX-512. What is not
tested here is the code the compiler makes of them for AVX-512.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ISAS, require_fused

OPS = [
    str(Path(__file__).parent / f"test_{name}.py")
    for name in (
        "multi_head_linear",
        "multi_head_loss",
        "multi_head_mlp",
        "multi_head_mlp_loss",
        "dropout",
        "aggregate_kernels",
    )
]


def test_the_instruction_sets_are_those_of_the_cpu() -> None:
    """Against the system's own list: a wrong detection would skip kernels instead of testing them."""
    require_fused()
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        pytest.skip("the system lists no features of an x86-64 CPU")
    flags = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split())
    needs = {
        "baseline": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    }
    expected = [isa for isa in ISAS if needs[isa] <= flags]
    assert torch.ops.torch_mtl_pyg.isas_available().split(",") == expected


def test_wide_kernels_on_a_narrow_cpu() -> None:
    require_fused()
    available = torch.ops.torch_mtl_pyg.isas_available().split(",")
    if "avx2" not in available:
        pytest.skip("the emulation needs AVX2")
    if "avx512_bf16" in available:
        pytest.skip("this CPU has AVX-512 with bfloat16: the kernels are tested as they are")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "avx512", *OPS],
        env={**os.environ, "TORCH_MTL_PYG_EMULATE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
