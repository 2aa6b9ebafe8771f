"""Argument checks shared by the ops: precise exceptions, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def check_floating(
    name: str, value: object, dim: int, shape: str, like: Tensor | None = None, like_dim: int = 0
) -> None:
    """A strided tensor of a supported dtype and shape.

    Args:
        name: The argument, for the message.
        value: What came.
        dim: Its number of dimensions.
        shape: The shape in words; ``{}`` stands for the size that ``like`` gives.
        like: A tensor; the last dimension of ``value`` must have the size of its dimension ``like_dim``. Or None.
        like_dim: See ``like``.

    Raises:
        TypeError: No tensor, not strided, or of another dtype.
        ValueError: Another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {_shape(shape, like, like_dim)}, got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}.")
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(DTYPES, key=str))
        raise TypeError(f"{name}: expected one of the dtypes {names}, got {str(value.dtype).removeprefix('torch.')}.")
    got = value.shape
    if len(got) != dim or (like is not None and got[-1] != like.shape[like_dim]):
        raise ValueError(f"{name}: expected shape {_shape(shape, like, like_dim)}, got {list(got)}.")


def _shape(shape: str, like: Tensor | None, like_dim: int) -> str:
    return shape if like is None else shape.format(like.shape[like_dim])


def check_same(name: str, value: Tensor, like_name: str, like: Tensor, dtype: bool = True) -> None:
    """The device of another argument, and its dtype where asked."""
    if dtype and value.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {value.dtype}.")
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {value.device}.")
