r"""Losses of heads with hidden layers, or of rows routed to one head each, in one pass, with the gradients.

The heads are those of :mod:`torch_mtl_pyg.ops.multi_head_mlp`, the losses and the weights :math:`v_t` of the tasks
those of :mod:`torch_mtl_pyg.ops.multi_head_loss`. Over a tile of rows the op computes the hidden layers, the logits,
the losses and all gradients; neither hidden units nor logits of all rows are ever made.

The Gramian :math:`\mathcal G_{ij} = \langle \partial L_i / \partial X, \partial L_j / \partial X \rangle` is summed
over the tiles from :math:`\partial L_t / \partial X = \bar A^1_t W^1_t`, of which a tile holds all tasks. Rows routed
to different tasks are different rows: it is diagonal then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..labels import DTYPES, FLOATING, check_values, label_columns, labelled, split_labels
from ..task import TaskLayout
from . import reference_mlp
from ._aggregate import again, differentiable
from ._checks import can_be_checked, check_route_values, check_same
from ._dispatch import LIBRARY, REFUSALS, autocast_to, check_gramian_in_transform, register_shapes
from .loss_table import loss_table, total_weight
from .multi_head_loss import Labels, Losses, scale_by, targets_of, task_weights
from .multi_head_mlp import any_needed, packed, prepare, recorded, split_parameters
from .reference_mlp import Hidden

NAME = "torch_mtl_pyg::multi_head_mlp_loss"


def multi_head_mlp_loss(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    y: Labels,
    layout: TaskLayout,
    hidden: Hidden = Hidden(),  # noqa: B008 (immutable)
    route: Tensor | None = None,
    gramian: bool = False,
    outside: Sequence[Tensor] = (),
) -> Losses:
    """Computes the losses of all tasks, and prepares their gradients.

    Args:
        x: Shared embedding ``[N, D]``.
        weights: As for :func:`torch_mtl_pyg.ops.multi_head_mlp`.
        biases: As there.
        y: Labels: ``[N, T]``, or a dict; see :func:`torch_mtl_pyg.labels.split_labels`. Routed: ``[N]`` or ``[N, W]``,
            of which a row's task reads the first columns.
        layout: The tasks. Those with a callable as loss get 0 here.
        hidden: Activation and dropout.
        route: int64 ``[N]``: the task of each row; or None.
        gramian: Whether to compute the Gramian.
        outside: For the Gramian of unrouted rows: ``[N, C_t]`` gradients at the logits of the tasks with a callable.

    Returns:
        Losses ``[T]``, their weighted sum, the number of labels ``[T]`` (int64), and the Gramian ``[T, T]`` or None.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As the functions named above.
    """
    x, weights, biases, fused = prepare(x, weights, biases, layout, route, "multi_head_mlp_loss")
    if route is not None:
        check_routed_labels(y, x, layout)
    if not fused:
        parts = [y] if route is not None else split_labels(y, layout, x)
        return _reference(x, weights, biases, parts, layout, hidden, route, gramian, outside)  # type: ignore[arg-type]
    traced = torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda")
    if (traced or isinstance(x, FakeTensor)) and route is None:
        split_labels(y, layout, x)  # there no kernel checks them, or the op cannot explain what it refuses
    if traced and route is not None and can_be_checked(route):
        check_routed_tasks(route, y, layout)  # type: ignore[arg-type]
    if traced:
        ready = recorded(x, weights, biases) and not gramian and x.dtype != torch.float16
        table = loss_table(layout, bool(outside))
        targets = _targets(y, layout, x, route)
        results = torch.ops.torch_mtl_pyg.multi_head_mlp_loss(
            *packed(x, weights, biases, hidden, route, table.integers),
            [*targets, *outside],
            table.reals,
            table.weight,
            *_needs(x, weights, biases, ready),
            gramian,
        )
        return results[0], results[1], results[2], results[3].detach() if gramian else None
    try:
        targets = _targets(y, layout, x, route)
        if recorded(x, weights, biases):
            others: list[Tensor] = []  # each output of a Function costs microseconds
            per_task, total = _MultiHeadMLPLoss.apply(  # type: ignore[no-untyped-call]
                layout, hidden, route, targets, gramian, outside, others, x, len(weights), *weights, *biases
            )
            return per_task, total, others[0], others[1] if gramian else None
        results = _forward(
            x,
            weights,
            biases,
            layout,
            hidden,
            route,
            [*targets, *outside],
            bool(outside),
            None,
            (False, False),
            gramian,
        )
    except REFUSALS as error:
        refused = error
    else:
        return results[0], results[1], results[2], results[3] if gramian else None
    _explain([y] if route is not None else split_labels(y, layout, x), layout, route)  # type: ignore[list-item]
    raise refused


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the op, torch.compile and export."""
    register_shapes("multi_head_mlp_loss", _meta)
    torch.library.register_autograd(NAME, _backward_of_op, setup_context=_save_for_op)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("multi_head_mlp_loss", _autocast(key), key)


# ---- Labels.


def _targets(y: Labels, layout: TaskLayout, x: Tensor, route: Tensor | None) -> list[Tensor]:
    return targets_of(y, layout, x) if route is None else [y]  # type: ignore[list-item]


def check_routed_labels(y: object, x: Tensor, layout: TaskLayout) -> None:
    """Labels of rows that belong to one task each, but for the values.

    Raises:
        TypeError: ``y`` is no dense tensor of numbers.
        ValueError: ``y`` is neither ``[N]`` nor ``[N, max C_t]``, on another device, or needs a gradient.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor [N], one label per row, since task is a tensor, got {type(y).__name__}.")
    if y.layout is not torch.strided or y.dtype not in DTYPES:
        raise TypeError(f"y: expected dense labels that are numbers, got {y.dtype}, {y.layout}.")
    n, widest = x.shape[0], max(layout.widths)
    most = max(label_columns(task) or 1 for task in layout.tasks.values())
    if tuple(y.shape) not in ((n,), (n, widest), (n, most)):
        raise ValueError(f"y: expected shape [{n}] or [{n}, {widest}], got {list(y.shape)}.")
    check_same("y", y, "x", x, dtype=False)
    if y.requires_grad and not layout.with_callable:
        raise ValueError("y: expected labels that need no gradient, got one that does; detach it.")


def check_routed_tasks(route: Tensor, y: Tensor, layout: TaskLayout) -> None:
    """The tasks that occur have a loss, and as many labels a row as they read.

    Raises:
        ValueError: A task has no loss, or ``y`` is too narrow for it. In a compiled function the error is PyTorch's
            assertion, at run time.
    """
    compiling = torch.compiler.is_compiling()
    for index in range(len(layout.names)) if compiling else torch.unique(route).tolist():
        name = layout.names[index]
        task = layout.tasks[name]
        columns, got = label_columns(task) or 1, 1 if y.dim() == 1 else y.shape[1]
        if task.loss is None:
            message = f"task: expected tasks with a loss, got {index} ({name!r}), which has none."
        elif columns > got:
            # While compiling, numbers may be symbols, which no message can hold.
            message = f"y: expected as many labels a row as the task {name!r} has."
            if not compiling:
                message = f"y: expected {columns} labels a row for the task {name!r}, got shape {list(y.shape)}."
        else:
            continue
        if not compiling:
            raise ValueError(message)
        torch._assert_async(~(route == index).any(), message)


def _explain(labels: Sequence[Tensor | None], layout: TaskLayout, route: Tensor | None) -> None:
    """Raises the precise error for what the op refused."""
    if route is None:
        for (name, task), part in zip(layout.tasks.items(), labels, strict=True):
            if part is not None:
                check_values(name, task, part)
        return
    check_route_values(route, len(layout.names))
    y = labels[0]
    assert y is not None
    check_routed_tasks(route, y, layout)
    if torch.compiler.is_compiling():
        for (name, task), part in zip(layout.tasks.items(), reference_mlp.masked_labels(route, y, layout), strict=True):
            if part is not None:
                check_values(name, task, part)
        return
    for index, rows in reference_mlp.rows_by_task(route, len(layout.names)):
        name = layout.names[index]
        task = layout.tasks[name]
        if not callable(task.loss):
            # All other rows as missing, so that the row in the message is that of y.
            own = reference_mlp.own_labels(y, layout, index)
            here = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device).index_fill(0, rows, True)
            here = (here if own.dim() == 1 else here.unsqueeze(1)) & labelled(task, own)
            numbers = own if own.dtype in FLOATING else own.double()
            check_values(name, task, torch.where(here, numbers, float("nan")))


# ---- The compiled op.


def _needs(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], ready: bool) -> tuple[bool, bool]:
    return ready and x.requires_grad, ready and any(t.requires_grad for t in (*weights, *biases))


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden,
    route: Tensor | None,
    targets: list[Tensor],
    outside: bool,
    v: Tensor | None,
    needs: tuple[bool, bool],
    gramian: bool,
) -> tuple[Tensor, ...]:
    table = loss_table(layout, outside)
    arguments = packed(x, weights, biases, hidden, route, table.integers)
    with torch._C._AutoDispatchBelowAutograd():
        results: tuple[Tensor, ...] = torch.ops.torch_mtl_pyg.multi_head_mlp_loss(
            *arguments, targets, table.reals, table.weight if v is None else v, *needs, gramian
        )
    return results


class _MultiHeadMLPLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: TaskLayout,
        hidden: Hidden,
        route: Tensor | None,
        targets: list[Tensor],
        gramian: bool,
        outside: Sequence[Tensor],
        others: list[Tensor],
        x: Tensor,
        depth: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Gradients at once, as in multi_head_loss: not with the Gramian, and not in float16.
        ready = not gramian and x.dtype != torch.float16
        needs = (ctx.needs_input_grad[7], any(ctx.needs_input_grad[9:])) if ready else (False, False)
        per_task, total, *results = _forward(
            x, parameters[:depth], parameters[depth:], layout, hidden, route, [*targets, *outside], bool(outside), None,
            needs, gramian,
        )  # fmt: skip
        others += results[:2]
        ctx.ready = results[2:] if ready else None
        ctx.layout, ctx.hidden, ctx.depth = layout, hidden, depth
        ctx.save_for_backward(x, route, *parameters, *targets)
        ctx.numbers = len(parameters)
        ctx.set_materialize_grads(False)
        return per_task, total

    @staticmethod
    def backward(ctx: Any, of_per_task: Tensor | None, of_total: Tensor | None) -> tuple[Any, ...]:
        if of_per_task is None and of_total is None:
            return (None,) * len(ctx.needs_input_grad)
        x, route, *rest = ctx.saved_tensors
        parameters, targets = rest[: ctx.numbers], rest[ctx.numbers :]
        need_x, need = ctx.needs_input_grad[7], ctx.needs_input_grad[9:]
        layout, weights, biases = ctx.layout, parameters[: ctx.depth], parameters[ctx.depth :]
        if differentiable((of_per_task, of_total)):
            labels: list[Tensor | None] = [None if t.dim() == 3 else t for t in targets]
            if route is None and len(targets) < len(layout.names):
                labels = list(targets[0].unbind(1))

            def run_again(x: Tensor, *parameters: Tensor) -> Tensor:
                first, second = parameters[: ctx.depth], parameters[ctx.depth :]
                return reference_mlp.multi_head_mlp_loss(x, first, second, labels, layout, ctx.hidden, route)[0]

            acc = torch.float64 if x.dtype == torch.float64 else torch.float32
            v = _weights(of_per_task, of_total, total_weight(layout, torch.empty((), dtype=acc, device=x.device)))
            dx, *others = again(run_again, (x, *parameters), (need_x, *need), v)
            return *(None,) * 7, dx, None, *others
        ready, ctx.ready = ctx.ready, None  # given away once: what is done with them must not come back
        if ready is not None and of_per_task is None:
            assert of_total is not None
            scale_by(ready, of_total)
            dx, flat = ready
        else:
            v = task_weights(of_per_task, of_total, loss_table(layout).weight_on(x.device))
            with torch.autocast(x.device.type, enabled=False):
                dx, flat = _forward(
                    x, weights, biases, layout, ctx.hidden, route, targets, False, v, (need_x, any(need)), False
                )[4:]
        own = split_parameters(flat, parameters) if any(need) else parameters
        return (
            *(None,) * 7,
            dx if need_x else None,
            None,
            *(g if needed else None for g, needed in zip(own, need, strict=True)),
        )  # fmt: skip


def _weights(of_per_task: Tensor | None, of_total: Tensor | None, weight: Tensor) -> Tensor:
    v = None if of_total is None else of_total * weight
    if of_per_task is None:
        assert v is not None
        return v
    return of_per_task if v is None else of_per_task + v


# ---- Plain PyTorch.


def _reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    layout: TaskLayout,
    hidden: Hidden,
    route: Tensor | None,
    gramian: bool,
    outside: Sequence[Tensor],
) -> Losses:
    if gramian:
        check_gramian_in_transform(x, *weights, *biases, *labels, route)
    if all(can_be_checked(t) for t in (route, *labels) if t is not None):
        _explain(labels, layout, route)
    per_task, count = reference_mlp.multi_head_mlp_loss(x, weights, biases, labels, layout, hidden, route)
    total = (per_task * total_weight(layout, per_task)).sum()
    if not gramian:
        return per_task, total, count, None
    with torch.inference_mode(False), torch.enable_grad():
        if route is None:
            product = reference_mlp.gramian(x, weights, biases, labels, layout, hidden, outside)
        else:
            own = x.detach().clone().requires_grad_()
            w, b = [t.detach().clone() for t in weights], [t.detach().clone() for t in biases]
            losses, _ = reference_mlp.multi_head_mlp_loss(own, w, b, labels, layout, hidden, route)
            (dx,) = torch.autograd.grad(losses.sum(), own)
            squares = losses.new_zeros(losses.shape[0]).index_add(0, route, dx.to(losses.dtype).square().sum(1))
            product = torch.diag(squares)
    return per_task, total, count, product.detach()


# ---- What PyTorch knows of the op.


def _meta(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    route: Tensor | None,
    integers: Tensor,
    seed: Tensor | None,
    act: int,
    dropout: float,
    targets: list[Tensor],
    reals: Tensor,
    task_weight: Tensor,
    need_x: bool,
    need_parameters: bool,
    need_gramian: bool,
) -> tuple[Tensor, ...]:
    tasks = integers.shape[0]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers = sum(p.numel() for p in (*weights, *biases)) if need_parameters else 0
    return (
        x.new_empty(tasks, dtype=acc),
        x.new_empty((), dtype=acc),
        x.new_empty(tasks, dtype=torch.int64),
        x.new_empty((tasks, tasks) if need_gramian else (0,), dtype=acc),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(numbers),
    )


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, *others = inputs
    route, integers, seed, ctx.act, ctx.dropout, targets, reals, task_weight, need_x, need, _ = others
    ctx.depth, ctx.count, ctx.targets, ctx.computed = len(weights), len(biases), len(targets), (need_x, need)
    ctx.save_for_backward(
        x, route, integers, seed, reals, task_weight, *output[4:], *weights, *biases, *targets
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx: Any, of_per_task: Tensor | None, of_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, route, integers, seed, reals, task_weight, dx, flat, *rest = ctx.saved_tensors
    parameters, targets = rest[: ctx.depth + ctx.count], rest[ctx.depth + ctx.count :]
    if torch.is_grad_enabled():
        raise RuntimeError(
            "multi_head_mlp_loss: expected one derivative where it is compiled or called directly, got two."
        )
    need_x, need = bool(ctx.needs_input_grad[0]), bool(any_needed(ctx.needs_input_grad[1:3]))
    if of_per_task is None and of_total is None:
        need_x = need = False
    elif of_per_task is None and all(c or not n for c, n in zip(ctx.computed, (need_x, need), strict=True)):
        assert of_total is not None
        dx, flat = (dx * of_total).to(dx.dtype), (flat * of_total).to(flat.dtype)
    else:
        v = task_weights(of_per_task, of_total, task_weight)
        weights, biases = parameters[: ctx.depth], parameters[ctx.depth :]
        dx, flat = torch.ops.torch_mtl_pyg.multi_head_mlp_loss(
            x, weights, biases, route, integers, seed, ctx.act, ctx.dropout, targets, reals, v, need_x, need, False
        )[4:]
    own: list[Tensor | None] = list(split_parameters(flat, parameters)) if need else [None] * len(parameters)
    return (
        dx if need_x else None,
        own[: ctx.depth],
        own[ctx.depth :],
        *(None,) * 5,
        [None] * ctx.targets,
        *(None,) * 5,
    )  # fmt: skip


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, weights: list[Tensor], biases: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            first, *rest = autocast_to(x.device.type, x, *weights, *biases)
            results: tuple[Tensor, ...] = torch.ops.torch_mtl_pyg.multi_head_mlp_loss(
                first, rest[: len(weights)], rest[len(weights) :], *others
            )
        return results

    return cast
