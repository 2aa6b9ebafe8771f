r"""The edges of a graph in the order of one of their ends: compressed rows (CSR) from pairs (COO).

For keys :math:`k_e` and other ends :math:`o_e` of the edges :math:`e = 0, \ldots, E - 1`, the permutation
:math:`\pi` sorts the edges by :math:`(k_e, e)`, that is, stably by key, and

.. math::
    \mathrm{perm}_i = \pi(i), \qquad \mathrm{index}_i = o_{\pi(i)}, \qquad
    \mathrm{ptr}_j = \left|\{e : k_e < j\}\right| .

The edges of key :math:`j` are those from :math:`\mathrm{ptr}_j` to :math:`\mathrm{ptr}_{j+1}`. The result is unique,
so every backend returns the same at any number of threads. The compiled op is a counting sort, linear in the number of
edges and keys; nothing is differentiable.

On CUDA devices there is no op of our own: PyTorch's stable radix sort and binary searches for ``ptr`` are the compiled
form there, with every backend. The pointers do not come from counts (``bincount``), whose size the host would wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference_graph
from ._checks import check_same, has_values
from ._dispatch import register_shapes, runs_fused

Grouped = tuple[Tensor, Tensor, Tensor]


def group_edges(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> Grouped:
    """Groups edges by key, in their own order within a key.

    Args:
        key: The end to group by, ``[E]``, any stride. int64 or int32.
        other: The other end ``[E]``, of the dtype and device of ``key``.
        num_keys: Keys are in ``[0, num_keys)``.
        num_others: Other ends are in ``[0, num_others)``.

    Where the edges come grouped already, ``perm`` counts from 0: shapes depend on no value. Inside ``torch.compile``,
    values are checked when the compiled op runs, which reports them as a RuntimeError; plain PyTorch does not check
    them there. On CUDA devices the check waits for the device, but while a CUDA graph is captured, where it is an
    assertion on the device.

    Returns:
        ``ptr`` ``[num_keys + 1]``, ``index`` ``[E]`` and ``perm`` ``[E]``, contiguous, int64.

    Raises:
        TypeError: An end is no dense tensor of int64 or int32, the dtypes differ, or a size is no integer.
        ValueError: Shapes or devices do not fit, or a size is negative.
        IndexError: An end is out of range.
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    _check_end("key", key)
    _check_end("other", other, key)
    _check_size("num_keys", num_keys)
    _check_size("num_others", num_others)
    device = key.device.type
    if device == "cuda":
        return _on_cuda(key, other, num_keys, num_others)
    if not runs_fused(device, "group_edges"):
        if device != "meta" and not torch.compiler.is_compiling():
            _check_values(key, other, num_keys, num_others)
        return reference_graph.group_edges(key, other, num_keys)
    result: Grouped
    if torch.compiler.is_compiling():
        result = torch.ops.torch_mtl_pyg.group_edges(key, other, num_keys, num_others)
        return result
    try:
        with torch._C._AutoDispatchBelowAutograd():
            result = _op(key, other, num_keys, num_others)
    except RuntimeError:
        # The op has found a value out of range, and here it is named.
        if device != "meta":
            _check_values(key, other, num_keys, num_others)
        raise
    return result


def _on_cuda(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> Grouped:
    if torch.compiler.is_compiling() or not has_values(key):
        pass
    elif torch.cuda.is_current_stream_capturing():
        torch._assert_async(~_out_of_range(key, other, num_keys, num_others).any(), "key, other: values out of range")
    else:
        _check_values(key, other, num_keys, num_others)
    return reference_graph.group_edges(key, other, num_keys)


def register() -> None:
    """Registers shapes for fake tensors, torch.compile and export."""
    global _op
    _op = torch.ops.torch_mtl_pyg.group_edges.default
    register_shapes("group_edges", _meta)


# The loaded op, looked up once.
_op: Any = None


def _meta(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> Grouped:
    edges = key.shape[0]
    return (
        key.new_empty(num_keys + 1, dtype=torch.int64),
        key.new_empty(edges, dtype=torch.int64),
        key.new_empty(edges, dtype=torch.int64),
    )


# ---- Checks.


def _check_end(name: str, value: object, key: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {_shape(key)}, got {type(value).__name__}.")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}.")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {str(value.dtype).removeprefix('torch.')}.")
    if value.dim() != 1 or (key is not None and value.shape[0] != key.shape[0]):
        raise ValueError(f"{name}: expected shape {_shape(key)}, got {list(value.shape)}.")
    if key is not None:
        check_same(name, value, "key", key)


def _shape(key: Tensor | None) -> str:
    # Only for messages: torch.compile would take a size that is formatted for a constant.
    return "[E]" if key is None else f"[{key.shape[0]}]"


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}.")
    if value < 0:
        raise ValueError(f"{name}: expected a size of at least 0, got {value}.")


def _check_values(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> None:
    """Raises for the first edge with an end out of range."""
    bad = _out_of_range(key, other, num_keys, num_others).nonzero()
    if bad.numel():
        edge = int(bad[0])
        bad_key = not 0 <= int(key[edge]) < num_keys
        name, values, size = ("key", key, num_keys) if bad_key else ("other", other, num_others)
        raise IndexError(f"{name}: expected values in [0, {size}), got {int(values[edge])} at edge {edge}.")


def _out_of_range(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> Tensor:
    return (key < 0) | (key >= num_keys) | (other < 0) | (other >= num_others)
