"""Caching and loading the compiled ops, on small stand-ins for csrc/."""

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
import threading
import time
from pathlib import Path

import pytest
from extension_common import (
    EXPORT,
    Project,
    built,
    links,
    logging_compiler,
    needs_build,
    no_processes,
    wrapper,
)

from torch_mtl_pyg import _build, _extension

pytestmark = [*needs_build]

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
