r"""Heads with hidden layers in one pass over row tiles, and rows routed to one head each.

Head :math:`t` computes, with its own layers :math:`W^l_t, b^l_t` for :math:`l = 1 \dots L`, an activation
:math:`\varphi` and dropout masks :math:`M^l`,

.. math::
    H^0 = X, \qquad A^l = H^{l-1} W_t^{l\top} + b_t^l, \qquad H^l = M^l \odot \varphi(A^l), \qquad Y_t = A^L .

The layers of all heads lie packed: ``weights[0]`` is ``[T h_1, D]``, one product for all tasks, ``weights[l]`` is
``[T h_{l+1}, h_l]`` and multiplies block by block, the last one ``[K, h_{L-1}]`` with ragged blocks. With one layer the
heads are linear. The backward goes over the same tiles again, and computes their hidden layers again:

.. math::
    \bar A^l = \varphi'(A^l) \odot M^l \odot (\bar A^{l+1} W^{l+1}_t), \quad
    \bar W^l_t = \bar A^{l\top} H^{l-1}, \quad \bar b^l_t = \sum_n \bar A^l_n, \quad
    \bar X = \sum_t \bar A^1_t W^1_t .

Routed, row :math:`n` belongs to the task ``route[n]`` alone: the rows of a task are gathered by tiles, and the work is
proportional to the rows. Nothing of size ``[N, T h]`` is ever made. Sums are kept in float32, those of float64 in
float64; 16-bit hidden units are not rounded. Results are bitwise equal at any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..task import TaskLayout
from . import reference_mlp
from ._aggregate import again, differentiable
from ._checks import check_floating, check_route, check_route_values, check_same
from ._dispatch import LIBRARY, autocast_to, autocasts, register_shapes, runs_fused, transformed
from .loss_table import loss_table
from .reference_mlp import ACTIVATIONS, Hidden

NAME = "torch_mtl_pyg::multi_head_mlp"
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def multi_head_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden = Hidden(),  # noqa: B008 (immutable)
    route: Tensor | None = None,
) -> Tensor:
    """Computes all heads, or each row's own head.

    Args:
        x: Shared embedding ``[N, D]``, any strides. float32, float64, bfloat16 or float16.
        weights: The ``L >= 1`` packed layers, of the dtype and device of ``x``.
        biases: The biases of each layer, a vector with an element for each row of its weight; or empty.
        layout: The tasks.
        hidden: Activation and dropout of the hidden layers.
        route: int64 ``[N]``, the task of each row; or None: every row through every head.

    Returns:
        ``[N, K]``, or routed ``[N, max C_t]`` with zeros in the columns that a row's head does not have.

    Raises:
        TypeError: An argument is no dense tensor of a supported dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit.
        IndexError: A task in ``route`` is not in ``[0, T)``. On a GPU, where nobody waits for the answer, the kernel
            ends instead, as that of an index in PyTorch does.
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    x, weights, biases, fused = prepare(x, weights, biases, layout, route, "multi_head_mlp")
    if not fused:
        return reference_mlp.multi_head_mlp(x, weights, biases, layout, hidden, route)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.multi_head_mlp(
            *packed(x, weights, biases, hidden, route, loss_table(layout).integers), _columns(layout, route)
        )
        return result
    try:
        if recorded(x, weights, biases):
            result = _MultiHeadMLP.apply(  # type: ignore[no-untyped-call]
                layout, hidden, route, (), x, len(weights), *weights, *biases
            )
            return result
        return _forward(x, weights, biases, layout, hidden, route)
    except RuntimeError:
        if route is not None:
            check_route_values(route, len(layout.names))  # the op has refused it
        raise


def multi_head_mlp_split(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], layout: TaskLayout, hidden: Hidden
) -> tuple[Tensor, ...]:
    """All heads as views of one buffer, ``[N, C_t]`` each; the backward reads their gradients where they lie.

    Arguments and errors as for :func:`multi_head_mlp`.
    """
    x, weights, biases, fused = prepare(x, weights, biases, layout, None, "multi_head_mlp")
    if fused and recorded(x, weights, biases) and not torch.compiler.is_compiling():
        outputs: tuple[Tensor, ...] = _MultiHeadMLP.apply(  # type: ignore[no-untyped-call]
            layout, hidden, None, layout.widths, x, len(weights), *weights, *biases
        )
        return outputs
    return torch.split_with_sizes(multi_head_mlp(x, weights, biases, layout, hidden), layout.widths, 1)


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the ops, torch.compile and export."""
    register_shapes("multi_head_mlp", _meta_forward)
    register_shapes("multi_head_mlp_backward", _meta_backward)
    torch.library.register_autograd(NAME, _backward_of_op, setup_context=_save_for_op)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("multi_head_mlp", _autocast(key), key)


# ---- Arguments.


def prepare(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], layout: TaskLayout, route: Tensor | None, op: str
) -> tuple[Tensor, list[Tensor], list[Tensor], bool]:
    """Checks the arguments, casts them under autocast, and tells whether the compiled op computes them."""
    tasks, depth = len(layout.names), len(weights)
    if depth < 1 or len(biases) not in (0, depth):
        raise ValueError(
            f"weights: expected at least one layer, and as many biases or none, got {depth} and {len(biases)}."
        )
    check_floating("weights[0]", weights[0], 2, "[rows, D]")
    check_floating("x", x, 2, "[N, {}]", weights[0], 1)
    before = x.shape[1]
    for i, weight in enumerate(weights):
        check_floating(f"weights[{i}]", weight, 2, f"[rows, {before}]")
        rows = weight.shape[0]
        wrong = rows != layout.total if i == depth - 1 else rows % tasks or rows == 0
        if wrong or weight.shape[1] != before:
            wanted = layout.total if i == depth - 1 else f"a multiple of {tasks}"
            raise ValueError(f"weights[{i}]: expected shape [{wanted}, {before}], got {list(weight.shape)}.")
        before = rows // tasks
    for i, bias in enumerate(biases):
        check_floating(f"biases[{i}]", bias, 1, "[{}]", weights[i], 0)
    device = x.device.type
    weights, biases = list(weights), list(biases)
    if autocasts(device):
        x, *others = autocast_to(device, x, *weights, *biases)  # type: ignore[assignment]
        weights, biases = others[:depth], others[depth:]  # type: ignore[assignment]
    check_same("x", x, "weight", weights[0])
    for i, t in enumerate((*weights, *biases)):
        check_same(f"weights[{i}]" if i < depth else f"biases[{i - depth}]", t, "weights[0]", weights[0])
    fused = runs_fused(device, op) and not transformed()
    if route is not None:
        check_route(route, x)
        if not fused or torch.compiler.is_compiling():  # else the op checks them
            check_route_values(route, tasks)
    return x, weights, biases, fused


def packed(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    hidden: Hidden,
    route: Tensor | None,
    integers: Tensor,
) -> tuple[Any, ...]:
    """The arguments as the compiled ops take them; ``integers``: of the tasks' :class:`.loss_table.LossTable`."""
    return x, list(weights), list(biases), route, integers, hidden.seed, CODES[hidden.act], hidden.dropout


def recorded(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether autograd has to know of the op."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases))


def split_parameters(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the parameters from one vector, as views."""
    parts = torch.split_with_sizes(flat, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


# ---- The compiled ops.


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden,
    route: Tensor | None,
) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.torch_mtl_pyg.multi_head_mlp(
            *packed(x, weights, biases, hidden, route, loss_table(layout).integers), _columns(layout, route)
        )
    return result


def _columns(layout: TaskLayout, route: Tensor | None) -> int:
    return layout.total if route is None else max(layout.widths)


class _MultiHeadMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: TaskLayout,
        hidden: Hidden,
        route: Tensor | None,
        widths: tuple[int, ...],
        x: Tensor,
        depth: int,
        *parameters: Tensor,
    ) -> Any:
        out = _forward(x, parameters[:depth], parameters[depth:], layout, hidden, route)
        ctx.layout, ctx.hidden, ctx.widths, ctx.depth = layout, hidden, widths, depth
        ctx.save_for_backward(x, route, *parameters)
        ctx.set_materialize_grads(False)
        return torch.split_with_sizes(out, widths, 1) if widths else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, route, *parameters = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[4], ctx.needs_input_grad[6:]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if differentiable(grads):
            given = [
                x.new_zeros(x.shape[0], width) if g is None else g
                for g, width in zip(grads, ctx.widths or (0,), strict=True)
            ]

            def run_again(x: Tensor, *parameters: Tensor) -> Tensor:
                weights, biases = parameters[: ctx.depth], parameters[ctx.depth :]
                return reference_mlp.multi_head_mlp(x, weights, biases, ctx.layout, ctx.hidden, route)

            grad = given[0] if len(given) == 1 else torch.cat(given, 1)
            dx, *others = again(run_again, (x, *parameters), (need_x, *need), grad)
            return None, None, None, None, dx, None, *others
        if ctx.widths and any(g is None for g in grads):  # heads that no loss used
            zero = x.new_zeros(1, 1)
            grads = tuple(
                zero.expand(x.shape[0], width) if g is None else g for g, width in zip(grads, ctx.widths, strict=True)
            )
        with torch._C._AutoDispatchBelowAutograd():
            integers = loss_table(ctx.layout).integers
            arguments = packed(x, parameters[: ctx.depth], parameters[ctx.depth :], ctx.hidden, route, integers)
            dx, flat = torch.ops.torch_mtl_pyg.multi_head_mlp_backward(list(grads), *arguments, need_x, any(need))
        own = split_parameters(flat, parameters) if any(need) else parameters
        return (
            *(None,) * 4,
            dx if need_x else None,
            None,
            *(g if needed else None for g, needed in zip(own, need, strict=True)),
        )  # fmt: skip


# ---- What PyTorch knows of the ops.


def _meta_forward(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], others[-1])


def _meta_backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    route: Tensor | None,
    integers: Tensor,
    seed: Tensor | None,
    act: int,
    dropout: float,
    need_x: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor]:
    numbers = sum(p.numel() for p in (*weights, *biases)) if need_parameters else 0
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(numbers)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, route, integers, seed, ctx.act, ctx.dropout, _ = inputs
    ctx.depth, ctx.count = len(weights), len(biases)
    ctx.save_for_backward(x, route, integers, seed, *weights, *biases)


def _backward_of_op(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, route, integers, seed, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():
        raise RuntimeError("multi_head_mlp: expected one derivative where it is compiled or called directly, got two.")
    weights, biases = parameters[: ctx.depth], parameters[ctx.depth :]
    need_x, need = ctx.needs_input_grad[0], bool(any_needed(ctx.needs_input_grad[1:3]))
    dx, flat = torch.ops.torch_mtl_pyg.multi_head_mlp_backward(
        [grad], x, weights, biases, route, integers, seed, ctx.act, ctx.dropout, need_x, need
    )
    own: list[Tensor | None] = list(split_parameters(flat, parameters)) if need else [None] * len(parameters)
    return dx if need_x else None, own[: ctx.depth], own[ctx.depth :], *(None,) * 6


def any_needed(needs: Any) -> bool:
    """Whether any of some nested flags is set."""
    return any(any_needed(n) if isinstance(n, (tuple, list)) else n for n in needs)


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, weights: list[Tensor], biases: list[Tensor], *others: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            first, *rest = autocast_to(x.device.type, x, *weights, *biases)
            result: Tensor = torch.ops.torch_mtl_pyg.multi_head_mlp(
                first, rest[: len(weights)], rest[len(weights) :], *others
            )
        return result

    return cast
