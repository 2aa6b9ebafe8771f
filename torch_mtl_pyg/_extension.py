"""Finds the compiled ops: prebuilt beside this file, else built at first use into a per-user cache, else none.

The cache holds one folder per key (a hash of all that determines the library), and in it:

- ``<sha256 of the content>.so``, published in one step. The name tells whether the content is whole, without a
  second file that could belong to another build.
- ``build-*``, work of a build in progress, or of one that was killed. The next build removes the latter.
- ``lock``, held while building, and released by the kernel when its holder dies.
- ``build.log``, what the compiler said when it failed last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from . import _build

if sys.platform != "win32":
    import fcntl

_PACKAGE = Path(__file__).resolve().parent
_LOCK_TIMEOUT = 600.0  # seconds; then the build goes on without the lock, which is safe but may do the work twice
_LOG_LINES = 20

_lock = threading.Lock()
_outcome: Extension | None = None
_logger = logging.getLogger("torch_mtl_pyg")


@dataclass(frozen=True)
class Extension:
    """Where the compiled ops came from.

    Attributes:
        loaded: Whether ``torch.ops.torch_mtl_pyg`` holds the compiled ops.
        origin: ``"prebuilt"`` (came with the package), ``"jit"`` (built at first use) or ``"none"``.
        path: The library, if loaded.
        reason: How this came about; if not loaded, what was tried and how to mend it.
    """

    loaded: bool
    origin: Literal["prebuilt", "jit", "none"]
    path: Path | None
    reason: str


class _CannotLoad(Exception):
    """The message says why, as a paragraph for the user."""


def load() -> Extension:
    """Loads the compiled ops, and builds them first if need be.

    The first call decides for the whole process, also when it fails; later ones return what it returned.

    Returns:
        What was found. Never raises for a library that cannot be had: then ``loaded`` is False.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = _load()
    return _outcome


def cache_folder() -> Path:
    """The cache: ``TORCH_MTL_PYG_CACHE``, or else ``torch_mtl_pyg`` in ``XDG_CACHE_HOME`` or in ``~/.cache``.

    Raises:
        RuntimeError: No variable is set, and the user has no home folder.
    """
    if own := os.environ.get("TORCH_MTL_PYG_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "torch_mtl_pyg"


def sources_folder() -> Path | None:
    """The C++ sources: those installed with the package, or those of the checkout it lies in."""
    installed, checkout = _PACKAGE / "_csrc", _PACKAGE.parent / "csrc"
    if (installed / "library.cpp").is_file():
        return installed
    # Beside an installed package, a folder "csrc" would be another project's.
    if (checkout / "library.cpp").is_file() and (_PACKAGE.parent / "setup.py").is_file():
        return checkout
    return None


def _after_fork() -> None:
    """The thread that held the lock does not exist in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _load() -> Extension:
    notes = []
    for origin, attempt in (("prebuilt", _prebuilt), ("jit", _jit)):
        try:
            path, how = attempt()
        except _CannotLoad as error:
            notes.append(str(error))
        except (_build.BuildError, OSError, RuntimeError) as error:
            notes.append(_explain(error))
        else:
            return Extension(True, origin, path, " ".join([*filter(None, notes), how]))  # type: ignore[arg-type]
    return Extension(False, "none", None, " ".join(filter(None, notes)))


def _prebuilt() -> tuple[Path, str]:
    path, stamp, csrc = _PACKAGE / "_C.abi3.so", _PACKAGE / "_C.hash", sources_folder()
    if not path.is_file():
        raise _CannotLoad("")
    if csrc is not None:
        built_from, _, devices = (stamp.read_text() if stamp.is_file() else "unknown").strip().partition(" ")
        if built_from != _build.source_hash(csrc):
            raise _CannotLoad(
                f"The prebuilt library {path} was not used: it was built from other sources or flags than those in "
                f"{csrc} (build it again with: pip install -e . --no-build-isolation)."
            )
        # Without an order it is used as it is, be it built where there was a CUDA or where there was none.
        if _build.cuda_wanted() not in (None, devices == "cuda"):
            has = "has" if devices == "cuda" else "has no"
            raise _CannotLoad(
                f"The prebuilt library {path} was not used: it {has} CUDA kernels, and "
                f"TORCH_MTL_PYG_CUDA={os.environ['TORCH_MTL_PYG_CUDA']}."
            )
    try:
        _load_library(path)
    except _CannotLoad as error:
        raise _CannotLoad(f"The prebuilt library {path} was not used: {error}.") from error
    return path, f"Loaded the prebuilt library {path}."


def _jit() -> tuple[Path, str]:
    csrc = sources_folder()
    if csrc is None:
        raise _CannotLoad(f"The C++ sources are not installed with the package ({_PACKAGE / '_csrc'} is missing).")
    if sys.platform not in _build.LINK_FLAGS:
        raise _CannotLoad(
            f"The C++ ops cannot be built on the platform {sys.platform!r}, only on Linux and macOS. "
            'Use the plain-PyTorch ops: TORCH_MTL_PYG_BACKEND=reference or use_backend("reference").'
        )
    root = cache_folder()
    folder = root / _key(csrc)
    for place in (root, folder):
        _check_owner(place)
    found = _cached(folder)
    how = f"Loaded {found} from the cache."
    if found is None:
        for place in (root, folder):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(place)
        with _exclusive(folder / "lock") as held:
            found = _cached(folder)
            how = f"Loaded {found}, which another process built meanwhile."
            if found is None:
                _logger.info("building the C++ ops into %s, once", folder)
                if held:
                    _clean(root, folder)
                start = time.monotonic()
                found = _build_into(folder, csrc)
                how = f"Built {found} in {time.monotonic() - start:.0f} s."
    try:
        _load_library(found)
    except _CannotLoad as error:
        raise _CannotLoad(f"{found} was built, but cannot be used: {error}. Remove it to build it again.") from error
    return found, " ".join(filter(None, [how, _build.find_cuda(csrc, _build.torch_settings()).reason]))


def _cpu() -> str:
    """The features of the processor, where the system tells them: CXXFLAGS may hold -march=native."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith(("flags", "Features")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _key(csrc: Path) -> str:
    """Hash of all that determines the library. Starts no process."""
    settings = _build.torch_settings()
    cuda = _build.find_cuda(csrc, settings)
    parts = {
        "sources": _build.source_hash(csrc),
        "torch": [settings.version, settings.cxx11_abi],
        "compiler": _build.find_compiler().identity,
        "CXXFLAGS": _build.user_flags(),
        "cuda": [cuda.emulated, cuda.nvcc and cuda.nvcc.identity],
        "machine": [sys.platform, platform.machine(), _cpu(), _libc()],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def _build_into(folder: Path, csrc: Path) -> Path:
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        library = work / "library.so"
        try:
            _build.build(library, csrc=csrc, for_this_cpu=True)
            if _key(csrc) != folder.name:  # edited between computing the key and building
                raise _build.BuildError(f"The sources in {csrc} changed before they were compiled. Start again.")
        except _build.BuildError as error:
            if error.output:
                (folder / "build.log").write_text(f"{error}\n\n{error.output}", encoding="utf-8")
            raise _CannotLoad(_explain(error, folder / "build.log")) from error
        target = folder / f"{_digest(library)}.so"
        _build.publish(library, target)
        return target
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cached(folder: Path) -> Path | None:
    """The library in the cache, if there is a whole one that belongs to this user."""
    for path in sorted(folder.glob("*.so")):
        try:
            if path.stat().st_uid == os.geteuid() and path.stem == _digest(path):
                return path
        except FileNotFoundError:
            continue  # removed by another process since it was listed
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _clean(root: Path, own: Path) -> None:
    """Removes what killed builds left. ``own`` is locked by us; other folders only if no build runs in them."""
    for path in own.glob("*.so"):
        if path.stem != _digest(path):
            path.unlink(missing_ok=True)
    for folder in {work.parent for work in root.glob("*/build-*/")}:
        if folder == own:
            _remove_work(folder)
        elif (folder / "lock").is_file():
            with _exclusive(folder / "lock", timeout=0.0) as held:
                if held:
                    _remove_work(folder)


def _remove_work(folder: Path) -> None:
    for work in folder.glob("build-*/"):
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _exclusive(path: Path, timeout: float = _LOCK_TIMEOUT) -> Iterator[bool]:
    """Holds a lock among processes. Yields False where it cannot be had: no support, or a timeout."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    held = False
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
            except OSError:
                break
        yield held
    finally:
        if held:
            # Closing is not enough if another thread has forked meanwhile: the child holds the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _check_owner(folder: Path) -> None:
    """Refuses a folder in which someone else could put a library: loading it would run their code."""
    for stat in (os.lstat, os.stat):
        try:
            status = stat(folder)
        except FileNotFoundError:
            continue
        other = status.st_uid != os.geteuid()
        if other or (stat is os.stat and status.st_mode & 0o002):
            why = f"belongs to user {status.st_uid}, not to {os.geteuid()}" if other else "can be written by every user"
            raise _CannotLoad(
                f"The C++ ops were not built or loaded: the cache folder {folder} {why}, so a library in it is not to "
                "be trusted. Set TORCH_MTL_PYG_CACHE to a folder of your own."
            )


def _load_library(path: Path) -> None:
    """Loads a library; raises `_CannotLoad` if that fails or if it lacks the ops."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise _CannotLoad(f"it does not load ({error})") from error
    if not hasattr(torch.ops.torch_mtl_pyg, "isa"):
        raise _CannotLoad("it does not register the ops of torch_mtl_pyg")


def _explain(error: Exception, log: Path | None = None) -> str:
    """One paragraph: what was tried, what went wrong, how to mend it."""
    text = f"The C++ ops could not be built: {error}"
    if isinstance(error, _build.BuildError):
        if error.output and log is not None:
            last = "\n".join(error.output.rstrip().splitlines()[-_LOG_LINES:])
            text += f"\nThe output ends with:\n{last}\nAll of it is in {log}."
            text += " Mend the compiler, set CXX to another one, or check CXXFLAGS."
    else:
        text += ". Set TORCH_MTL_PYG_CACHE to a folder that can be written."
    return f'{text} The plain-PyTorch ops need no compiler: use_backend("reference"), TORCH_MTL_PYG_BACKEND=reference.'
