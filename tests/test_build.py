"""Compiling the ops, on small stand-ins for csrc/: instruction sets, flags, and what can be wrong."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from extension_common import (
    EXPORT,
    X86,
    built,
    needs_build,
    wrapper,
)

from torch_mtl_pyg import _build, _extension

pytestmark = [*needs_build]

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
