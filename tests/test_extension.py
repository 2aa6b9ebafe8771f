"""Building, caching and loading the compiled ops, on small stand-ins for csrc/."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torch_mtl_pyg import _build, _extension

PACKAGE = Path(_extension.__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform not in _build.LINK_FLAGS, reason="there is no build for this platform"),
]

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


# --- the compiler's side ----------------------------------------------------------------------------------------------


def test_library_works_and_needs_no_python(csrc: Path) -> None:
    path = built()
    assert ctypes.CDLL(str(path)).answer() == 42
    content = path.read_bytes()
    assert b"libpython" not in content
    assert b"PyInit" not in content


def test_instruction_sets_and_defines(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in _build.ISA_FLAGS:
        (csrc / "cpu" / f"kernels_{isa}.cpp").write_text(f"int kernel_{isa}() {{ return 0; }}\n")
    (csrc / "cuda").mkdir()
    (csrc / "cuda" / "host.cpp").write_text("#error not for the C++ compiler\n")
    log = tmp_path / "log"
    refuse = 'case "$*" in *avx512bf16*) echo "unrecognized option" >&2; exit 1;; esac'
    compiler = wrapper(tmp_path / "old-c++", f'echo "$@" >> {shlex.quote(str(log))}\n{refuse}')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CXXFLAGS", "-DMINE='a b'")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_build, "foreign_isas", frozenset)
    if not X86:
        pytest.skip("needs a compiler for x86-64")
    built()
    lines = [line for line in log.read_text().splitlines() if "empty.cpp" not in line]
    compiled = {Path(line.split(" -c ")[1].split()[0]).stem: line.split() for line in lines if " -c " in line}
    assert set(compiled) == {"library", "kernels_baseline", "kernels_avx2", "kernels_avx512"}
    for name, words in compiled.items():
        assert {*_build.COMMON_FLAGS, "-DMTL_WITHOUT_AVX512_BF16"} <= set(words), name
        assert "-DMTL_WITHOUT_AVX2" not in words
        assert "-DMINE=a" in words
        isa = name.removeprefix("kernels_")
        expected = _build.ISA_FLAGS.get(isa, ())
        assert [word for word in words if word.startswith("-m")] == list(expected), name
    link = next(line for line in lines if "library.so" in line).split()
    order = [word.split("_", 1)[1] for word in link if word.endswith(".o")]
    assert order == ["library.o", "kernels_baseline.o", "kernels_avx2.o", "kernels_avx512.o"]


def test_first_use_leaves_out_what_the_cpu_has_not(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (csrc / "cpu" / "kernels_avx512.cpp").write_text("#error not for this CPU\n")
    (csrc / "library.cpp").write_text(EXPORT + "#ifdef MTL_WITHOUT_AVX512\nEXPORT int answer() { return 7; }\n#endif\n")
    monkeypatch.setattr(_build, "foreign_isas", lambda: frozenset({"avx512", "avx512_bf16"}))
    assert ctypes.CDLL(str(built())).answer() == 7


def test_the_emulation_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "1")
    assert not _build.foreign_isas()


def test_other_cpus_get_the_baseline_only(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (csrc / "cpu" / "kernels_avx2.cpp").write_text("#error not for this CPU\n")
    (csrc / "library.cpp").write_text(EXPORT + "#ifdef MTL_WITHOUT_AVX2\nEXPORT int answer() { return 7; }\n#endif\n")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert ctypes.CDLL(str(built())).answer() == 7


@pytest.mark.skipif(not X86, reason="needs a compiler for x86-64")
def test_emulation_compiles_wide_kernels_for_avx2(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = "#if defined(__AVX512F__) || !defined(__AVX2__) || !defined(MTL_EMULATE_AVX512)\n#error flags\n#endif\n"
    (csrc / "cpu" / "kernels_avx512.cpp").write_text(check)
    (csrc / "cpu" / "kernels_avx512_bf16.cpp").write_text(check)
    with monkeypatch.context() as patch:
        patch.setattr(_build, "foreign_isas", frozenset)
        assert not _extension._load().loaded
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "1")
    built()


def test_paths_with_special_characters(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a b$c:d'e"
    shutil.copytree(csrc.parent, odd / "checkout")
    (odd / "checkout" / "csrc" / "cpu" / "one two.cpp").write_text("int f() { return 0; }\n")
    monkeypatch.setattr(_extension, "_PACKAGE", odd / "checkout" / "torch_mtl_pyg")
    monkeypatch.setenv("TORCH_MTL_PYG_CACHE", str(odd / "cache"))
    assert ctypes.CDLL(str(built())).answer() == 42


@pytest.mark.parametrize(("name", "value"), [("MAX_JOBS", "many"), ("TORCH_MTL_PYG_EMULATE", "2"), ("CXXFLAGS", "'")])
def test_wrong_variables_are_named(csrc: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    result = _extension._load()
    assert not result.loaded
    assert f"{name}: expected" in result.reason
    assert repr(value) in result.reason


def test_sources_edited_while_building_are_not_cached(
    csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = shlex.quote(str(csrc / "answer.h"))
    edit = f'case "$*" in *library.cpp*) echo "// edited" >> {header};; esac'
    monkeypatch.setenv("CXX", str(wrapper(tmp_path / "editing-c++", edit)))
    result = _extension._load()
    assert not result.loaded
    assert "changed while they were compiled" in result.reason
    assert not list((tmp_path / "cache").glob("*/*.so"))


# --- what can be missing ----------------------------------------------------------------------------------------------


def test_missing_compiler(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = _extension._load()
    assert (result.loaded, result.origin, result.path) == (False, "none", None)
    assert "No C++ compiler was found (CXX='no-such-compiler' is not an executable file)" in result.reason
    assert "TORCH_MTL_PYG_BACKEND=reference" in result.reason


def test_missing_ninja(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "ninja" else which(name, **options))
    result = _extension._load()
    assert not result.loaded
    assert "pip install ninja" in result.reason


def test_ninja_outside_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert os.access(_build.find_ninja(), os.X_OK)


def test_broken_compiler(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    result = _extension._load()
    assert not result.loaded
    assert "cannot compile an empty file" in result.reason


def test_failing_compile_shows_the_end_and_logs_it_all(csrc: Path, tmp_path: Path) -> None:
    errors = "".join(f"#error number {i}.\n" for i in range(100))
    (csrc / "library.cpp").write_text(errors)
    result = _extension._load()
    assert not result.loaded
    assert "number 99." in result.reason
    assert "number 1." not in result.reason
    (log,) = (tmp_path / "cache").glob("*/build.log")
    assert str(log) in result.reason
    assert all(f"number {i}." in log.read_text() for i in range(100))
    assert not list((tmp_path / "cache").glob("*/build-*/"))
    (csrc / "library.cpp").write_text(EXPORT + "EXPORT int answer() { return 1; }\n")
    assert ctypes.CDLL(str(built())).answer() == 1


def test_undefined_symbol_fails_the_build(csrc: Path) -> None:
    (csrc / "library.cpp").write_text(EXPORT + "int nowhere(); EXPORT int answer() { return nowhere(); }\n")
    if sys.platform != "linux":
        pytest.skip("the linker of this platform resolves symbols later")
    assert "nowhere" in _extension._load().reason


def test_unknown_platform(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "LINK_FLAGS", {})
    result = _extension._load()
    assert not result.loaded
    assert f"cannot be built on the platform {sys.platform!r}" in result.reason


def test_missing_sources(csrc: Path) -> None:
    shutil.rmtree(csrc)
    assert "sources are not installed" in _extension._load().reason


def test_sources_of_another_project_are_not_used(csrc: Path) -> None:
    (csrc.parent / "setup.py").unlink()
    assert _extension.sources_folder() is None


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cached_start_starts_no_process(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built()
    no_processes(monkeypatch)
    result = _extension._load()
    assert (result.loaded, result.origin, result.path) == (True, "jit", path)
    assert "from the cache" in result.reason


def test_key(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [_extension._key(csrc)]
    assert _extension._key(csrc) == keys[0]
    (csrc / "answer.h").write_text(EXPORT + "#define ANSWER 43\n")
    keys.append(_extension._key(csrc))
    (csrc / "answer.h").rename(csrc / "other.h")
    keys.append(_extension._key(csrc))
    compiler = wrapper(tmp_path / "mine-c++", "")
    monkeypatch.setenv("CXX", str(compiler))
    keys.append(_extension._key(csrc))
    compiler.write_text(compiler.read_text() + "# a newer release\n")
    keys.append(_extension._key(csrc))
    monkeypatch.setenv("CXX", f"{compiler} -pthread")
    keys.append(_extension._key(csrc))
    monkeypatch.setenv("CXXFLAGS", "-g")
    keys.append(_extension._key(csrc))
    monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "1")
    keys.append(_extension._key(csrc))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    keys.append(_extension._key(csrc))
    monkeypatch.setattr(_build, "torch_settings", lambda: _build.Torch("9.9", True, (), Path()))
    keys.append(_extension._key(csrc))
    monkeypatch.setattr(_build, "torch_settings", lambda: _build.Torch("9.9", False, (), Path()))
    keys.append(_extension._key(csrc))
    monkeypatch.setattr(_build, "COMMON_FLAGS", ("-O2",))
    keys.append(_extension._key(csrc))
    assert len(set(keys)) == len(keys)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_MTL_PYG_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _extension.cache_folder() == tmp_path / ".cache" / "torch_mtl_pyg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _extension.cache_folder() == tmp_path / "xdg" / "torch_mtl_pyg"
    monkeypatch.setenv("TORCH_MTL_PYG_CACHE", "~/mine")
    assert _extension.cache_folder() == tmp_path / "mine"


def test_new_folders_are_private(csrc: Path) -> None:
    folder = built().parent
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (folder, folder.parent)] == [0, 0]


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: content + b"x"])
def test_corrupt_library_is_built_again(csrc: Path, damage: object) -> None:
    path = built()
    content = path.read_bytes()
    path.unlink()  # not in place: this process has the old one mapped
    path.write_bytes(damage(content))  # type: ignore[operator]
    result = _extension._load()
    assert result.reason.startswith("Built")
    assert result.path is not None
    assert ctypes.CDLL(str(result.path)).answer() == 42
    assert list(path.parent.glob("*.so")) == [result.path]


def test_cache_folder_that_is_a_file(csrc: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    result = _extension._load()
    assert not result.loaded
    assert str(tmp_path / "cache") in result.reason
    assert "Set TORCH_MTL_PYG_CACHE to a folder that can be written" in result.reason


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_unwritable_cache_folder(csrc: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(error, os.strerror(error), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = _extension._load()
    assert not result.loaded
    assert os.strerror(error) in result.reason
    assert "TORCH_MTL_PYG_CACHE" in result.reason


def test_read_only_cache_with_a_library_is_used(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("wrote to the cache"))
    monkeypatch.setattr(_extension, "_exclusive", lambda *_: pytest.fail("locked the cache"))
    assert built() == path


def test_cache_of_another_user_is_refused(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(_extension, "_load_library", lambda _: pytest.fail("loaded another user's library"))
    result = _extension._load()
    assert not result.loaded
    assert f"belongs to user {os.getuid()}, not to {os.getuid() + 1}" in result.reason


def test_cache_that_all_can_write_is_refused(csrc: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "can be written by every user" in _extension._load().reason


def test_without_locks_the_build_still_works(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert ctypes.CDLL(str(built())).answer() == 42


def test_a_lock_that_is_never_released_does_not_block_forever(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built().parent
    shutil.rmtree(folder)
    folder.mkdir()
    with open(folder / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        exclusive = _extension._exclusive
        monkeypatch.setattr(_extension, "_exclusive", lambda path, timeout=0.1: exclusive(path, timeout))
        assert ctypes.CDLL(str(built())).answer() == 42


def test_work_of_killed_builds_is_removed_and_that_of_live_ones_kept(csrc: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    dead, live = cache / "0" / "build-dead", cache / "1" / "build-live"
    for work in (dead, live):
        work.mkdir(parents=True)
        (work / "half.o").touch()
        (work.parent / "lock").touch()
    with open(live.parent / "lock") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        built()
    assert not dead.exists()
    assert (live / "half.o").exists()


# --- prebuilt ---------------------------------------------------------------------------------------------------------


def prebuild(csrc: Path) -> Path:
    package = csrc.parent / "torch_mtl_pyg"
    package.mkdir()
    (package / "_C.hash").write_text(_build.build(package / "_C.abi3.so", csrc=csrc) + "\n")
    return package / "_C.abi3.so"


def test_prebuilt_is_used_without_a_compiler(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prebuild(csrc)
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = _extension._load()
    assert (result.loaded, result.origin, result.path) == (True, "prebuilt", path)
    shutil.rmtree(csrc)
    (path.parent / "_C.hash").unlink()
    assert _extension._load().origin == "prebuilt"  # nothing to compare with


@pytest.mark.parametrize("change", ["source", "stamp", "emulate"])
def test_prebuilt_of_other_sources_is_not_used(csrc: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = prebuild(csrc)
    if change == "source":
        (csrc / "answer.h").write_text(EXPORT + "#define ANSWER 43\n")
    elif change == "stamp":
        (path.parent / "_C.hash").unlink()
    else:
        monkeypatch.setenv("TORCH_MTL_PYG_EMULATE", "1")
    result = _extension._load()
    assert result.origin == "jit"
    assert result.path is not None
    assert "was not used: it was built from other sources" in result.reason
    assert ctypes.CDLL(str(result.path)).answer() == (43 if change == "source" else 42)


def test_prebuilt_that_does_not_load_is_passed_over(csrc: Path) -> None:
    prebuild(csrc).write_bytes(b"\x7fELF")
    result = _extension._load()
    assert result.origin == "jit"
    assert "was not used: it does not load" in result.reason


# --- one process ------------------------------------------------------------------------------------------------------


def test_load_remembers_failure_too(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    first = _extension.load()
    assert not first.loaded
    monkeypatch.delenv("CXX")
    assert _extension.load() is first


def test_threads_load_once(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow() -> _extension.Extension:
        calls.append(1)
        time.sleep(0.2)
        return _extension.Extension(False, "none", None, "")

    monkeypatch.setattr(_extension, "_load", slow)
    results: list[_extension.Extension] = []
    threads = [threading.Thread(target=lambda: results.append(_extension.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({id(result) for result in results}) == 1


# --- several processes, real loading ----------------------------------------------------------------------------------

REPORT = (
    "from torch_mtl_pyg import _extension as e; r = e.load(); print(r.origin, r.path, sep='\\n'); assert r.loaded, r"
)
USE = "import torch; assert torch.ops.torch_mtl_pyg.twice(21) == 42"


def test_two_processes_build_once(tmp_path: Path) -> None:
    project = Project(tmp_path)
    compiler, log = logging_compiler(tmp_path)
    processes = [project.start("-c", f"{REPORT}; {USE}", CXX=str(compiler)) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert results[0][0].startswith("jit\n")
    assert links(log) == 1
    # The cached start: no process, and nothing slow imported.
    watch = (
        "import sys, torch\n"
        "bad = ('subprocess.Popen', 'os.posix_spawn', 'os.fork', 'os.exec', 'os.system')\n"
        "sys.addaudithook(lambda event, args: sys.exit(f'{event} {args}') if event in bad else None)\n"
        f"{REPORT}\n{USE}\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
    )
    done = project.run("-c", watch, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert done.stdout == results[0][0]
    assert links(log) == 1


def test_killed_build_is_done_again(tmp_path: Path) -> None:
    project = Project(tmp_path)
    slow, started = tmp_path / "slow", tmp_path / "started"
    wait = f"while [ -e {shlex.quote(str(slow))} ]; do sleep 0.1; done"
    compiler = wrapper(
        tmp_path / "slow-c++", f'case "$*" in *library.cpp*) : > {shlex.quote(str(started))}; {wait};; esac'
    )
    slow.touch()
    try:
        process = project.start("-c", REPORT, CXX=str(compiler))
        while not started.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        (killed,) = project.cache.glob("*/build-*/")
        assert not list(project.cache.glob("*/*.so"))
    finally:
        slow.unlink()  # lets the orphaned compiler end
    done = project.run("-c", f"{REPORT}; {USE}", CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert not killed.exists()
    assert not list(project.cache.glob("*/build-*/"))
