r"""Shapes and derivatives of the compiled :mod:`torch_mtl_pyg.ops.aggregate`.

With coefficients :math:`c_e` (the weight of the edge; for the mean, over the number of edges of its target):

.. math::
    \frac{\partial L}{\partial x_j} = \sum_{e \,:\, s_e = j} c_e\, g_{t_e}, \qquad
    \frac{\partial L}{\partial w_e} = \frac{c_e}{w_e} \langle g_{t_e}, x_{s_e} \rangle,

the first an aggregation along the edges turned around. Derivatives of higher order are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_graph
from ._dispatch import is_batched, register_shapes, transformed
from ._edges import CODES, MEAN, SUM, Edges, rows, vector

_NAME = "torch_mtl_pyg::aggregate"


def aggregate(x: Tensor, edges: Edges, edge_weight: Tensor | None, reduce: int) -> Tensor:
    """The op, with derivatives. Arguments are known to fit."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.aggregate(
            rows(x), edges.ptr, edges.index, edges.place, vector(edge_weight), None, reduce
        )
        return result
    if torch.is_grad_enabled() and (x.requires_grad or (edge_weight is not None and edge_weight.requires_grad)):
        result = _Aggregate.apply(edges, reduce, x, edge_weight)  # type: ignore[no-untyped-call]
        return result
    return run(x, edges.ptr, edges.index, edges.place, edge_weight, None, reduce)


def run(
    x: Tensor,
    ptr: Tensor,
    index: Tensor,
    place: Tensor | None,
    edge_weight: Tensor | None,
    factors: Tensor | None,
    reduce: int,
) -> Tensor:
    """The values alone."""
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.torch_mtl_pyg.aggregate(
            rows(x), ptr, index, place, vector(edge_weight), factors, reduce
        )
    return result


def gradients(
    grad: Tensor,
    x: Tensor,
    edge_weight: Tensor | None,
    result: Tensor | None,
    edges: Edges,
    reduce: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of ``x`` and of the weights. ``result``: for max and min."""
    ops = torch.ops.torch_mtl_pyg
    dx = dw = None
    with torch._C._AutoDispatchBelowAutograd():
        if reduce not in (SUM, MEAN):
            assert result is not None
            source_ptr, source_index, _ = edges.by_source()
            return ops.aggregate_extreme_backward(
                rows(grad), rows(x), result, edges.ptr, edges.index, source_ptr, source_index
            ), None
        if need_x:
            shares = edges.shares(x) if reduce == MEAN else None
            dx = ops.aggregate(rows(grad), *edges.by_source(), vector(edge_weight), shares, SUM)
        if need_weight:
            dw = ops.edge_dots(rows(grad), rows(x), edges.ptr, edges.index, edges.place, reduce)
    return dx, dw


def differentiable(grads: Any) -> bool:
    """Whether a backward has to be plain PyTorch: to be differentiated again, or for gradients that are no values."""
    return torch.is_grad_enabled() or transformed() or any(g is not None and is_batched(g) for g in grads)


def by_reference(edges: Edges, reduce: int, x: Tensor, edge_weight: Tensor | None) -> Tensor:
    """The op in plain PyTorch."""
    name = next(name for name, code in CODES.items() if code == reduce)
    target = edges.target()
    if edge_weight is not None and edges.place is not None:
        edge_weight = edge_weight[edges.place]
    return reference_graph.reduce_edges(x, edges.index, target, edges.ptr.shape[0] - 1, edge_weight, name)


def register() -> None:
    """Registers shapes and derivatives for direct calls, torch.compile and export."""
    register_shapes("aggregate", _meta)
    register_shapes("aggregate_extreme_backward", lambda grad, x, *_: x.new_empty(x.shape))
    register_shapes("edge_dots", lambda a, x, ptr, index, *_: x.new_empty(index.shape[0]))
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup)


def _meta(x: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    return x.new_empty(ptr.shape[0] - 1, x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ptr, index, place, edge_weight, factors, ctx.reduce = inputs
    if factors is not None and factors.requires_grad:
        raise ValueError("factors: expected a tensor that needs no gradient.")
    extreme = ctx.reduce not in (SUM, MEAN)
    ctx.save_for_backward(x, ptr, index, place, edge_weight, factors, output if extreme else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, ptr, index, place, edge_weight, factors, result = ctx.saved_tensors
    if factors is not None:
        raise ValueError("factors: expected None in a call that needs gradients.")
    edges = Edges(ptr, index, place, x.shape[0])
    need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    if differentiable((grad,)) and not torch.compiler.is_compiling():

        def run_again(x: Tensor, edge_weight: Tensor | None) -> Tensor:
            return by_reference(edges, ctx.reduce, x, edge_weight)

        dx, dw = again(run_again, (x, edge_weight), (need_x, need_weight), grad)
        return dx, None, None, None, dw, None, None
    dx, dw = gradients(grad, x, edge_weight, result, edges, ctx.reduce, need_x, need_weight)
    return dx if need_x else None, None, None, None, dw, None, None


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edges: Edges, reduce: int, x: Tensor, edge_weight: Tensor | None) -> Tensor:
        out = run(x, edges.ptr, edges.index, edges.place, edge_weight, None, reduce)
        ctx.edges, ctx.reduce = edges, reduce
        ctx.save_for_backward(x, edge_weight, out if reduce not in (SUM, MEAN) else None, *edges.saved())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, edge_weight, result, *_ = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[2:]
        if differentiable((grad,)):

            def run_again(x: Tensor, edge_weight: Tensor | None) -> Tensor:
                return by_reference(ctx.edges, ctx.reduce, x, edge_weight)

            return None, None, *again(run_again, (x, edge_weight), (need_x, need_weight), grad)
        return None, None, *gradients(grad, x, edge_weight, result, ctx.edges, ctx.reduce, need_x, need_weight)


def again(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a function of the inputs where needed, differentiable themselves where autograd records."""
    create_graph = torch.is_grad_enabled()
    alias = create_graph or transformed()  # in a transform nothing may be told to need a gradient
    with torch.enable_grad():
        # Aliases, since an input may depend on another: only the way through the function itself counts here.
        own = [
            t if t is None or not need else t.view_as(t) if alias else t.detach().requires_grad_()
            for t, need in zip(inputs, needed, strict=True)
        ]
        out = function(*own)
    wanted = [t for t, need in zip(own, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needed)
