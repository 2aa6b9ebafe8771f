"""Fixtures: every backend and every instruction set a test can run on."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from extension_common import csrc  # noqa: F401 (a fixture of the tests of building and loading)
from torch_geometric.nn import Sequential

from torch_mtl_pyg import backend

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


# What tests of an extra are skipped without.
OF_EXTRAS = ("matplotlib", "ninja", "scipy", "sklearn", "torchjd", "torchmetrics", "tqdm")


def pytest_configure() -> None:
    """In CI no extra is optional, so that a lost package does not turn whole files into skips."""
    missing = [name for name in OF_EXTRAS if importlib.util.find_spec(name) is None]
    if os.environ.get("CI") and missing:
        raise pytest.UsageError(f"CI has to test every extra; not installed: {', '.join(missing)}")


def examples(count: int) -> int:
    """How many examples Hypothesis tries: a third in each of the three orders of emulated kernels."""
    return count // 3 if "TORCH_MTL_PYG_EMULATE_ORDER" in os.environ else count


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what PyG's Sequential does to its class: that of a later test could otherwise run the code of this one."""
    monkeypatch.setattr(Sequential, "forward", Sequential.forward)


@pytest.fixture(params=["reference", "fused"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on plain PyTorch and on the compiled library."""
    if request.param == "fused":
        require_fused()
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def fused() -> Iterator[None]:
    """Runs the test on the compiled library."""
    require_fused()
    with backend.use_backend("fused"):
        yield


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the compiled library, with each instruction set."""
    require_fused()
    available = torch.ops.torch_mtl_pyg.isas_available().split(",")
    if request.param not in available:
        emulated = "avx2" in available and request.param.startswith("avx512")
        elsewhere = "test_emulation.py runs its kernels on AVX2" if emulated else "its kernels are not tested here"
        pytest.skip(f"this CPU has no {request.param}; {elsewhere}")
    with backend.use_backend("fused"), backend.use_isa(request.param):
        yield request.param


def require_fused() -> None:
    """Skips where there is no compiler: the compiled library is optional, and the reference is tested all the same.

    In CI it is not optional, so that a lost compiler does not turn half of the tests into skips.
    """
    from torch_mtl_pyg import _build, _extension

    extension = _extension.load()
    if extension.loaded:
        backend.backend_info()  # registers the ops
        return
    try:
        _build.find_compiler()
    except _build.BuildError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI has to test the compiled library: {error}")
        pytest.skip(f"no compiled library: {error}")
    pytest.fail(f"there is a compiler, and yet no library: {extension.reason}")
