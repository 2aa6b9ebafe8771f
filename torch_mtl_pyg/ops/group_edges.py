r"""The edges of a graph, grouped by one of their ends.

A stable sort of the edges :math:`e = (k_e, o_e)` by the key :math:`k_e \in [0, n)`: the edges of key ``k`` lie at
``ptr[k]`` to ``ptr[k + 1]``, in the order in which they came; ``index`` holds their other ends, ``perm`` their former
places. Grouped by target, this is the compressed sparse row form of the transposed adjacency matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..task import checked_integer
from . import reference_graph
from ._checks import check_indices, check_range


def group_edges(key: Tensor, other: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups edges by one end.

    Args:
        key: ``[E]`` int64, the end to group by, in ``[0, num_keys)``.
        other: ``[E]`` int64, the other end.
        num_keys: How many keys there are, also such without an edge.

    Returns:
        ``ptr [num_keys + 1]``, ``index [E] = other[perm]`` and ``perm [E]``, all int64.

    Raises:
        TypeError: An argument is no int64 tensor, or ``num_keys`` no int.
        ValueError: A shape or a device does not fit, or ``num_keys`` is negative.
        IndexError: A key is not in ``[0, num_keys)``.
    """
    check_indices("key", key)
    check_indices("other", other)
    num_keys = checked_integer("num_keys", num_keys)
    if num_keys < 0:
        raise ValueError(f"num_keys: expected at least 0, got {num_keys}.")
    if other.shape != key.shape:
        raise ValueError(f"other: expected shape {list(key.shape)}, that of key, got {list(other.shape)}.")
    if other.device != key.device:
        raise ValueError(f"other: expected the device of key, {key.device}, got {other.device}.")
    check_range("key", "key", key, num_keys)
    return group_checked(key, other, num_keys)


def group_checked(key: Tensor, other: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same for arguments that are known to be right, as those of an :class:`~torch_mtl_pyg.adjacency.Adjacency`."""
    with torch.no_grad():
        return reference_graph.group_edges(key, other, num_keys)
