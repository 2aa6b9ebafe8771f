"""Argument checks shared by the ops: precise exceptions, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, value: object, dim: int, shape: str) -> None:
    """A strided tensor of a supported dtype with ``dim`` dimensions; ``shape`` says in words which."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}.")
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of the dtypes {names}, got {str(value.dtype).removeprefix('torch.')}.")
    if value.dim() != dim:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}.")


def check_same(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """The dtype and device of another argument."""
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {value.device}.")
