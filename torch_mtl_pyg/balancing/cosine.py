"""Cosines between the gradients of tasks."""

from __future__ import annotations

import torch
from torch import Tensor


def task_cosine(gramian: Tensor) -> Tensor:
    r"""Cosines of the angles between the tasks' gradients, from their Gramian.

    .. math::
        c_{ij} = \frac{G_{ij}}{\sqrt{G_{ii} G_{jj}}}

    Below 0, a step along one task's gradient makes the other's loss larger: the two conflict.

    A task without labels in a batch has a zero gradient, which has no angle. Its row and column are 0, also on the
    diagonal. Not NaN, which would spread through every mean over pairs or steps; and not 1 on the diagonal, so that it
    can be told from a task with a gradient, whose diagonal is exactly 1. NaN and Inf in the Gramian give NaN.

    Args:
        gramian: ``[..., T, T]``, inner products of gradients, floating-point.

    Returns:
        ``[..., T, T]``, in :math:`[-1, 1]`, of the dtype of ``gramian``.

    Raises:
        TypeError: ``gramian`` is no floating-point tensor.
        ValueError: It is not ``[..., T, T]``.
    """
    if not isinstance(gramian, Tensor):
        raise TypeError(f"gramian: expected a tensor [..., T, T], got {type(gramian).__name__}.")
    if not gramian.is_floating_point():
        raise TypeError(f"gramian: expected a floating-point tensor, got dtype {gramian.dtype}.")
    if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2]:
        raise ValueError(f"gramian: expected shape [..., T, T], got {list(gramian.shape)}.")
    squares = gramian.diagonal(dim1=-2, dim2=-1)
    has = squares != 0
    norms = torch.where(has, squares, 1.0).sqrt()
    # One division after the other: the product of two norms could leave the range of float16.
    cosines = (gramian / norms.unsqueeze(-1) / norms.unsqueeze(-2)).clamp(-1.0, 1.0)
    cosines = torch.where(has.unsqueeze(-1) & has.unsqueeze(-2), cosines, 0.0)
    own = torch.eye(gramian.shape[-1], dtype=torch.bool, device=gramian.device) & has.unsqueeze(-1) & ~cosines.isnan()
    return torch.where(own, 1.0, cosines)
