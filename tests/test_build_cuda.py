"""Compiling CUDA kernels, on small stand-ins for csrc/: who compiles them, and what is said if none does.

The kernels themselves are compiled in test_cuda_compile.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_fused
from extension_common import COMPILER, built, needs_build, no_processes

from torch_mtl_pyg import _build, _extension, backend
from torch_mtl_pyg.ops import _dispatch

pytestmark = [*needs_build]
linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is for Linux")

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer()'


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what this machine has."""
    for name in ("CUDA_HOME", "CUDA_PATH", *_build.NVCC_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kernels(csrc: Path) -> Path:
    """A csrc/ with an op of both kinds."""
    (csrc / "cuda").mkdir()
    (csrc / "library.cpp").write_text("")
    (csrc / "cpu" / "op.cpp").write_text(f"{ANSWER} {{ return 1; }}\n")
    (csrc / "cuda" / "op.cu").write_text("int on_gpu() { return 2; }\n")
    return csrc


def torch_with(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> _build.Torch:
    settings = dataclasses.replace(_build.torch_settings(), cuda=cuda)
    monkeypatch.setattr(_build, "torch_settings", lambda: settings)
    return settings


def fake_nvcc(home: Path) -> tuple[Path, Path]:
    """Compiles with the C++ compiler; and the file it notes its arguments in."""
    (home / "bin").mkdir(parents=True)
    log, libraries, nvcc = home / "log", home / "libraries", home / "bin" / "nvcc"
    libraries.mkdir()
    subprocess.run(["ar", "rc", str(libraries / "libcudart_static.a")], check=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --dryrun ]; then echo \'#$ LIBRARIES=  "-L{libraries}" "-L/nowhere"\' >&2; exit 0; fi\n'
        f'echo "$@" >> {shlex.quote(str(log))}\n'
        'while [ "$1" != -c ]; do shift; done\n'
        f'exec {shlex.quote(str(COMPILER))} -fPIC -x c++ "$@"\n'
    )
    nvcc.chmod(0o755)
    return nvcc, log


# --- the decision -----------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("wanted", [None, "1", "0"])
@pytest.mark.parametrize("version", [None, "12.8"])
@pytest.mark.parametrize("there", [True, False])
def test_who_compiles(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None, version: str | None, there: bool
) -> None:
    settings = torch_with(monkeypatch, version)
    nvcc, _ = fake_nvcc(tmp_path / "cuda")
    monkeypatch.setattr(_build, "_find_nvcc", lambda: str(nvcc) if there else None)
    if wanted is not None:
        monkeypatch.setenv("TORCH_MTL_PYG_CUDA", wanted)
    no_processes(monkeypatch)
    if wanted == "1" and not there:
        with pytest.raises(_build.BuildError, match=r"TORCH_MTL_PYG_CUDA=1, but .*nvcc was not found in CUDA_HOME"):
            _build.find_cuda(kernels, settings)
        return
    cuda = _build.find_cuda(kernels, settings)
    compiles = there and (wanted == "1" or (wanted is None and version is not None))
    assert (cuda.nvcc is not None, cuda.emulated) == (compiles, False)
    if wanted == "0":
        assert "TORCH_MTL_PYG_CUDA=0" in cuda.reason
    elif wanted is None and version is not None and not there:
        assert "nvcc was not found" in cuda.reason
    else:
        assert cuda.reason == ""


def test_without_cuda_sources_nothing_is_looked_for(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "_find_nvcc", lambda: pytest.fail("looked for nvcc"))
    assert _build.find_cuda(csrc, torch_with(monkeypatch, "12.8")) == _build.Cuda()


def test_another_platform(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch_with(monkeypatch, None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _build.find_cuda(kernels, settings) == _build.Cuda()
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", "1")
    with pytest.raises(_build.BuildError, match="no build of them for the platform 'darwin'"):
        _build.find_cuda(kernels, settings)


def test_which_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (fake_nvcc(tmp_path / name)[0] for name in ("one", "two", "three"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert _build._find_nvcc() is None
    monkeypatch.setenv("PATH", str(three.parent))
    assert _build._find_nvcc() == str(three)
    monkeypatch.setenv("CUDA_PATH", str(two.parent.parent))
    assert _build._find_nvcc() == str(two)
    monkeypatch.setenv("CUDA_HOME", str(one.parent.parent))
    assert _build._find_nvcc() == str(one)


@pytest.mark.parametrize("value", ["2", "yes"])
def test_wrong_variable_is_named(csrc: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", value)
    result = _extension._load()
    assert not result.loaded
    assert f"TORCH_MTL_PYG_CUDA: expected 0 or 1, got {value!r}" in result.reason


def test_both_at_once(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", "1")
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "cuda")
    assert "exclude each other" in _extension._load().reason


# --- emulated ---------------------------------------------------------------------------------------------------------


def test_emulated_kernels_take_the_place_of_those_for_the_cpu(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "#if !defined(MTL_EMULATE_CUDA) || defined(MTL_WITH_CUDA)\n#error flags\n#endif\n"
    (kernels / "cuda" / "op.cu").write_text(f"{check}#include <thread>\nint other();\n{ANSWER} {{ return other(); }}\n")
    (kernels / "cpu" / "other.cpp").write_text(
        "#ifdef MTL_EMULATE_CUDA\n#error flags\n#endif\nint other() { return 3; }\n"
    )
    assert ctypes.CDLL(str(built())).answer() == 1
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "cuda")
    torch_with(monkeypatch, "12.8")
    assert ctypes.CDLL(str(built())).answer() == 3


def test_emulation_of_a_gpu_leaves_instruction_sets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "cuda")
    assert not _build.emulated()
    assert _build.isa_flags("avx512") == _build.ISA_FLAGS["avx512"]


# --- nvcc -------------------------------------------------------------------------------------------------------------


@linux
def test_nvcc_compiles_with_the_flags_of_the_host(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc, log = fake_nvcc(tmp_path / "cu da")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", "1")
    monkeypatch.setenv("CXX", f"{COMPILER} -pthread")
    monkeypatch.setenv("CXXFLAGS", "-DMINE='a,b c'")
    (kernels / "cpu" / "op.cpp").write_text(
        "#if !defined(MTL_WITH_CUDA) || defined(MTL_EMULATE_CUDA)\n#error flags\n#endif\n"
        f"int on_gpu();\n{ANSWER} {{ return on_gpu(); }}\n"
    )
    assert ctypes.CDLL(str(built())).answer() == 2
    (line,) = log.read_text().splitlines()
    assert f"-ccbin {COMPILER} {' '.join((*_build.NVCC_FLAGS, *_build.NVCC_TARGETS))} -I{kernels} -isystem " in line
    assert "-Xcompiler=-pthread " in line
    assert r"-Xcompiler='-DMINE=a\,b c' " in line
    for flag in _build.COMMON_FLAGS:
        assert f"-Xcompiler={flag} " in line


@linux
def test_a_changed_nvcc_is_another_library(kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc, _ = fake_nvcc(tmp_path / "cuda")
    keys = [_extension._key(kernels)]
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parent.parent))
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", "1")
    keys.append(_extension._key(kernels))
    nvcc.write_text(nvcc.read_text() + "# a newer release\n")
    keys.append(_extension._key(kernels))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    keys.append(_extension._key(kernels))
    monkeypatch.delenv("TORCH_MTL_PYG_CUDA")
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "cuda")
    keys.append(_extension._key(kernels))
    assert len(set(keys)) == len(keys)


@linux
def test_a_torch_with_cuda_and_no_nvcc_says_so(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_with(monkeypatch, "12.8")
    monkeypatch.setattr(_build, "_find_nvcc", lambda: None)
    for how in ("Built", "Loaded"):
        result = _extension._load()
        assert result.loaded
        assert result.reason.startswith(how)
        assert "It has no CUDA kernels: nvcc was not found" in result.reason
    assert ctypes.CDLL(str(result.path)).answer() == 1


@linux
@pytest.mark.parametrize("kind", ["0", "1"])
def test_prebuilt_with_and_without_kernels(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    nvcc, _ = fake_nvcc(tmp_path / "cuda")
    monkeypatch.setattr(_build, "_find_nvcc", lambda: str(nvcc))
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", kind)
    package = kernels.parent / "torch_mtl_pyg"
    package.mkdir()
    stamp = _build.build(package / "_C.abi3.so", csrc=kernels)
    (package / "_C.hash").write_text(stamp + "\n")
    assert stamp.endswith(" cuda") == (kind == "1")
    assert _extension._load().origin == "prebuilt"
    monkeypatch.delenv("TORCH_MTL_PYG_CUDA")
    torch_with(monkeypatch, "12.8")
    assert _extension._load().origin == "prebuilt"
    other = "0" if kind == "1" else "1"
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", other)
    result = _extension._load()
    assert result.origin == "jit"
    has = "it has CUDA kernels" if kind == "1" else "it has no CUDA kernels"
    assert f"was not used: {has}, and TORCH_MTL_PYG_CUDA={other}" in result.reason


@linux
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc in PATH")
def test_a_real_nvcc_makes_a_library_that_loads_without_a_gpu(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_CUDA", "1")
    (kernels / "cpu" / "op.cpp").unlink()
    (kernels / "cuda" / "op.cu").write_text(
        "#include <cuda_runtime.h>\n#include <torch/headeronly/core/ScalarType.h>\n"
        "__global__ void kernel(int* out) { *out = 3; }\n"
        f"{ANSWER} {{ kernel<<<1, 1>>>(nullptr); return TORCH_TARGET_VERSION > 0 ? 4 : 5; }}\n"
    )
    path = built()
    assert ctypes.CDLL(str(path)).answer() == 4
    content = path.read_bytes()
    assert b"libcudart.so" not in content  # a part of the library itself
    assert b"libtorch.so\0" in content  # through which the loader finds libtorch_cuda


# --- the ops ----------------------------------------------------------------------------------------------------------


def test_pytorch_is_asked_for_the_kernels_of_an_op_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(_dispatch, "_cuda_kernels", {})
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: asked.append((op, key)) or op.endswith("::one"),
    )
    assert [_dispatch._has_cuda_kernels(op) for op in ("one", "other", "one", "other")] == [True, False, True, False]
    assert asked == [("torch_mtl_pyg::one", "CUDA"), ("torch_mtl_pyg::other", "CUDA")]


def test_the_library_names_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fused()
    assert (*torch.ops.torch_mtl_pyg.devices().split(","), "meta") == _dispatch.FUSED_DEVICES
    with backend.use_backend("fused"):
        monkeypatch.setattr(_dispatch, "FUSED_DEVICES", ("cpu", "cuda", "meta"))
        monkeypatch.setattr(_dispatch, "_has_cuda_kernels", lambda op: op == "multi_head_linear")
        assert _dispatch.runs_fused("cuda", "multi_head_linear")
        with pytest.raises(RuntimeError, match="no compiled kernels of aggregate for the device 'cuda'"):
            _dispatch.runs_fused("cuda", "aggregate")
        monkeypatch.setattr(_dispatch, "FUSED_DEVICES", ("cpu", "meta"))
        with pytest.raises(RuntimeError, match="no compiled kernels of multi_head_linear for the device 'cuda'"):
            _dispatch.runs_fused("cuda", "multi_head_linear")
