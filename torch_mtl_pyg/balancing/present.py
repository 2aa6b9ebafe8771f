"""Batches in which some tasks have no labels: what a method sees of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def call_on(method: nn.Module, stat: Tensor, present: Tensor, count: int) -> Tensor:
    """Calls a method that has no memory on some of its tasks.

    Where it holds one number per task (parameters, buffers and public attributes of shape ``[count]``: log-variances,
    preferences, reference points), it sees those of the tasks that are present.

    Args:
        method: A weighting or a scalarizer.
        stat: What it is fed, of the tasks that are present.
        present: Their indices.
        count: How many tasks there are.
    """
    if present.numel() == count:
        out: Tensor = method(stat)
        return out
    named = [*method.named_parameters(), *method.named_buffers()]
    seen = {name: value[present.to(value.device)] for name, value in named if value.shape == (count,)}
    attributes = [
        (module, name, value)
        for module in method.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not name.startswith("_") and value.shape == (count,)
    ]
    try:
        for module, name, value in attributes:
            setattr(module, name, value[present.to(value.device)])
        out = torch.func.functional_call(method, seen, (stat,))
    finally:
        for module, name, value in attributes:
            setattr(module, name, value)
    return out


def remembered(values: Tensor, present: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers for the tasks that are absent: as last seen, or, if never seen, the mean of those present.

    Args:
        values: ``[n]``, one number per task.
        present: Bool ``[n]``.
        last: ``[n]``, the numbers as last seen, NaN if never; or None.

    Returns:
        ``values`` with the absent ones filled, and the new ``last``.
    """
    values = values.detach()
    if last is None:
        last = torch.full_like(values, float("nan"))
    last = torch.where(present, values, last.to(values))
    return torch.where(last.isnan(), values[present].mean(), last), last


def filled_gramian(gramian: Tensor, present: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The Gramian, in which absent tasks are orthogonal to all others, of the size they had when last seen."""
    squares, last = remembered(gramian.diagonal().abs(), present, last)
    inside = present.unsqueeze(0) & present.unsqueeze(1)
    return torch.where(inside, gramian, torch.diag(squares)), last


def filled_jacobian(jacobian: Tensor, present: Tensor) -> Tensor:
    """The Jacobian, in which absent tasks have the root mean square of the rows that are present."""
    row = jacobian[present].square().mean(0).sqrt()
    return torch.where(present.unsqueeze(1), jacobian, row)


def factor_of(gramian: Tensor) -> Tensor:
    """A square matrix ``R`` with ``R R^T`` the Gramian."""
    values, vectors = torch.linalg.eigh(gramian.double())
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor.to(gramian.dtype)


def unit_scale(gramian: Tensor) -> Tensor:
    """The Gramian divided by its mean diagonal, so that small gradients do not fall under an absolute bound."""
    mean = gramian.diagonal().mean()
    return gramian / torch.where(mean > 0, mean, 1.0)
