r"""One linear layer per group of rows, with inputs of different widths, side by side in one buffer.

For groups :math:`X_t` of shape ``[N_t, F_t]`` with weights :math:`W_t` of shape ``[C, F_t]``:

.. math::
    Y = \begin{pmatrix} X_1 W_1^\top + \mathbf{1} b_1^\top \\ \vdots \\ X_T W_T^\top + \mathbf{1} b_T^\top \end{pmatrix}
    \qquad
    \frac{\partial L}{\partial X_t} = G_t W_t, \quad
    \frac{\partial L}{\partial W_t} = G_t^\top X_t, \quad
    \frac{\partial L}{\partial b_t} = \sum_n G_{t,n}

with :math:`G_t` the rows of :math:`\partial L / \partial Y` of group :math:`t`. The groups write their rows of one
result: nothing is concatenated. Derivatives of higher order are those of the reference.

Products of float32, bfloat16 and float16 are summed in float32, those of float64 in float64. Results are bitwise equal
at any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._aggregate import again, differentiable
from ._checks import DTYPES, check_floating, check_same
from ._dispatch import LIBRARY, autocast_to, autocasts, register_shapes, runs_fused, transformed

_NAME = "torch_mtl_pyg::grouped_linear"


def grouped_linear(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """Computes ``x_t @ weight_t.T + bias_t`` for all groups, their rows below each other.

    Args:
        xs: Inputs ``[N_t, F_t]`` of the ``T`` groups, any strides. float32, float64, bfloat16 or float16.
        weights: Weights ``[C, F_t]``, of the dtype and device of ``xs[0]``.
        bias: Biases ``[T, C]``, or None.

    Under autocast, floating-point arguments but for float64 are cast to its dtype first, as for a linear layer. Inside
    the transforms of ``torch.func`` and in forward mode, plain PyTorch computes the op.

    Returns:
        ``[N_1 + ... + N_T, C]``, contiguous, of the dtype of ``xs[0]``.

    Raises:
        TypeError: An argument is no dense tensor of a supported dtype, no sequence of these, or the dtypes differ.
        ValueError: There is no group, or numbers of groups, shapes or devices do not fit.
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    xs, weights = _sequence("xs", xs, "[N_t, F_t]"), _sequence("weights", weights, "[C, F_t]")
    if not weights:
        raise ValueError("weights: expected at least one group, got none.")
    if len(xs) != len(weights):
        raise ValueError(f"xs: expected {len(weights)} groups, as many as weights, got {len(xs)}.")
    fits = not torch.compiler.is_compiling() and _fit(xs, weights)
    if not fits:
        _check_shapes(xs, weights)
    if bias is not None:
        check_floating("bias", bias, 2, "[T, {}]", weights[0], 0)
        if bias.shape[0] != len(weights):
            raise ValueError(f"bias: expected {len(weights)} rows, one per group, got shape {list(bias.shape)}.")
    device = xs[0].device.type
    if autocasts(device):
        xs, weights = autocast_to(device, *xs), autocast_to(device, *weights)  # type: ignore[assignment]
        (bias,) = autocast_to(device, bias)
    if not fits:
        for t, (x, weight) in enumerate(zip(xs, weights, strict=True)):
            check_same(f"xs[{t}]", x, f"weights[{t}]", weight)
            check_same(f"weights[{t}]", weight, "weights[0]", weights[0])
    if bias is not None:
        check_same("bias", bias, "weights[0]", weights[0])
    if not runs_fused(device, "grouped_linear") or transformed():
        return reference.grouped_linear(xs, weights, bias)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.grouped_linear(list(xs), list(weights), bias)
        return result
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (bias, *weights, *xs)):
        result = _GroupedLinear.apply(len(xs), bias, *xs, *weights)  # type: ignore[no-untyped-call]
        return result
    return _forward(xs, weights, bias)


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the ops, torch.compile and export."""
    global _forward_op, _backward_op
    _forward_op = torch.ops.torch_mtl_pyg.grouped_linear.default
    _backward_op = torch.ops.torch_mtl_pyg.grouped_linear_backward.default
    register_shapes("grouped_linear", _meta_forward)
    register_shapes("grouped_linear_backward", _meta_backward)
    torch.library.register_autograd(_NAME, _backward_of_op, setup_context=_save_for_backward)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("grouped_linear", _autocast(key), key)


_forward_op: Any = None
_backward_op: Any = None


def _sequence(name: str, value: object, shape: str) -> Sequence[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of tensors {shape}, got {type(value).__name__}.")
    return value


def _fit(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether all is well, found out fast; if not, the checks say what is wrong."""
    first = weights[0]
    if not isinstance(first, Tensor) or first.dim() != 2:
        return False
    rows, dtype, device = first.shape[0], first.dtype, first.device
    if dtype not in DTYPES:
        return False
    for x, weight in zip(xs, weights, strict=True):
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.dim() != 2 or weight.dim() != 2:
            return False
        if x.dtype is not dtype or weight.dtype is not dtype or weight.shape != (rows, x.shape[1]):
            return False
        if x.device != device or weight.device != device or not (_is_strided(x) and _is_strided(weight)):
            return False
    return True


def _is_strided(t: Tensor) -> bool:
    return t.layout is torch.strided


def _check_shapes(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for t, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        check_floating(f"weights[{t}]", weight, 2, "[C, F_t]")
        check_floating(f"xs[{t}]", x, 2, "[N_t, {}]", weight, 1)
        if weight.shape[0] != weights[0].shape[0]:
            raise ValueError(
                f"weights[{t}]: expected {weights[0].shape[0]} rows, as weights[0] has, got shape {list(weight.shape)}."
            )


def _forward(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _forward_op(list(xs), list(weights), bias)
    return result


# ---- Shapes.


def _meta_forward(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return xs[0].new_empty(sum(x.shape[0] for x in xs), weights[0].shape[0])


def _meta_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    need_xs: Sequence[bool],
    need_weights: Sequence[bool],
    need_bias: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return (
        [x.new_empty(x.shape if need else (0,)) for x, need in zip(xs, need_xs, strict=True)],
        [w.new_empty(w.shape if need else (0,)) for w, need in zip(weights, need_weights, strict=True)],
        grad.new_empty((len(xs), grad.shape[1]) if need_bias else (0,)),
    )


# ---- Derivatives.

_Gradients = tuple[list[Tensor | None], list[Tensor | None], Tensor | None]


def _gradients(
    grad: Tensor,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    need_xs: Sequence[bool],
    need_weights: Sequence[bool],
    need_bias: bool,
) -> _Gradients:
    """The gradients; None where not needed. Differentiable where autograd records."""
    count = len(xs)
    if differentiable((grad,)) and not torch.compiler.is_compiling():

        def run_again(*flat: Tensor | None) -> Tensor:
            own, *others = flat
            return reference.grouped_linear(others[:count], others[count:], own)  # type: ignore[arg-type]

        flat = again(run_again, (bias, *xs, *weights), (need_bias, *need_xs, *need_weights), grad)
        return list(flat[1 : 1 + count]), list(flat[1 + count :]), flat[0]
    with torch._C._AutoDispatchBelowAutograd():
        dxs, dws, db = _backward_op(grad, list(xs), list(weights), list(need_xs), list(need_weights), need_bias)
    return (
        [d if need else None for d, need in zip(dxs, need_xs, strict=True)],
        [d if need else None for d, need in zip(dws, need_weights, strict=True)],
        db if need_bias else None,
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    xs, weights, bias = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(bias, *xs, *weights)


def _backward_of_op(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    bias, *flat = ctx.saved_tensors
    need_xs, need_weights, need_bias = ctx.needs_input_grad
    # A list none of whose tensors needs a gradient comes as one False.
    need_xs = [False] * ctx.count if need_xs is False else list(need_xs)
    need_weights = [False] * ctx.count if need_weights is False else list(need_weights)
    return _gradients(grad, flat[: ctx.count], flat[ctx.count :], bias, need_xs, need_weights, need_bias)


class _GroupedLinear(torch.autograd.Function):
    # A setup_context of its own would only serve torch.func, see multi_head_linear.py.
    @staticmethod
    def forward(ctx: Any, count: int, bias: Tensor | None, *flat: Tensor) -> Tensor:
        xs, weights = flat[:count], flat[count:]
        _save_for_backward(ctx, (xs, weights, bias), None)
        return _forward(xs, weights, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias, *flat = ctx.saved_tensors
        n = ctx.count
        need = ctx.needs_input_grad
        dxs, dws, db = _gradients(grad, flat[:n], flat[n:], bias, need[2 : 2 + n], need[2 + n :], need[1])
        return None, db, *dxs, *dws


# ---- Autocast.


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        device = xs[0].device.type
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = torch.ops.torch_mtl_pyg.grouped_linear(
                autocast_to(device, *xs), autocast_to(device, *weights), *autocast_to(device, bias)
            )
        return result

    return cast
