"""What the tests of building and loading share: small stand-ins for csrc/, compilers that are watched."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torch_mtl_pyg import _build, _extension

PACKAGE = Path(_extension.__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

needs_build = (
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform not in _build.LINK_FLAGS, reason="there is no build for this platform"),
)

LIBRARY_CPP = """
#include <torch/csrc/stable/library.h>
#include <string>
#include "cpu/kernels.h"
namespace {
std::string current = "baseline";
std::string isa() { return current; }
std::string isas_available() { return "baseline,avx2"; }
void set_isa(const std::string& name) { current = name; }
int64_t twice(int64_t value) { return mtl::twice_baseline(value); }
}  // namespace
STABLE_TORCH_LIBRARY(torch_mtl_pyg, m) {
  m.def("isa() -> str");
  m.def("isas_available() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("twice(int value) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(torch_mtl_pyg, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas_available", TORCH_BOX(&isas_available));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("twice", TORCH_BOX(&twice));
}
"""
EXPORT = '#define EXPORT extern "C" __attribute__((visibility("default")))\n'
KERNELS_H = "#pragma once\n#include <cstdint>\nnamespace mtl { int64_t twice_baseline(int64_t value); }\n"
KERNELS_CPP = '#include "cpu/kernels.h"\nint64_t mtl::twice_baseline(int64_t value) { return 2 * value; }\n'


class Project:
    """A checkout with this package's loader and with a small csrc/ that registers a few ops."""

    def __init__(self, root: Path) -> None:
        self.root, self.csrc, self.cache = root, root / "csrc", root / "cache"
        self.package = root / "torch_mtl_pyg"
        self.package.mkdir(parents=True)
        for name in ("__main__.py", "_build.py", "_extension.py", "_version.py", "backend.py", "py.typed"):
            shutil.copy(PACKAGE / name, self.package)
        (self.package / "__init__.py").write_text("from .backend import backend_info, use_backend\n")
        (self.package / "ops.py").write_text("def register() -> None:\n    pass\n")
        (root / "setup.py").touch()
        (self.csrc / "cpu").mkdir(parents=True)
        (self.csrc / "library.cpp").write_text(LIBRARY_CPP)
        (self.csrc / "cpu" / "kernels.h").write_text(KERNELS_H)
        (self.csrc / "cpu" / "kernels_baseline.cpp").write_text(KERNELS_CPP)

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's environment without what steers the build, plus ``extra``."""
        own = ("TORCH_MTL_PYG_", "CXX", "MAX_JOBS", "PYTHONPATH")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return {
            **clean,
            "PYTHONPATH": str(self.root),
            "TORCH_MTL_PYG_CACHE": str(self.cache),
            "CXXFLAGS": "-O0",
            **extra,
        }

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        """Starts Python with this package in its path."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=self.root, env=self.environment(**extra), text=True, **pipes)

    def run(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs Python with this package in its path to its end."""
        process = self.start(*arguments, **extra)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def wrapper(path: Path, body: str) -> Path:
    """Writes a compiler that runs ``body`` (shell) and then the real compiler."""
    path.write_text(f'#!/bin/sh\n{body}\nexec {shlex.quote(str(COMPILER))} "$@"\n')
    path.chmod(0o755)
    return path


def logging_compiler(folder: Path) -> tuple[Path, Path]:
    """A compiler that notes its arguments, and the file it notes them in."""
    log = folder / "compiler.log"
    return wrapper(folder / "logging-c++", f'echo "$@" >> {shlex.quote(str(log))}'), log


def links(log: Path) -> int:
    """How many libraries a logging compiler has linked."""
    return sum("library.so" in line for line in log.read_text().splitlines())


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time. Loading checks the library, but leaves torch's registry alone."""
    root = tmp_path / "checkout"
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "library.cpp").write_text('#include "answer.h"\nEXPORT int answer() { return ANSWER; }\n')
    (root / "csrc" / "answer.h").write_text(EXPORT + "#define ANSWER 42\n")
    (root / "setup.py").touch()
    for name in [*os.environ]:
        if name.startswith(("TORCH_MTL_PYG_", "CXX", "MAX_JOBS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_MTL_PYG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_extension, "_PACKAGE", root / "torch_mtl_pyg")
    monkeypatch.setattr(_extension, "_outcome", None)

    def load_library(path: Path) -> None:
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            raise _extension._CannotLoad(f"it does not load ({error})") from error

    monkeypatch.setattr(_extension, "_load_library", load_library)
    return root / "csrc"


def built() -> Path:
    """Loads, expects success, and returns the library."""
    result = _extension._load()
    assert result.loaded, result.reason
    assert result.path is not None
    return result.path


def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
