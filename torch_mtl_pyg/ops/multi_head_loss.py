r"""All linear heads and all their losses in one pass, with the gradients.

With packed weights :math:`W` ``[K, D]``, logits :math:`Z = X W^\top + b`, and the loss of task :math:`t` the mean over
its labelled entries :math:`(n, c)`,

.. math::
    L_t = \frac{1}{\nu_t} \sum_{(n, c)} \ell_t(Z_{nc}, y_{nc}), \qquad
    G^t_{nc} = \frac{\partial L_t}{\partial Z_{nc}},

:math:`\nu_t` is their number (cross-entropy: the sum of their class weights). With weights :math:`v_t` of the tasks,

.. math::
    \frac{\partial}{\partial X} \sum_t v_t L_t = \sum_t v_t G^t W_t, \quad
    \frac{\partial}{\partial W_t} = v_t G^{t\top} X, \quad
    \frac{\partial}{\partial b_t} = v_t \sum_n G^t_n .

The op computes logits, losses and these gradients over tiles of rows: no ``[N, K]`` tensor is ever made, but on a GPU
for more than 128 columns or inputs, float64 or the Gramian (csrc/README.md says why). The weights :math:`v_t` must be
known for that; they are, for ``total``. Where a backward comes with other weights (through ``per_task``: learned
weights, or weights from the Gramian), the op runs again with those.

The Gramian :math:`\mathcal G_{ij} = \langle G^i W_i, G^j W_j \rangle` needs no ``[T, N, D]`` Jacobian: with
:math:`S = G^\top G` and :math:`P = W W^\top`, both ``[K, K]``, it is the sum of :math:`S \odot P` over the block of
tasks :math:`i, j`.

Sums are kept in float32, those of float64 in float64. Results are bitwise equal at any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from ..labels import check_values, split_labels
from ..task import TaskLayout
from . import reference
from ._checks import can_be_checked
from ._dispatch import (
    LIBRARY,
    REFUSALS,
    autocast_to,
    check_gramian_in_transform,
    is_batched,
    is_plain_call,
    prepare,
    records,
    register_shapes,
    transformed,
)
from .loss_table import LossTable, loss_table, total_weight

_NAME = "torch_mtl_pyg::multi_head_loss"
Labels = Mapping[str, Tensor | None] | Tensor
Losses = tuple[Tensor, Tensor, Tensor, Tensor | None]


def multi_head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Labels,
    layout: TaskLayout,
    gramian: bool = False,
    outside: Sequence[Tensor] = (),
) -> Losses:
    """Computes the losses of all tasks, and prepares their gradients.

    Args:
        x: Shared embedding ``[N, D]``, any strides. float32, float64, bfloat16 or float16.
        weight: Packed weights ``[K, D]``, of the dtype and device of ``x``.
        bias: Packed biases ``[K]``, or None.
        y: Labels: ``[N, T]``, or a dict; see :func:`torch_mtl_pyg.labels.split_labels`.
        layout: The tasks. Those with a callable as loss get 0 here.
        gramian: Whether to compute the Gramian.
        outside: For the Gramian: ``[N, C_t]`` gradients at the logits of the tasks with a callable, in order.

    Returns:
        Losses ``[T]``, their weighted sum, the number of labels ``[T]`` (int64), and the Gramian ``[T, T]`` or None.

    Raises:
        TypeError: An argument is no dense tensor of a supported dtype, or the dtypes differ.
        ValueError: Shapes or devices do not fit, or labels are out of range (:class:`torch_mtl_pyg.labels.LabelError`,
            also an IndexError).
        RuntimeError: The backend is ``"fused"``, and it cannot run here.
    """
    if not is_plain_call(x, "multi_head_loss"):
        x, weight, bias, fused = prepare(x, weight, bias, "multi_head_loss")
        if not fused:
            return _reference(x, weight, bias, y, layout, gramian, outside)
        if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
            parts = split_labels(y, layout, x)
            targets = [y] if isinstance(y, Tensor) else filled(parts, x)
            results = _call_op(x, weight, bias, targets, layout, gramian, outside)
            return results[0], results[1], results[2], results[3].detach() if gramian else None
        if isinstance(x, FakeTensor):
            split_labels(y, layout, x)  # no kernel checks them
    try:
        targets = targets_of(y, layout, x)
        if records(x, weight, bias):
            # Each output of a Function costs microseconds: those without a derivative come by a list.
            others: list[Tensor] = []
            per_task, total = _MultiHeadLoss.apply(x, weight, bias, targets, layout, gramian, outside, others)  # type: ignore[no-untyped-call]
            return per_task, total, others[0], others[1] if gramian else None
        table = loss_table(layout, bool(outside))
        results = _forward(x, weight, bias, [*targets, *outside], table, table.weight, _NOTHING, gramian)
    except REFUSALS as error:
        refused = error
    else:
        per_task, total, count, product = results[:4]
        return per_task, total, count, product if gramian else None
    # The op checks everything, and here the argument is found that it refused.
    prepare(x, weight, bias, "multi_head_loss")
    _explain(y, layout, x)
    raise refused


def register() -> None:
    """Registers shapes, derivatives and autocast for direct calls of the op, torch.compile and export."""
    global _op, _scale_op
    _op = torch.ops.torch_mtl_pyg.multi_head_loss.default
    _scale_op = torch.ops.torch_mtl_pyg.scale_gradients.default
    register_shapes("multi_head_loss", _meta)
    torch.library.register_autograd(_NAME, _backward_of_op, setup_context=_save_for_op)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl("multi_head_loss", _autocast(key), key)


# The loaded ops, looked up once.
_op: Any = None
_scale_op: Any = None


# ---- Labels.


def targets_of(y: Labels, layout: TaskLayout, x: Tensor) -> list[Tensor]:
    """Labels as the op takes them: one matrix, or one tensor per task. The op checks all but derivatives."""
    if isinstance(y, Tensor):
        if len(layout.names) > 1 and y.device == x.device and not y.requires_grad:
            return [y]
    elif type(y) is dict and len(y) == len(layout.names):
        targets = []
        for name in layout.names:
            part = y.get(name)
            # Three dimensions stand for no labels on the way to the op.
            if part is None or part.requires_grad or part.dim() > 2:
                break
            targets.append(part)
        else:
            return targets
    return filled(split_labels(y, layout, x), x)


def filled(parts: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """Labels as the op takes them: a tensor of a shape that labels cannot have for each None."""
    nothing = torch.empty((0, 0, 0), dtype=torch.float32, device=x.device)
    return [nothing if part is None else part for part in parts]


def _explain(y: Labels, layout: TaskLayout, x: Tensor) -> None:
    """Raises the precise error for labels that the op refused."""
    parts = split_labels(y, layout, x)
    for (name, task), part in zip(layout.tasks.items(), parts, strict=True):
        if part is not None:
            check_values(name, task, part)


# ---- The compiled op.


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    table: LossTable,
    task_weight: Tensor,
    needs: tuple[bool, bool, bool],
    gramian: bool,
) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        results: tuple[Tensor, ...] = _op(
            x, weight, bias, targets, table.integers, table.reals, task_weight, *needs, gramian
        )
    return results


class _MultiHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: list[Tensor],
        layout: TaskLayout,
        gramian: bool,
        outside: Sequence[Tensor],
        others: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        # Gradients for the tasks' own weights, at once: the backward of `total` finds them ready. Not with the Gramian,
        # after which other weights come; and not in float16, where a loss scale must come before the rounding.
        ready = not gramian and x.dtype != torch.float16
        table = loss_table(layout, bool(outside))
        per_task, total, *results = _forward(
            x, weight, bias, [*targets, *outside], table, table.weight, needs if ready else _NOTHING, gramian
        )
        others += results[:2]
        ctx.ready = results[2:] if ready else None
        ctx.layout = layout
        ctx.save_for_backward(x, weight, bias, *targets)
        ctx.set_materialize_grads(False)
        return per_task, total

    @staticmethod
    def backward(ctx: Any, of_per_task: Tensor | None, of_total: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        if of_per_task is None and of_total is None:
            return (None,) * 8
        x, weight, bias, *targets = ctx.saved_tensors  # always, so that changes in place are noticed
        if torch.is_grad_enabled() or transformed() or _any_batched(of_per_task, of_total):
            return *_plain_gradients(x, weight, bias, targets, ctx.layout, of_per_task, of_total, needs), *_REST
        # Given away once: what autograd does with them afterwards, such as adding to them, must not come back.
        ready, ctx.ready = ctx.ready, None
        if ready is not None and of_per_task is None:
            assert of_total is not None
            scale_by(ready, of_total)
            return *(g if need else None for g, need in zip(ready, needs, strict=True)), *_REST
        table = loss_table(ctx.layout)
        if ready is not None and of_per_task is not None and not x.is_cuda:  # where no host would wait for the numbers
            factor = _common_factor(of_per_task, of_total, table.weight)
            # Not in 16 bits, to which the gradients would be rounded once more.
            if factor is not None and (x.itemsize > 2 or _is_power_of_two(factor)):
                scale_by(ready, factor)
                return *(g if need else None for g, need in zip(ready, needs, strict=True)), *_REST
        v = task_weights(of_per_task, of_total, table.weight_on(x.device))
        # The saved tensors are what the forward has made of the arguments.
        with torch.autocast(x.device.type, enabled=False):
            grads = _forward(x, weight, bias, targets, table, v, needs, False)[4:]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *_REST


_NOTHING = (False, False, False)
_REST = (None,) * 5


def _any_batched(*grads: Tensor | None) -> bool:
    return any(g is not None and is_batched(g) for g in grads)


def scale_by(grads: list[Tensor], factor: Tensor) -> None:
    """Multiplies gradients that nobody else has, in place. On a GPU no host waits for the factor."""
    if factor.is_cuda:
        with torch._C._AutoDispatchBelowAutograd():
            _scale_op(grads, factor)
        return
    number = factor.item()
    if number != 1.0:
        for g in grads:
            g *= number


def task_weights(of_per_task: Tensor | None, of_total: Tensor | None, weight: Tensor) -> Tensor:
    """The weights ``[T]`` that a gradient of ``per_task`` and ``total`` comes to."""
    v = None if of_total is None else of_total.double() * weight.to(of_total.device)
    if of_per_task is None:
        assert v is not None
        return v
    return of_per_task.double().contiguous() if v is None else of_per_task.double() + v


def _common_factor(of_per_task: Tensor, of_total: Tensor | None, weight: Tensor) -> Tensor | None:
    """The number that makes the tasks' own weights of the weights asked for, if there is one."""
    v = task_weights(of_per_task, of_total, weight)
    largest = weight.argmax()
    factor = v[largest] / weight[largest]
    return factor if torch.equal(factor * weight, v) else None


def _is_power_of_two(factor: Tensor) -> bool:
    return abs(math.frexp(factor.item())[0]) == 0.5


# ---- Plain PyTorch.


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Labels,
    layout: TaskLayout,
    gramian: bool,
    outside: Sequence[Tensor],
) -> Losses:
    labels = split_labels(y, layout, x)
    if gramian:
        check_gramian_in_transform(x, weight, bias, *labels)
    for (name, task), part in zip(layout.tasks.items(), labels, strict=True):
        if part is not None and can_be_checked(part):
            check_values(name, task, part)
    per_task, count = reference.multi_head_loss(x, weight, bias, labels, layout)
    total = (per_task * total_weight(layout, per_task)).sum()
    product = None
    if gramian:
        w = reference.wide(weight.detach())
        gradients = _logit_gradients(x, weight, bias, labels, layout)
        callables = iter(outside)
        for name, task in layout.tasks.items():
            if callable(task.loss) and outside:
                gradients[:, layout.slices[name]] = next(callables)
        product = reference.gramian(gradients, w, layout.widths)
    return per_task, total, count, product


def _logit_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Sequence[Tensor | None], layout: TaskLayout
) -> Tensor:
    """``[N, K]``: each task's gradient at its own logits."""
    # The transform around a backward is over its weights; what is differentiated here lies outside of it.
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.enable_grad():
        linear = torch.nn.functional.linear(x.detach(), weight.detach(), None if bias is None else bias.detach())
        logits = reference.wide(linear).clone().requires_grad_()
        losses, _ = reference.losses_of(logits, labels, layout)
        (gradients,) = torch.autograd.grad(losses.sum(), logits)
    return gradients


def _plain_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    layout: TaskLayout,
    of_per_task: Tensor | None,
    of_total: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients in plain PyTorch: differentiable again, or for many weights at once."""
    labels = [None if t.dim() == 3 else t for t in targets]
    if len(targets) < len(layout.names):
        labels = list(targets[0].unbind(1))
    wanted = [t for t, need in zip((x, weight, bias), needs, strict=True) if need and t is not None]
    if torch.is_grad_enabled() and not transformed() and not _any_batched(of_per_task, of_total):
        per_task, _ = reference.multi_head_loss(x, weight, bias, labels, layout)
        v = _weights_like(of_per_task, of_total, layout, per_task)
        given = iter(torch.autograd.grad(per_task, wanted, v, create_graph=True))
        return [next(given) if need else None for need in needs]
    gradients = _logit_gradients(x, weight, bias, labels, layout)
    v = _weights_like(of_per_task, of_total, layout, gradients)
    columns = torch.repeat_interleave(torch.tensor(layout.widths, device=x.device))
    # Linear in the weights, with products that have batching rules.
    scaled = (gradients * v[columns]).to(x.dtype)
    return list(reference.multi_head_linear_backward((scaled,), x, weight, *needs))


def _weights_like(of_per_task: Tensor | None, of_total: Tensor | None, layout: TaskLayout, like: Tensor) -> Tensor:
    v = None if of_total is None else of_total * total_weight(layout, like)
    if of_per_task is None:
        assert v is not None
        return v
    return of_per_task if v is None else of_per_task + v


# ---- What PyTorch knows of the op.


def _call_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    layout: TaskLayout,
    gramian: bool,
    outside: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Through the dispatcher, where gradients are those registered below."""
    table = loss_table(layout, bool(outside))
    ready = torch.is_grad_enabled() and not gramian and x.dtype != torch.float16
    needs = [ready and t is not None and t.requires_grad for t in (x, weight, bias)]
    results: tuple[Tensor, ...] = torch.ops.torch_mtl_pyg.multi_head_loss(
        x, weight, bias, [*targets, *outside], table.integers, table.reals, table.weight, *needs, gramian
    )
    return results


def _meta(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: list[Tensor],
    integers: Tensor,
    reals: Tensor,
    task_weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_gramian: bool,
) -> tuple[Tensor, ...]:
    tasks = integers.shape[0]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(tasks, dtype=acc),
        x.new_empty((), dtype=acc),
        x.new_empty(tasks, dtype=torch.int64),
        x.new_empty((tasks, tasks) if need_gramian else (0,), dtype=acc),
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, targets, integers, reals, task_weight, *ctx.computed = inputs
    ctx.count = len(targets)
    ctx.save_for_backward(x, weight, bias, integers, reals, task_weight, *output[4:], *targets)
    ctx.set_materialize_grads(False)


def _backward_of_op(ctx: Any, of_per_task: Tensor | None, of_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, integers, reals, task_weight, *rest = ctx.saved_tensors
    ready, targets = rest[:3], rest[3:]
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads: Sequence[Tensor]
    if torch.is_grad_enabled():
        raise RuntimeError("multi_head_loss: expected one derivative where it is compiled or called directly, got two.")
    if of_per_task is None and of_total is None:
        grads, needs = ready, [False] * 3
    elif of_per_task is None and all(c or not need for c, need in zip(ctx.computed, needs, strict=False)):
        assert of_total is not None
        grads = [(g * of_total).to(g.dtype) if need else g for g, need in zip(ready, needs, strict=True)]
    else:
        v = task_weights(of_per_task, of_total, task_weight)
        grads = torch.ops.torch_mtl_pyg.multi_head_loss(x, weight, bias, targets, integers, reals, v, *needs, False)[4:]
    return (
        *(g if need else None for g, need in zip(grads, needs, strict=True)),
        [None] * ctx.count,
        *((None,) * 7),
    )  # fmt: skip


def _autocast(key: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            results: tuple[Tensor, ...] = torch.ops.torch_mtl_pyg.multi_head_loss(
                *autocast_to(x.device.type, x, weight, bias), *others
            )
        return results

    return cast
