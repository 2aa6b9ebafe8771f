"""The CUDA kernels under the tests of the ops, emulated on tensors of the CPU.

Left out: what runs no kernel of these ops (the reference, compilers), determinism over threads of the CPU, and the
memory of a step whose logits do not fit a block, which keeps them here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import require_fused

from torch_mtl_pyg import _build

TESTS = Path(__file__).parent
NAMES = (
    *("copy_rate", "scale_gradients", "multi_head_linear", "multi_head_loss", "heads_loss"),
    *("grouped_linear", "multi_head_mlp", "multi_head_mlp_loss", "routed", "dropout", "mlp_direct_calls", "mlp_edges"),
    *("aggregate", "aggregate_kernels", "conv", "conv_edges"),
)
OPS = [str(TESTS / f"test_{name}.py") for name in NAMES]
# The instruction set is that of other kernels: one is enough.
NOT = (
    *("avx2", "avx512", "reference", "inductor", "compile", "2_31", "bitwise", "peak_memory", "second_order"),
    "for_the_cpu",
)
EVERYTHING = " and ".join(f"not {name}" for name in NOT)
# Values of every op, for the sanitizers.
OF_VALUES = (
    *("test_values", "test_layouts", "any_shape", "any_tasks", "any_heads", "any_losses", "activations_and_routes"),
    *("linear_heads", "wide_layers", "one_task_and_many"),
    *("dense_products", "projected", "every_width", "hubs", "maximum", "nan_and", "out_of_bounds", "summed_at_a"),
)
# Tiles of few and many columns have programs of their own there (test_cuda_emulation.py).
VALUES = f"({' or '.join(OF_VALUES)}) and not few_and_many and {EVERYTHING}"


ORDERS = ("0", "1", "7")  # forward, backward, shuffled


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All at once: a run keeps one core busy at most times."""
    require_fused()
    started = {}
    for order in ORDERS:
        environment = {**os.environ, "TORCH_MTL_PYG_EMULATE": "cuda", "TORCH_MTL_PYG_EMULATE_ORDER": order}
        environment["OMP_NUM_THREADS"] = "1"  # PyTorch's own threads would wait for those of the other runs
        if order == "7":
            environment["TORCH_MTL_PYG_EMULATE_CHUNK"] = "65536"  # few rows make many chunks
        started[order] = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", EVERYTHING, *OPS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield started
    for run in started.values():
        run.kill()


@pytest.mark.parametrize("order", ORDERS)
def test_emulated_kernels_pass_the_tests_of_the_ops(runs: dict[str, subprocess.Popen[str]], order: str) -> None:
    out, _ = runs[order].communicate()
    assert runs[order].returncode == 0, out[-4000:]
    assert " passed" in out
    assert " skipped" not in out


def test_values_under_sanitizers() -> None:
    """With AddressSanitizer and UndefinedBehaviorSanitizer; kernels in own programs: test_cuda_emulation.py."""
    if not os.environ.get("MTL_TEST_SANITIZED"):
        pytest.skip("takes minutes: make test-sanitized")
    require_fused()
    compiler = _build.find_compiler().command
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):  # without the second one the first exception ends the process
        command = [*compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", VALUES, *OPS[half::2]],
            env={
                **os.environ,
                "TORCH_MTL_PYG_EMULATE": "cuda",
                "OMP_NUM_THREADS": "1",
                "CXX": shlex.join([*compiler, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]),
                "CXXFLAGS": "-O1",
                "ASAN_OPTIONS": "detect_leaks=0",  # of Python there are many
                "LD_PRELOAD": " ".join(libraries),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in range(2)
    ]
    for run in halves:
        out, _ = run.communicate()
        assert run.returncode == 0, out[-6000:]
        assert " passed" in out


def test_the_check_for_a_gpu_on_emulated_kernels() -> None:
    require_fused()
    program = [sys.executable, str(TESTS.parent / "benchmarks" / "gpu_check.py")]
    done = subprocess.run([*program, "--emulated"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "136 checks passed." in done.stdout
    if not torch.cuda.is_available():
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode != 0 and "torch sees no GPU, so nothing was run" in done.stderr
