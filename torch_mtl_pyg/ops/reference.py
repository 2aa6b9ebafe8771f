"""The ops in plain PyTorch: the fallback, the tests' oracle (in float64) and a baseline of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..labels import labelled
from ..task import Task, TaskLayout


def multi_head_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; shapes as in :func:`torch_mtl_pyg.ops.multi_head_linear`."""
    return F.linear(x, weight, bias)


def multi_head_linear_backward(
    grads: Sequence[Tensor], x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, ``weight`` and ``bias``; None where not needed. ``grads`` are columns."""
    grad = grads[0] if len(grads) == 1 else torch.cat(tuple(grads), dim=1)
    return (
        grad @ weight if need_x else None,
        grad.t() @ x if need_weight else None,
        grad.sum(0) if need_bias else None,
    )


def grouped_linear(xs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """One linear layer per group of rows; shapes as in :func:`torch_mtl_pyg.ops.grouped_linear`."""
    biases = [None] * len(xs) if bias is None else bias.unbind()
    return torch.cat([F.linear(x, weight, b) for x, weight, b in zip(xs, weights, biases, strict=True)])


def multi_head_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Sequence[Tensor | None], layout: TaskLayout
) -> tuple[Tensor, Tensor]:
    """Losses ``[T]`` and counts ``[T]``, as in :func:`torch_mtl_pyg.ops.multi_head_loss`.

    ``labels`` holds one tensor per task, or None; a task without labels, without loss or with a callable gets 0.
    """
    logits = wide(F.linear(x, weight, bias))
    return losses_of(logits, labels, layout)


def losses_of(logits: Tensor, labels: Sequence[Tensor | None], layout: TaskLayout) -> tuple[Tensor, Tensor]:
    """Losses and counts of packed logits ``[N, K]``."""
    losses, counts = [], []
    # A sum over nothing: zero, with a gradient of zeros, also for logits that are not finite.
    zero = logits[:0].sum()
    for (name, task), y in zip(layout.tasks.items(), labels, strict=True):
        if y is None or not isinstance(task.loss, str):
            losses.append(zero)
            counts.append(torch.zeros((), dtype=torch.int64, device=logits.device))
            continue
        loss, count = task_loss(task, logits[:, layout.slices[name]], y)
        losses.append(loss + zero)
        counts.append(count)
    return torch.stack(losses), torch.stack(counts)


def task_loss(task: Task, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of one task over its labelled entries, and their number. No values leave the device."""
    present = labelled(task, y)
    count = present.sum()
    if task.loss == "cross_entropy":
        present = present.reshape(-1)
        target = torch.where(present, y.reshape(-1), 0).to(torch.int64)
        weight = None if task.class_weight is None else out.new_tensor(task.class_weight)
        norm = present.sum().to(out.dtype) if weight is None else torch.where(present, weight[target], 0.0).sum()
        total = F.cross_entropy(
            # A row without a label may hold anything; 0 * NaN must not reach the others.
            torch.where(present.unsqueeze(1), out, 0.0),
            torch.where(present, target, -100),
            weight,
            reduction="sum",
            label_smoothing=task.label_smoothing,
        )
        return torch.where(norm > 0, total / torch.where(norm > 0, norm, 1.0), 0.0), count
    y = y.unsqueeze(1) if y.dim() == 1 else y
    present = present.reshape(y.shape)
    target = torch.where(present, y, 0).to(out.dtype)
    if task.loss == "gaussian_nll":
        mean, log_variance = out.chunk(2, dim=1)
        mean, log_variance = torch.where(present, mean, 0.0), torch.where(present, log_variance, 0.0)
        # F.gaussian_nll_loss clamps the variance v in the value, not in the gradient's path, where d v / d log v = v.
        low = log_variance.clamp(-100.0, LOG_EPS)
        clamped = LOG_EPS + torch.exp(low - LOG_EPS).detach() * (low - low.detach())
        log_variance = torch.where(log_variance >= LOG_EPS, log_variance, clamped)
        entries = 0.5 * (log_variance + (mean - target).square() * torch.exp(-log_variance))
    else:
        entries = _entries(task, torch.where(present, out, 0.0), target)
    norm = present.sum().to(out.dtype)
    return torch.where(present, entries, 0.0).sum() / norm.clamp(min=1), count


# ln(1e-6): the smallest variance of F.gaussian_nll_loss.
LOG_EPS = -13.815510557964274


def _entries(task: Task, out: Tensor, target: Tensor) -> Tensor:
    if task.loss == "bce":
        pos_weight = None if task.pos_weight is None else out.new_tensor(task.pos_weight)
        return F.binary_cross_entropy_with_logits(out, target, reduction="none", pos_weight=pos_weight)
    if task.loss == "mse":
        return F.mse_loss(out, target, reduction="none")
    if task.loss == "l1":
        return F.l1_loss(out, target, reduction="none")
    if task.loss == "huber":
        return F.huber_loss(out, target, reduction="none", delta=task.delta)
    return F.poisson_nll_loss(out, target, log_input=True, full=False, reduction="none")


def gramian(logit_gradients: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    """``G[i, j] = <g_i W_i, g_j W_j>`` ``[T, T]`` from ``[N, K]`` gradients at the logits.

    By blockwise sums of ``(g^T g) * (W W^T)``.
    """
    product = (logit_gradients.t() @ logit_gradients) * (weight @ weight.t())
    task = torch.repeat_interleave(torch.tensor(widths, device=weight.device))
    rows = product.new_zeros(len(widths), product.shape[1]).index_add(0, task, product)
    return rows.new_zeros(len(widths), len(widths)).index_add(1, task, rows)


def wide(t: Tensor) -> Tensor:
    """In the dtype that sums are kept in."""
    return t if t.dtype == torch.float64 else t.float()
