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

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import reference
from ._dispatch import (
    LIBRARY,
    REFUSALS,
    autocast_to,
    is_batched,
    is_plain_call,
    prepare,
    records,
    register_shapes,
    transformed,
)

_NAME = "torch_mtl_pyg::multi_head_linear"
_Result = TypeVar("_Result")
_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def multi_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ weight.T + bias`` for the packed weights of all heads.

    Args:
        x: Shared embedding ``[N, D]``, any strides. float32, float64, bfloat16 or float16.
        weight: Packed weights ``[K, D]``, of the dtype and device of ``x``.
        bias: Packed biases ``[K]``, or None.

    Under autocast, floating-point arguments but for float64 are cast to its dtype first, as for a linear layer. Inside
    the transforms of ``torch.func`` (vmap, jvp, ...), for batched gradients and in forward mode, plain PyTorch computes
    the op, since it has rules for them.

    Returns:
        ``[N, K]``, contiguous, of the dtype of ``x``.

    Raises:
        TypeError: An argument is no dense tensor of a supported dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    if is_plain_call(x, "multi_head_linear"):
        return _checked_by_op(_linear, x, weight, bias, True)
    return _linear(*prepare(x, weight, bias, "multi_head_linear"))


def multi_head_linear_split(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The same, split into the heads' columns: views of one buffer.

    The backward reads the heads' gradients where they lie, while that of a split would first copy them into one tensor.

    Args:
        x: As for :func:`multi_head_linear`.
        weight: As for :func:`multi_head_linear`.
        bias: As for :func:`multi_head_linear`.
        widths: Columns of each head; their sum is ``K``.

    Returns:
        ``[N, widths[t]]`` for each ``t``.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`multi_head_linear`.
    """
    if is_plain_call(x, "multi_head_linear"):
        return _checked_by_op(_split, x, weight, bias, widths)
    x, weight, bias, fused = prepare(x, weight, bias, "multi_head_linear")
    if fused and not torch.compiler.is_compiling():
        return _split(x, weight, bias, widths)
    return torch.split_with_sizes(_linear(x, weight, bias, fused), widths, 1)


def _checked_by_op(
    compute: Callable[..., _Result], x: Tensor, weight: Tensor, bias: Tensor | None, last: object
) -> _Result:
    """What `compute` makes of the arguments; if the op refuses one, the precise error for it."""
    try:
        return compute(x, weight, bias, last)
    except REFUSALS as error:
        refused = error
    prepare(x, weight, bias, "multi_head_linear")
    raise refused


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the ops, torch.compile and export."""
    global _forward_op, _backward_op
    _forward_op = torch.ops.torch_mtl_pyg.multi_head_linear.default
    _backward_op = torch.ops.torch_mtl_pyg.multi_head_linear_backward.default
    # As kernels for meta tensors, which fake tensors use too: register_fake would look for the line of this call in the
    # source of every loaded module, at 50 ms.
    register_shapes("multi_head_linear", _meta_forward)
    register_shapes("multi_head_linear_backward", _meta_backward)
    torch.library.register_autograd(_NAME, _backward_of_forward, setup_context=_save_for_backward)
    torch.library.register_autograd(f"{_NAME}_backward", _backward_of_backward, setup_context=_save_for_double_backward)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("multi_head_linear", _autocast(key), key)


# The loaded ops, looked up once: the way through torch.ops costs a microsecond a call.
_forward_op: Any = None
_backward_op: Any = None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
    if not fused:
        return reference.multi_head_linear(x, weight, bias)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.multi_head_linear(x, weight, bias)
        return result
    if records(x, weight, bias):
        # The same derivatives as those registered below, without the dispatcher's detour through Python.
        result = _MultiHeadLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _forward(x, weight, bias)


def _split(x: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    if records(x, weight, bias):
        outputs: tuple[Tensor, ...] = _MultiHeadLinearSplit.apply(widths, x, weight, bias)  # type: ignore[no-untyped-call]
        return outputs
    return torch.split_with_sizes(_forward(x, weight, bias), widths, 1)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = _forward_op(x, weight, bias)
    return result


def _backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients; those not needed are empty. Differentiable itself where autograd records.

    ``grads`` holds the gradient ``G``, or its columns in several matrices.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*grads, x, weight)):
        grad = grads[0] if len(grads) == 1 else torch.cat(tuple(grads), dim=1)
        if torch.compiler.is_compiling():
            result: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_mtl_pyg.multi_head_linear_backward(
                [grad], x, weight, need_x, need_weight, need_bias
            )
            return result
        result = _MultiHeadLinearBackward.apply(grad, x, weight, need_x, need_weight, need_bias)  # type: ignore[no-untyped-call]
        return result
    with torch._C._AutoDispatchBelowAutograd():
        result = _backward_op(grads, x, weight, need_x, need_weight, need_bias)
    return result


# ---- Shapes.


def _meta_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _meta_backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
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
    return _gradients((grad,), *ctx.saved_tensors, *ctx.needs_input_grad)


def _gradients(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> _Grads:
    if transformed() or any(map(is_batched, grads)):
        return reference.multi_head_linear_backward(grads, x, weight, need_x, need_weight, need_bias)
    dx, dw, db = _backward(grads, x, weight, need_x, need_weight, need_bias)
    return dx if need_x else None, dw if need_weight else None, db if need_bias else None


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grads, x, weight, *needs = inputs
    ctx.widths = [g.shape[1] for g in grads]
    ctx.save_for_backward(*grads, x, weight)
    ctx.needs = needs
    ctx.set_materialize_grads(False)


def _backward_of_backward(
    ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
) -> tuple[Any, ...]:
    *grads, x, weight = ctx.saved_tensors
    # A result that was not needed is an empty tensor: no gradient comes from it.
    of_x, of_weight, of_bias = (
        g if need else None for g, need in zip((of_x, of_weight, of_bias), ctx.needs, strict=True)
    )
    to_grads: Any = [None] * len(grads)
    to_x: Tensor | None = None
    to_weight: Tensor | None = None
    need_grads, need_x, need_weight = ctx.needs_input_grad[:3]
    if need_grads is True or (need_grads is not False and any(need_grads)):
        total: Tensor | None = None
        if of_x is not None:
            total = multi_head_linear(of_x, weight, of_bias)
        if of_weight is not None:
            term = multi_head_linear(x, of_weight, of_bias if of_x is None else None)
            total = term if total is None else total + term
        if of_x is None and of_weight is None and of_bias is not None:
            total = of_bias.expand(x.shape[0], weight.shape[0])
        if total is not None:
            to_grads = list(torch.split_with_sizes(total, ctx.widths, 1))
    if need_x and of_weight is not None:
        to_x = _gradients(grads, x, of_weight, True, False, False)[0]
    if need_weight and of_x is not None:
        to_weight = _gradients(grads, of_x, weight, False, True, False)[1]
    return to_grads, to_x, to_weight, None, None, None


# A setup_context of their own would only serve torch.func, and cost these 50 microseconds a call.


class _MultiHeadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _save_for_backward(ctx, (x, weight, bias), None)
        return _forward(x, weight, bias)

    backward = staticmethod(_backward_of_forward)


class _MultiHeadLinearSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, widths: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        _save_for_backward(ctx, (x, weight, bias), None)
        ctx.widths = widths
        ctx.set_materialize_grads(False)
        return torch.split_with_sizes(_forward(x, weight, bias), widths, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        given = grads
        if any(g is None for g in grads):  # heads that no loss used
            zero = x.new_zeros(1, 1)
            given = tuple(
                zero.expand(x.shape[0], width) if g is None else g for g, width in zip(grads, ctx.widths, strict=True)
            )
        return None, *_gradients(given, x, weight, *ctx.needs_input_grad[1:])  # type: ignore[arg-type]


class _MultiHeadLinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        _save_for_double_backward(ctx, ((grad,), *args), None)
        return _backward((grad,), *args)

    @staticmethod
    def backward(ctx: Any, *of_results: Tensor | None) -> tuple[Any, ...]:
        (to_grad,), *others = _backward_of_backward(ctx, *of_results)
        return to_grad, *others


# ---- Autocast.


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = torch.ops.torch_mtl_pyg.multi_head_linear(*autocast_to(x.device.type, x, weight, bias))
        return result

    return cast
