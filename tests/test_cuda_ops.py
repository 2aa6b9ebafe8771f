"""The tests of the ops, with the CUDA kernels in place of the CPU's: emulated, on CPU tensors.

The sources are the same. What is not tested here is the code that nvcc makes of them, and the GPU's own arithmetic.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_fused

TESTS = Path(__file__).parent
OPS = sorted(path.stem for path in (TESTS.parent / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize("op", OPS)
def test_emulated(op: str) -> None:
    require_fused()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", str(TESTS / f"test_{op}.py")],
        env={**os.environ, "TORCH_MTL_PYG_EMULATE": "cuda"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
