"""The emulator of CUDA kernels: what it computes, and what it has to notice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from torch_mtl_pyg import _build

ROOT = Path(__file__).parents[1]
ORDERS = ("0", "1", "7")  # forward, backward, shuffled
GOOD = (
    "mma_bfloat16",
    "mma_float16",
    "mma_tf32",
    "ldmatrix",
    "ldmatrix_trans",
    "cp_async",
    "sums",
    "turned",
    "pairs",
    "votes",
    "conversions",
    "limits",
)
KERNELS = (
    *(f"products_{kind}" for kind in ("float32", "float64", "tf32", "bfloat16", "float16")),
    *(f"fused_{kind}" for kind in ("float32", "tf32", "bfloat16", "float16")),
    *("warps_bfloat16", "warps_float16", "logits_float32", "logits_float64", "logits_bfloat16"),
)
GRAPHS = tuple(f"graphs_{kind}" for kind in ("float32", "float64", "bfloat16", "float16", "refused"))
LACKING = (
    *("no_wait", "no_barrier_behind_a_wait", "no_barrier", "no_warp_barrier", "no_meeting", "no_memory_there"),
    *("no_barrier_of_a_pair", "no_barrier_behind_pairs", "too_few_at_a_barrier", "a_barrier_of_two_sizes"),
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def compiled(name: str, folder: Path, *flags: str) -> Path:
    """A program of tests/cuda_programs for the emulator."""
    try:
        compiler = _build.find_compiler()
    except _build.BuildError as error:
        pytest.skip(f"no C++ compiler: {error}")
    program = folder / name
    command = [
        *compiler.command,
        "-std=c++17",
        "-O1",
        *_build.CUDA_EMULATION_FLAGS,
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'csrc'}",
    ]
    done = subprocess.run(
        [*command, *flags, str(ROOT / "tests" / "cuda_programs" / f"{name}.cu"), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(program: Path, name: str, order: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_MTL_PYG_EMULATE_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program), name], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def primitives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("primitives", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("primitives", tmp_path_factory.mktemp("sanitized"), *SANITIZE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", GOOD)
def test_primitives(primitives: Path, name: str, order: str) -> None:
    done = run(primitives, name, order)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", GOOD)
def test_primitives_under_sanitizers(sanitized: Path, name: str) -> None:
    done = run(sanitized, name, "7")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_noticed(primitives: Path, sanitized: Path, name: str) -> None:
    """A barrier, a wait, a meeting of all, memory: in one order at least, or by the sanitizer."""
    program = sanitized if name == "no_memory_there" else primitives
    assert any(run(program, name, order).returncode != 0 for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_that_some_never_reach_names_the_block(primitives: Path, order: str) -> None:
    done = run(primitives, "no_meeting", order)
    assert "Emulated CUDA kernel: " in done.stderr and "block (0, 0, 0)" in done.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("kernels", tmp_path_factory.mktemp("kernels"), *SANITIZE)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_under_sanitizers(kernels: Path, name: str) -> None:
    """On buffers without a byte to spare, against plain loops in float64."""
    for order in ORDERS:
        done = run(kernels, name, order)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("graphs", tmp_path_factory.mktemp("graphs"), *SANITIZE)


@pytest.mark.parametrize("name", GRAPHS)
def test_kernels_over_edges_under_sanitizers(graphs: Path, name: str) -> None:
    """The same, with equal bits in every order; and graphs that cannot be, through which nothing is read."""
    results = [run(graphs, name, order) for order in ORDERS]
    for done in results:
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert len({done.stdout for done in results}) == 1
