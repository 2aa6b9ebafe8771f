"""The error model: how far a result may be from the exact one, computed in float64.

The error, relative to the sum of the magnitudes of the terms, must not exceed the error of PyTorch in the same dtype
by more than a few roundings of the accumulator. What a result is rounded to when it is stored is in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDINGS = 8


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of the accumulator of a dtype."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def assert_accurate(
    got: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    same_dtype: Tensor | None = None,
    rounded: Tensor | None = None,
    slack: Tensor | None = None,
) -> None:
    """Checks a result of sums of products.

    Args:
        got: The result under test.
        exact: The same in float64.
        magnitude: The sum of the absolute values of the terms, in float64.
        same_dtype: What PyTorch computes in the dtype of ``got``; None: only storing may round it.
        rounded: The magnitude of the terms that come from an operand rounded to the dtype of ``got`` on the way.
        slack: What may be different besides, in absolute terms.
    """
    assert got.shape == exact.shape
    info = torch.finfo(got.dtype)
    allowed = ROUNDINGS * roundoff(got.dtype)
    # Infinite only where the exact value, give or take what is allowed, rounds to more than the dtype can hold.
    beyond = (exact.abs() + allowed * magnitude >= info.max * (1 + info.eps / 4)) & (got == exact.sign() * torch.inf)
    assert torch.isfinite(got).logical_or(beyond).all()
    stored = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    if rounded is not None:
        stored = stored + rounded * info.eps / 2
    if slack is not None:
        stored = stored + slack
    error = (torch.where(beyond, exact, got.double()).sub(exact).abs() - stored).clamp(min=0)
    scale = magnitude.clamp(min=1e-300)
    if same_dtype is not None:
        # Theirs may overflow on the way, which allows us nothing.
        theirs = (
            torch.where(same_dtype.isfinite(), same_dtype.double(), exact).sub(exact).abs().sub(stored).clamp(min=0)
        )
        allowed += float((theirs / scale).max()) if theirs.numel() else 0.0
    worst = float((error / scale).max()) if error.numel() else 0.0
    assert worst <= allowed, f"error {worst:.3g} of the terms' magnitude, allowed {allowed:.3g}"


def linear_terms(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x W^T + b`` in float64, and the magnitude of its terms."""
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    return exact, magnitude
