r"""Shapes and derivatives of the compiled :mod:`torch_mtl_pyg.ops.aggregate_linear`.

For a linear reduction, with the coefficients of the edges as a matrix :math:`A` and :math:`G` the gradient of the
result, the backward gathers :math:`Z = A^\top G` along the edges turned around, a tile of rows at a time:

.. math::
    \frac{\partial L}{\partial X} = Z W, \qquad \frac{\partial L}{\partial W} = Z^\top X, \qquad
    \frac{\partial L}{\partial w_e} = \frac{c_e}{w_e} \langle g_{t_e}, W x_{s_e} \rangle .

It needs :math:`K` columns of each neighbour. Where another way costs less (``D`` are fewer, or :math:`X` needs no
gradient), and for max and min, the forward keeps the aggregated features :math:`H`, and the backward is that of a
linear layer on :math:`H` and of the aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from . import _aggregate, reference_graph
from ._aggregate import again, differentiable
from ._dispatch import register_shapes
from ._edges import MEAN, SUM, Edges, rows, vector
from .reference import wide

_NAME = "torch_mtl_pyg::aggregate_linear"


class Arguments(NamedTuple):
    """The tensors of a call; lists as they come."""

    x: Tensor
    edge_weight: Tensor | None
    weights: tuple[Tensor, ...]
    root: Tensor | None
    root_weights: tuple[Tensor, ...]
    bias: Tensor | None

    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.edge_weight, self.root, self.bias, *self.weights, *self.root_weights)

    @staticmethod
    def of(flat: Sequence[Any], blocks: int) -> Arguments:
        x, edge_weight, root, bias, *lists = flat
        return Arguments(x, edge_weight, tuple(lists[:blocks]), root, tuple(lists[blocks:]), bias)

    @property
    def k(self) -> int:
        return sum(w.shape[0] for w in self.weights)


def aggregate_linear(args: Arguments, edges: Edges, reduce: int) -> Tensor:
    """The op, with derivatives. Arguments are known to fit."""
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args.flat())
    project_first, keep = plan(args, edges, reduce, records)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.torch_mtl_pyg.aggregate_linear(*_call(args, edges, reduce, project_first, keep))[0]
        return result
    if records:
        result = _AggregateLinear.apply(edges, reduce, project_first, keep, len(args.weights), *args.flat())  # type: ignore[no-untyped-call]
        return result
    return _run(args, edges, reduce, project_first, keep)[0]


# What a byte gathered from anywhere costs, in multiply-adds: some 10 GB/s against 50e9 multiply-adds a second and core.
# On a GPU by the bytes of a number, on paper for an H100: 3 TB/s against 17e12 multiply-adds a second in float64, 33e12
# in float32, and some 120e12 in tf32, in which sums of 16-bit numbers are multiplied.
_BYTE = 5.0
_BYTE_ON_GPU = {8: 5.0, 4: 11.0, 2: 40.0}


def plan(args: Arguments, edges: Edges, reduce: int, records: bool) -> tuple[bool, bool]:
    """What costs least: whether to project first, and whether to keep the aggregated features for the backward."""
    if reduce not in (SUM, MEAN):
        return False, records
    num_dst, num_edges, size = edges.ptr.shape[0] - 1, edges.index.shape[0], args.x.element_size()
    products, d, k = sum(w.numel() for w in args.weights), args.x.shape[1], args.k
    wide_size = max(4, size)  # of projected rows, kept as sums
    byte = _BYTE_ON_GPU[size] if args.x.device.type == "cuda" else _BYTE
    gather_d, gather_k = num_edges * d * size * byte, num_edges * k * size * byte
    aggregate_first = gather_d + num_dst * products
    project_first = edges.num_src * (products + k * wide_size * byte) + num_edges * k * wide_size * byte
    first = _decided(project_first < aggregate_first)
    if not records:
        return first, False
    need_x, need_edges = args.x.requires_grad, args.edge_weight is not None and args.edge_weight.requires_grad
    need_weights = any(w.requires_grad for w in args.weights)
    # The backward from the aggregated features, and the one that gathers the gradients of the results.
    kept = num_dst * (products * (need_weights + (need_x or need_edges)) + 2 * d * size * byte)
    kept += gather_d * (need_x + need_edges)
    gathered = gather_k * ((need_x or need_weights) + need_edges)
    gathered += edges.num_src * products * (need_x + need_weights + need_edges)
    keep = _decided(aggregate_first + kept < (project_first if first else aggregate_first) + gathered)
    return first and not keep, keep


def _decided(cheaper: bool) -> bool:
    """In a compiled function the number of edges may be one that nobody knows: then what is plain."""
    return bool(guard_or_false(cheaper)) if torch.compiler.is_compiling() else cheaper


def _call(args: Arguments, edges: Edges, reduce: int, project_first: bool, keep: bool) -> tuple[Any, ...]:
    x, edge_weight, weights, root, root_weights, bias = args
    return (
        rows(x),
        edges.ptr,
        edges.index,
        edges.place,
        vector(edge_weight),
        list(weights),
        root,
        list(root_weights),
        bias,
        reduce,
        project_first,
        keep,
    )


def _run(args: Arguments, edges: Edges, reduce: int, project_first: bool, keep: bool) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor] = torch.ops.torch_mtl_pyg.aggregate_linear(
            *_call(args, edges, reduce, project_first, keep)
        )
    return result


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    edge_weight: bool
    root: bool
    bias: bool
    weights: bool
    root_weights: bool

    @staticmethod
    def of(args: Arguments, needed: Callable[[Tensor | None], bool]) -> Needs:
        return Needs(
            needed(args.x),
            needed(args.edge_weight),
            needed(args.root),
            needed(args.bias),
            any(map(needed, args.weights)),
            any(map(needed, args.root_weights)),
        )


def gradients(
    grad: Tensor, args: Arguments, aggregated: Tensor | None, edges: Edges, reduce: int, needs: Needs
) -> Arguments:
    """The gradients in the order of the arguments; None where not needed. ``aggregated``: where it was kept."""
    ops = torch.ops.torch_mtl_pyg
    x, edge_weight, weights, root, root_weights, _ = args
    grad = rows(grad)
    dx = d_edge = d_root = d_bias = None
    d_weights: tuple[Tensor | None, ...] = (None,) * len(weights)
    d_root_weights: tuple[Tensor | None, ...] = (None,) * len(root_weights)
    with torch._C._AutoDispatchBelowAutograd():
        # A root that is x, cut into the same blocks, goes along in the pass over x.
        together = root is x and [w.shape for w in weights] == [w.shape for w in root_weights] and aggregated is None
        if aggregated is not None:
            dh, d_weights = _block_gradients(grad, aggregated, weights, needs.x or needs.edge_weight, needs.weights)
            if dh is not None:
                dx, d_edge = _aggregate.gradients(
                    dh, x, edge_weight, aggregated, edges, reduce, needs.x, needs.edge_weight
                )
        else:
            need_weights = needs.weights or (together and needs.root_weights)
            if needs.x or need_weights or (together and needs.root):
                shares = edges.shares(x) if reduce == MEAN else None
                dx, flat = ops.aggregate_linear_backward(
                    grad,
                    x,
                    *edges.by_source(),
                    vector(edge_weight),
                    shares,
                    list(weights),
                    list(root_weights) if together else [],
                    needs.x or (together and needs.root),
                    need_weights,
                )
                if need_weights:
                    parts = _cut(flat, (*weights, *root_weights) if together else weights)
                    d_weights, d_root_weights = parts[: len(weights)], (parts[len(weights) :] or d_root_weights)
            if needs.edge_weight:
                assert edge_weight is not None
                # In the dtype of sums: x W^T need not fit 16 bits.
                projected = reference_graph.block_linear(wide(x), [wide(w) for w in weights])
                dots = ops.edge_dots(rows(wide(grad)), rows(projected), edges.ptr, edges.index, edges.place, reduce)
                d_edge = dots.to(edge_weight.dtype)
        if root is not None and not together and (needs.root or needs.root_weights):
            d_root, d_root_weights = _block_gradients(grad, root, root_weights, needs.root, needs.root_weights)
        if needs.bias:
            nothing = grad.new_empty(grad.shape[0], 0)
            d_bias = ops.multi_head_linear_backward(
                [grad], nothing, grad.new_empty(grad.shape[1], 0), False, False, True
            )[2]
    return Arguments(dx, d_edge, d_weights, d_root, d_root_weights, d_bias)  # type: ignore[arg-type]


def _cut(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    parts = flat.split([w.numel() for w in like])
    return tuple(part.view(w.shape) for part, w in zip(parts, like, strict=True))


def _block_gradients(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], need_x: bool, need_weights: bool
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """Of the linear layers of all blocks."""
    dx, dw = [], []
    columns = x.split([w.shape[1] for w in weights], 1)
    grads = grad.split([w.shape[0] for w in weights], 1)
    for own, own_grad, w in zip(columns, grads, weights, strict=True):
        one = torch.ops.torch_mtl_pyg.multi_head_linear_backward([own_grad], own, w, need_x, need_weights, False)
        dx.append(one[0])
        dw.append(one[1] if need_weights else None)
    return (dx[0] if len(dx) == 1 else torch.cat(dx, 1)) if need_x else None, tuple(dw)


def _by_reference(args: Arguments, edges: Edges, reduce: int) -> Tensor:
    h = _aggregate.by_reference(edges, reduce, wide(args.x), args.edge_weight)
    return reference_graph.project(h, args.weights, args.bias, args.root, args.root_weights or None).to(args.x.dtype)


def register() -> None:
    """Registers shapes and derivatives for direct calls, torch.compile and export."""
    register_shapes("aggregate_linear", _meta)
    register_shapes("aggregate_linear_backward", _meta_backward)
    torch.library.register_autograd(_NAME, _backward, setup_context=_setup)


def _meta(
    x: Tensor, ptr: Tensor, index: Any, place: Any, edge_weight: Any, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor]:
    n = ptr.shape[0] - 1
    return x.new_empty(n, sum(w.shape[0] for w in weights)), x.new_empty((n, x.shape[1]) if rest[-1] else (0,))


def _meta_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, weights, root_weights, need_x, need_weight = rest
    size = sum(w.numel() for w in (*weights, *root_weights)) if need_weight else 0
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ptr, index, place, edge_weight, weights, root, root_weights, bias, ctx.reduce, _, keep = inputs
    args = Arguments(x, edge_weight, tuple(weights), root, tuple(root_weights), bias)
    ctx.blocks, ctx.root_is_x = len(weights), root is x
    if not keep and ctx.reduce not in (SUM, MEAN):
        raise ValueError("keep: expected True in a call of max or min that needs gradients.")
    ctx.save_for_backward(ptr, index, place, output[1] if keep else None, *args.flat())


def _backward(ctx: Any, grad: Tensor, of_aggregated: Tensor | None = None) -> tuple[Any, ...]:
    ptr, index, place, aggregated, *flat = ctx.saved_tensors
    args = _with_root(Arguments.of(flat, ctx.blocks), ctx.root_is_x)
    edges = Edges(ptr, index, place, args.x.shape[0])
    need = ctx.needs_input_grad
    if differentiable((grad,)) and not torch.compiler.is_compiling():

        def run_again(*flat: Tensor | None) -> Tensor:
            return _by_reference(Arguments.of(flat, ctx.blocks), edges, ctx.reduce)

        needed = (need[0], need[4], need[6], need[8], *need[5], *need[7])
        d = Arguments.of(again(run_again, flat, needed, grad), ctx.blocks)
    else:
        needs = Needs(need[0], need[4], need[6], need[8], any(need[5]), any(need[7]))
        d = gradients(grad, args, aggregated, edges, ctx.reduce, needs)
    return (
        d.x,
        None,
        None,
        None,
        d.edge_weight,
        list(d.weights),
        d.root,
        list(d.root_weights),
        d.bias,
        None,
        None,
        None,
    )


def _with_root(args: Arguments, root_is_x: bool) -> Arguments:
    return args._replace(root=args.x) if root_is_x else args


class _AggregateLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, edges: Edges, reduce: int, project_first: bool, keep: bool, blocks: int, *flat: Tensor | None
    ) -> Tensor:
        args = Arguments.of(flat, blocks)
        out, aggregated = _run(args, edges, reduce, project_first, keep)
        ctx.edges, ctx.reduce, ctx.blocks, ctx.root_is_x = edges, reduce, blocks, args.root is args.x
        ctx.save_for_backward(aggregated if keep else None, *flat, *edges.saved())
        ctx.flat = len(flat)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        aggregated, *flat = ctx.saved_tensors[: 1 + ctx.flat]
        need = ctx.needs_input_grad[5:]
        nothing = (None,) * 5
        if differentiable((grad,)):

            def run_again(*flat: Tensor | None) -> Tensor:
                return _by_reference(Arguments.of(flat, ctx.blocks), ctx.edges, ctx.reduce)

            return *nothing, *again(run_again, flat, need, grad)
        args = _with_root(Arguments.of(flat, ctx.blocks), ctx.root_is_x)
        b = 4 + ctx.blocks
        needs = Needs(need[0], need[1], need[2], need[3], any(need[4:b]), any(need[b:]))
        d = gradients(grad, args, aggregated, ctx.edges, ctx.reduce, needs)
        return *nothing, *d.flat()
