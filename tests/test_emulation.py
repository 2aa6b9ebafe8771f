"""The AVX-512 kernels, run where the CPU has none: their wide vectors are compiled to AVX2.

The sources are the same; the tile sizes, the edges and the packing of bfloat16 pairs are those of AVX-512. What is not
tested here is the code the compiler makes of them for AVX-512.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_fused

OPS = Path(__file__).parent / "test_multi_head_linear.py"


def test_wide_kernels_on_a_narrow_cpu() -> None:
    require_fused()
    available = torch.ops.torch_mtl_pyg.isas_available().split(",")
    if "avx2" not in available:
        pytest.skip("the emulation needs AVX2")
    if "avx512_bf16" in available:
        pytest.skip("this CPU has AVX-512 with bfloat16: the kernels are tested as they are")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "avx512", str(OPS)],
        env={**os.environ, "TORCH_MTL_PYG_EMULATE": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
