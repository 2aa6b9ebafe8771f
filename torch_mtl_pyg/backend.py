"""Which implementation the ops run on: the compiled one (fused) or plain PyTorch (reference).

`resolve` is read by every op, also while Dynamo traces it. The answer therefore lies in a plain module attribute,
on which Dynamo puts a guard: a compiled function is traced again when the choice changes.
"""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Literal, get_args

import torch

from . import _build, _extension
from ._version import __version__

Choice = Literal["reference", "fused", "auto"]

_CHOICES: tuple[str, ...] = get_args(Choice)


def _checked(name: object, source: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected one of {', '.join(map(repr, _CHOICES))}, got {type(name).__name__}.")
    if name not in _CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, _CHOICES))}, got {name!r}.")
    return name


_choice = _checked(os.environ.get("TORCH_MTL_PYG_BACKEND") or "auto", "environment variable TORCH_MTL_PYG_BACKEND")
_fused: bool | None = False if _choice == "reference" else None  # None: the extension has not been asked for yet
_lock = threading.Lock()
_loading = threading.Lock()
_ready = False  # loaded, and TORCH_MTL_PYG_ISA applied
_warned = False


class use_backend:
    """Chooses the implementation of all ops, at once and for the whole process.

    As a context manager, restores the former choice on leaving; may be nested::

        use_backend("reference")
        with use_backend("fused"):
            ...

    Args:
        name: ``"reference"`` (plain PyTorch; builds and loads nothing), ``"fused"`` (the compiled ops) or ``"auto"``
            (fused where it loads, else reference, with one RuntimeWarning per process).

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: ``name`` is none of these, or ``TORCH_MTL_PYG_ISA`` names an instruction set that cannot be used.
        RuntimeError: ``name`` is ``"fused"``, and the compiled ops cannot be loaded. The choice stays as it was.
    """

    def __init__(self, name: Choice) -> None:
        self._name = _checked(name, "name")
        self._former = [_choice]
        self._entered = False  # whether the choice of the constructor has been taken up by a with statement
        _choose(self._name)

    def __enter__(self) -> use_backend:
        if self._entered:
            self._former.append(_choice)
        self._entered = True
        _choose(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not `_choose`, which could raise: the former choice held before, so it needs no check.
        _set(self._former.pop())


def choice() -> str:
    """What was asked for: ``"reference"``, ``"fused"`` or ``"auto"``."""
    return _choice


def resolve() -> bool:
    """Whether the ops run on the compiled implementation.

    Loads (and, once, builds) the extension at the first call unless the choice is ``"reference"``. May be called in a
    function that is compiled with ``fullgraph=True``.

    Returns:
        True for the fused, False for the reference implementation.

    Raises:
        RuntimeError: The choice is ``"fused"``, and the compiled ops cannot be loaded.
        ValueError: ``TORCH_MTL_PYG_ISA`` names an instruction set that is unknown or not available on this CPU.
    """
    fused = _fused
    return _resolve_first() if fused is None else fused


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Forces the instruction set of the compiled kernels, and restores the former one. For tests.

    Args:
        name: One of ``isas_available()``.

    Raises:
        ValueError: ``name`` is unknown or not available on this CPU.
        RuntimeError: The compiled ops cannot be loaded.
    """
    extension = _load()
    if not extension.loaded:
        raise RuntimeError(_unavailable(extension))
    former = torch.ops.torch_mtl_pyg.isa()
    _set_isa(name, "name")
    try:
        yield
    finally:
        torch.ops.torch_mtl_pyg.set_isa(former)


@dataclass(frozen=True)
class BackendInfo:
    """What the ops run on, and why.

    Attributes:
        backend: ``"fused"``, ``"reference"``, or ``"unavailable"`` (fused was asked for and cannot be loaded).
        reason: Why.
        choice: What was asked for: ``"reference"``, ``"fused"`` or ``"auto"``.
        isa: The instruction set of the compiled kernels; None unless they are active.
        threads: Number of threads of one op.
        cache_dir: Where libraries built at first use are kept.
        versions: Versions of torch_mtl_pyg, torch, torch_geometric, python and compiler.
    """

    backend: Literal["fused", "reference", "unavailable"]
    reason: str
    choice: str
    isa: str | None
    threads: int
    cache_dir: str
    versions: dict[str, str]

    def __str__(self) -> str:
        """One line per item."""
        rows = {
            "backend": f"{self.backend} (choice: {self.choice})",
            "reason": self.reason.replace("\n", "\n" + " " * 17),
            "instruction set": self.isa or "- (that of torch)",
            "threads": str(self.threads),
            "cache folder": self.cache_dir,
            **self.versions,
        }
        return "\n".join(f"{name:<17}{value}" for name, value in rows.items())


def backend_info() -> BackendInfo:
    """Describes the active backend. Loads the extension unless the choice is ``"reference"``.

    Raises:
        ValueError: ``TORCH_MTL_PYG_ISA`` names an instruction set that is unknown or not available on this CPU.
    """
    backend: Literal["fused", "reference", "unavailable"]
    if _choice == "reference":
        backend, reason = "reference", 'Asked for, with use_backend("reference") or TORCH_MTL_PYG_BACKEND=reference.'
    else:
        extension = _load()
        reason = extension.reason
        backend = "fused" if extension.loaded else "reference" if _choice == "auto" else "unavailable"
    try:
        cache = str(_extension.cache_folder())
    except RuntimeError as error:
        cache = f"none ({error})"
    return BackendInfo(
        backend=backend,
        reason=reason,
        choice=_choice,
        isa=torch.ops.torch_mtl_pyg.isa() if backend == "fused" else None,
        threads=torch.get_num_threads(),
        cache_dir=cache,
        versions={
            "torch_mtl_pyg": __version__,
            "torch": torch.__version__,
            "torch_geometric": _version_of("torch_geometric"),
            "python": platform.python_version(),
            "compiler": _compiler_version(),
        },
    )


def _choose(name: str) -> None:
    """Makes a choice; one that cannot be had raises and changes nothing."""
    if name == "fused":
        extension = _load()
        if not extension.loaded:
            raise RuntimeError(_unavailable(extension))
    _set(name)


def _set(name: str) -> None:
    global _choice, _fused
    with _lock:
        _choice = name
        _fused = _known(name)


def _known(choice: str) -> bool | None:
    """What `resolve` returns for a choice; None if the extension has to be asked."""
    if choice == "reference":
        return False
    if _ready:
        return True
    return False if choice == "auto" and _warned else None


# Dynamo calls this while it traces, and takes the answer as a constant; the guard on `_fused` keeps it right.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve_first() -> bool:
    global _warned
    extension = _load()
    if extension.loaded:
        _set(_choice)
        return _choice != "reference"
    if _choice == "fused":
        raise RuntimeError(_unavailable(extension))
    first, _warned = not _warned, True
    _set(_choice)
    if first:
        warnings.warn(
            f"torch_mtl_pyg runs on plain PyTorch, since its C++ ops cannot be loaded. {extension.reason}",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def _unavailable(extension: _extension.Extension) -> str:
    return f'The backend "fused" was asked for, but its C++ ops cannot be loaded. {extension.reason}'


def _load() -> _extension.Extension:
    """Loads the extension, and applies ``TORCH_MTL_PYG_ISA`` once."""
    global _ready
    extension = _extension.load()
    if extension.loaded and not _ready:
        from . import ops  # here, since the ops import this module

        with _loading:  # a second registration would be an error
            if not _ready:
                wanted = os.environ.get("TORCH_MTL_PYG_ISA")
                if wanted:
                    _set_isa(wanted, "environment variable TORCH_MTL_PYG_ISA")
                ops.register()
                _ready = True
    return extension


def _set_isa(name: str, source: str) -> None:
    available = torch.ops.torch_mtl_pyg.isas_available().split(",")
    if name not in available:
        why = "which this CPU or this build does not have" if name in _build.ISA_FLAGS else "which is not known"
        raise ValueError(f"{source}: expected one of {', '.join(available)}, got {name!r}, {why}.")
    torch.ops.torch_mtl_pyg.set_isa(name)


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler_version() -> str:
    try:
        compiler = _build.find_compiler()
        done = subprocess.run([*compiler.command, "--version"], capture_output=True, encoding="utf-8", errors="replace")
    except (_build.BuildError, OSError):
        return "none found"
    first = (done.stdout.strip() or "version unknown").splitlines()[0]
    return f"{first} [{compiler.command[0]}]"
