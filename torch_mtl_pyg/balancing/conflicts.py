"""How much tasks conflict over several steps, from their Gramians."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cosine import task_cosine

Floats = NDArray[np.float64]
Gramians = Tensor | Sequence[Tensor]


def as_matrices(gramians: Gramians) -> Sequence[Tensor]:
    """The matrices ``[T, T]`` of ``S`` steps.

    Raises:
        TypeError: ``gramians`` is neither a tensor nor a sequence of tensors.
        ValueError: They are no square matrices of one size, or there is none.
    """
    if isinstance(gramians, Tensor):
        gramians = gramians.unbind() if gramians.dim() == 3 else [gramians]
    if not isinstance(gramians, Sequence) or not all(isinstance(g, Tensor) for g in gramians):
        raise TypeError(f"gramians: expected a tensor or a sequence of tensors, got {type(gramians).__name__}.")
    shapes = {tuple(g.shape) for g in gramians}
    if len(shapes) != 1 or len(shape := max(shapes)) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"gramians: expected matrices [T, T] of one size, got shapes {sorted(shapes)}.")
    return gramians


def mean_cosine(gramians: Sequence[Tensor]) -> Floats:
    """``[T, T]``: the mean over the steps in which both tasks have a gradient, NaN for pairs that never have."""
    return mean_of(map(_cosines, gramians))


def conflicting_share(gramian: Tensor) -> float:
    """The share of pairs of tasks whose cosine is below 0, of those with a gradient; NaN if there are none."""
    cosines = _cosines(gramian)[np.triu_indices(len(gramian), 1)]
    number = np.isfinite(cosines).sum()
    return float((cosines < 0).sum() / number) if number else math.nan


def mean_of(arrays: Iterable[Floats]) -> Floats:
    """The mean of arrays, without NaN; NaN where there is nothing else."""
    total, number = np.zeros(()), np.zeros(())
    for array in arrays:
        total, number = total + np.nan_to_num(array), number + np.isfinite(array)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _cosines(gramian: Tensor) -> Floats:
    """``[T, T]``, NaN where one of two tasks has no gradient."""
    cosines = task_cosine(gramian.detach().cpu().double())
    has = cosines.diagonal() == 1
    return np.asarray(torch.where(has.unsqueeze(0) & has.unsqueeze(1), cosines, float("nan")).numpy())
