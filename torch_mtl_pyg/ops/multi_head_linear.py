r"""All linear heads of a shared embedding in one launch.

With the heads' weights packed below each other, :math:`W` of shape ``[K, D]``, :math:`K = \sum_t C_t`:

.. math::
    Y = X W^\top + b \qquad
    \frac{\partial L}{\partial X} = G W, \quad
    \frac{\partial L}{\partial W} = G^\top X, \quad
    \frac{\partial L}{\partial b_k} = \sum_n G_{nk}, \qquad G = \frac{\partial L}{\partial Y}.

The backward is an op of its own, bilinear in its arguments. For cotangents :math:`A, B, c` of its three results,
its own gradients are again these two ops, so derivatives of any order exist:

.. math::
    \bar G = A W^\top + X B^\top + \mathbf{1} c^\top, \quad \bar X = G B, \quad \bar W = G^\top A.

Products of float32, bfloat16 and float16 are summed in float32, those of float64 in float64. Results are bitwise equal
at any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import check_floating, check_same
from ._dispatch import autocast_to, runs_fused

_NAME = "torch_mtl_pyg::multi_head_linear"
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def multi_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ weight.T + bias`` for the packed weights of all heads.

    Args:
        x: Shared embedding ``[N, D]``, any strides. float32, float64, bfloat16 or float16.
        weight: Packed weights ``[K, D]``, of the dtype and device of ``x``.
        bias: Packed biases ``[K]``, or None.

    Under autocast, floating-point arguments but for float64 are cast to its dtype first, as for a linear layer. Inside
    the transforms of ``torch.func`` (vmap, jvp, ...), plain PyTorch computes the op, since it has rules for them.

    Returns:
        ``[N, K]``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError: An argument is no dense tensor of a supported dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    check_floating("weight", weight, 2, "[K, D]")
    check_floating("x", x, 2, "[N, {}]", weight, 1)
    if bias is not None:
        check_floating("bias", bias, 1, "[{}]", weight, 0)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        x, weight, bias = autocast_to(device, x, weight, bias)  # type: ignore[assignment]
    check_same("x", x, "weight", weight)
    if bias is not None:
        check_same("bias", bias, "weight", weight)
    if not runs_fused(device) or torch._C._are_functorch_transforms_active():
        return reference.multi_head_linear(x, weight, bias)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.multi_head_linear(x, weight, bias)
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        # The same derivatives as those registered below, without the dispatcher's detour through Python.
        result = _MultiHeadLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, weight, bias)


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the ops, torch.compile and export."""
    torch.library.register_fake(_NAME, _fake_forward)
    torch.library.register_fake(f"{_NAME}_backward", _fake_backward)
    torch.library.register_autograd(_NAME, _backward_of_forward, setup_context=_save_for_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _backward_of_backward, setup_context=_save_for_double_backward)
    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl("multi_head_linear", _autocast(key), key)


_LIBRARY = torch.library.Library("torch_mtl_pyg", "FRAGMENT")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.torch_mtl_pyg.multi_head_linear.default(x, weight, bias)
    return result


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients; those not needed are empty. Differentiable itself where autograd records."""
    if torch.is_grad_enabled() and (grad.requires_grad or x.requires_grad or weight.requires_grad):
        if torch.compiler.is_compiling():
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_mtl_pyg.multi_head_linear_backward(
                grad, x, weight, need_x, need_weight, need_bias
            )
            return result
        result = _MultiHeadLinearBackward.apply(grad, x, weight, need_x, need_weight, need_bias)  # type: ignore[no-untyped-call]
        return result
    with torch._C._AutoDispatchBelowAutograd():
        result = torch.ops.torch_mtl_pyg.multi_head_linear_backward.default(
            grad, x, weight, need_x, need_weight, need_bias
        )
    return result


# ---- Shapes.


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        x.new_empty(weight.shape) if need_weight else x.new_empty(0),
        x.new_empty(weight.shape[0]) if need_bias else x.new_empty(0),
    )


# ---- Derivatives.


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward_of_forward(ctx: Any, grad: Tensor) -> _Grads:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _backward(grad, x, weight, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))  # type: ignore[return-value]


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.needs = inputs[3:]
    ctx.set_materialize_grads(False)


def _backward_of_backward(
    ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad, x, weight = ctx.saved_tensors
    # A result that was not needed is an empty tensor: no gradient comes from it.
    of_x, of_weight, of_bias = (
        g if need else None for g, need in zip((of_x, of_weight, of_bias), ctx.needs, strict=True)
    )
    to_grad: Tensor | None = None
    to_x: Tensor | None = None
    to_weight: Tensor | None = None
    if ctx.needs_input_grad[0]:
        if of_x is not None:
            to_grad = multi_head_linear(of_x, weight, of_bias)
        if of_weight is not None:
            term = multi_head_linear(x, of_weight, of_bias if of_x is None else None)
            to_grad = term if to_grad is None else to_grad + term
        if of_x is None and of_weight is None and of_bias is not None:
            to_grad = of_bias.expand_as(grad)
    if ctx.needs_input_grad[1] and of_weight is not None:
        to_x = _backward(grad, x, of_weight, True, False, False)[0]
    if ctx.needs_input_grad[2] and of_x is not None:
        to_weight = _backward(grad, of_x, weight, False, True, False)[1]
    return to_grad, to_x, to_weight, None, None, None


# A setup_context of their own would only serve torch.func, and cost these two 50 microseconds a call.


class _MultiHeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _save_for_backward(ctx, (x, weight, bias), None)
        return _forward(x, weight, bias)

    backward = staticmethod(_backward_of_forward)


class _MultiHeadLinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        _save_for_double_backward(ctx, args, None)
        return _backward(*args)

    backward = staticmethod(_backward_of_backward)


# ---- Autocast.


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = torch.ops.torch_mtl_pyg.multi_head_linear(*autocast_to(x.device.type, x, weight, bias))
        return result

    return cast
