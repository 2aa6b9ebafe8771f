"""Argument checks shared by the ops: precise exceptions, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got a nested one.")
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


def check_indices(name: str, value: object) -> None:
    """A dense int64 vector.

    Raises:
        TypeError: No tensor, not strided, or of another dtype.
        ValueError: Another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor [E], got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}.")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 indices, got {value.dtype}.")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected shape [E], got {list(value.shape)}.")


def check_range(name: str, what: str, index: Tensor, count: int) -> None:
    """Indices in ``[0, count)``.

    Args:
        name: The argument, for the message.
        what: What an index stands for: "source", "target".
        index: ``[E]`` integers.
        count: How many there are to point to.

    Raises:
        IndexError: An index is outside. In a compiled function, where values are not known, the error is PyTorch's
            assertion, at run time; so it is while a CUDA graph is captured.
    """
    if index.device.type == "meta" or index.shape[0] == 0:
        return
    if torch.compiler.is_compiling() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        low, high = torch.aminmax(index)
        # Without the count: a symbolic size in a text would compile the function anew for every size.
        torch._assert_async((low >= 0) & (high < count), f"{name}: expected every {what} to be one of the nodes")
        return
    if not has_values(index):
        return
    smallest, largest = (int(value) for value in torch.aminmax(index))
    if smallest >= 0 and largest < count:
        return
    edge = int(((index < 0) | (index >= count)).nonzero()[0])
    raise IndexError(f"{name}: expected every {what} in [0, {count}), got {int(index[edge])} at edge {edge}.")


def check_route(task: object, x: Tensor) -> None:
    """The task of each row, but for the values: a dense int64 vector on the device of ``x``.

    Raises:
        TypeError: No tensor, not strided, or of another dtype.
        ValueError: Another shape or device.
    """
    if not isinstance(task, Tensor) or task.layout is not torch.strided:
        raise TypeError(f"task: expected a dense int64 tensor [N], got {type(task).__name__}.")
    if task.dtype != torch.int64:
        raise TypeError(f"task: expected int64 indices, got {task.dtype}.")
    if task.dim() != 1 or task.shape[0] != x.shape[0]:
        raise ValueError(f"task: expected shape [{x.shape[0]}], one index per row of x, got {list(task.shape)}.")
    if task.device != x.device:
        raise ValueError(f"task: expected the device of x, {x.device}, got {task.device}.")


def check_route_values(task: Tensor, count: int) -> None:
    """Tasks in ``[0, count)``.

    Raises:
        IndexError: One is outside. In a compiled function, where values are not known, the error is PyTorch's
            assertion, at run time.
    """
    if task.shape[0] == 0 or task.device.type == "meta":
        return
    outside = (task < 0) | (task >= count)
    if torch.compiler.is_compiling():
        torch._assert_async(~outside.any(), f"task: expected indices in [0, {count})")
    elif has_values(task) and bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise IndexError(f"task: expected indices in [0, {count}), got {int(task[row])} in row {row}.")


def can_be_checked(t: Tensor) -> bool:
    """Whether values can be looked at, now or, in a compiled function, when it runs."""
    return t.device.type != "meta" if torch.compiler.is_compiling() else has_values(t)


def has_values(t: Tensor) -> bool:
    """Whether Python may look at the values: not for fake tensors, and not inside the transforms of torch.func."""
    return not (
        t.device.type == "meta" or isinstance(t, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )
