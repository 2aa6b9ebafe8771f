"""Where an op runs: on the compiled library, or on the reference; and what autocast does to its arguments."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import backend

# Devices the compiled library has kernels for. "meta" tensors only need shapes.
FUSED_DEVICES = ("cpu", "meta")

_warned: set[str] = set()


def runs_fused(device: str) -> bool:
    """Whether an op on tensors of this type of device runs on the compiled library.

    Raises:
        RuntimeError: The backend is ``"fused"``, and the library cannot be loaded or has no kernels for this device.
    """
    if not backend.resolve():
        return False
    if device in FUSED_DEVICES:
        return True
    message = f"torch_mtl_pyg has no compiled kernels for the device {device!r} (only for {', '.join(FUSED_DEVICES)})"
    if backend.choice() == "fused":
        raise RuntimeError(f'x: {message}, and the backend "fused" was asked for.')
    if device not in _warned:
        _warned.add(device)
        warnings.warn(f"{message}: plain PyTorch computes the ops there.", RuntimeWarning, stacklevel=3)
    return False


def autocast_to(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments as a matrix product takes them under autocast: floating point, but for float64, in its dtype."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
