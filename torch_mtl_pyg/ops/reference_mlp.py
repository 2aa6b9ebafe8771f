"""MLP heads and rows routed to one head each, in plain PyTorch: fallback, oracle and baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional as F

from ..labels import label_columns, labelled
from ..task import TaskLayout
from . import reference
from ._checks import has_values

# In the order of csrc/common/heads.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "elu": F.elu,
}


class Hidden(NamedTuple):
    """What happens between two layers of the heads.

    Attributes:
        act: A key of ``ACTIVATIONS``.
        dropout: Share of the hidden units set to zero, in ``[0, 1]``.
        seed: int64 ``[2]`` on the CPU: what the masks are drawn from, and the number of the first task. None where
            ``dropout`` is 0.
    """

    act: str = "relu"
    dropout: float = 0.0
    seed: Tensor | None = None


def multi_head_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden,
    route: Tensor | None = None,
) -> Tensor:
    """The outputs ``[N, K]``, or routed ``[N, max C_t]``, as in :func:`torch_mtl_pyg.ops.multi_head_mlp`."""
    if route is None:
        return _behind_first(_first(x, weights, biases), x.shape[0], weights, biases, layout, hidden)
    width = max(layout.widths)
    if not _has_values(route):  # the number of rows of a task is a value: all heads, and each row's columns picked
        packed = _behind_first(_first(x, weights, biases), x.shape[0], weights, biases, layout, hidden)
        offsets = torch.tensor(layout.offsets, device=x.device)
        widths = torch.tensor(layout.widths, device=x.device)
        column = torch.arange(width, device=x.device)
        valid = column < widths[route].unsqueeze(1)
        index = torch.where(valid, offsets[route].unsqueeze(1) + column, 0)
        return packed.gather(1, index).masked_fill(~valid, 0.0)
    out = None
    for task, rows in rows_by_task(route, len(layout.names)):
        one = _one_task(x, rows, task, weights, biases, layout, hidden)
        out = one.new_zeros(x.shape[0], width) if out is None else out
        out = out.index_put((rows,), F.pad(one, (0, width - one.shape[1])))
    if out is None:  # no rows: what the parameters get is zero
        zero = sum(((p[:0] * 0).sum() for p in (*weights, *biases)), x[:0].sum())
        out = x.new_zeros(0, width) + zero
    return out


def multi_head_mlp_loss(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    layout: TaskLayout,
    hidden: Hidden,
    route: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses ``[T]`` and counts ``[T]``; routed, ``labels`` holds one tensor ``[N]`` or ``[N, W]``."""
    if route is None:
        logits = reference.wide(multi_head_mlp(x, weights, biases, layout, hidden))
        return reference.losses_of(logits, labels, layout)
    y = labels[0]
    assert y is not None
    if not _has_values(route):
        logits = reference.wide(multi_head_mlp(x, weights, biases, layout, hidden))
        return reference.losses_of(logits, masked_labels(route, y, layout), layout)
    out = reference.wide(multi_head_mlp(x, weights, biases, layout, hidden, route))
    zero = out[:0].sum()
    losses = [zero] * len(layout.names)
    counts = [torch.zeros((), dtype=torch.int64, device=x.device)] * len(layout.names)
    for index, rows in rows_by_task(route, len(layout.names)):
        name = layout.names[index]
        task = layout.tasks[name]
        if not isinstance(task.loss, str):
            continue
        own = own_labels(y, layout, index)[rows]
        loss, counts[index] = reference.task_loss(task, out[rows][:, : task.out_channels], own)
        losses[index] = loss + zero
    return torch.stack(losses), torch.stack(counts)


def gramian(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    labels: Sequence[Tensor | None],
    layout: TaskLayout,
    hidden: Hidden,
    outside: Sequence[Tensor] = (),
) -> Tensor:
    """``G[i, j] = <dL_i / dx, dL_j / dx>`` ``[T, T]``, from the gradients at the first layer.

    ``outside``: gradients at the logits of the tasks with a callable, in order.
    """
    x, weights, biases = x.detach(), [w.detach() for w in weights], [b.detach() for b in biases]
    # What is differentiated here lies outside of a transform around the call.
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.enable_grad():
        first = _first(x, weights, biases).clone().requires_grad_()
        logits = reference.wide(_behind_first(first, x.shape[0], weights, biases, layout, hidden))
        losses, _ = reference.losses_of(logits, labels, layout)
        total = losses.sum()
        callables = iter(outside)
        for name, task in layout.tasks.items():
            if callable(task.loss) and outside:
                total = total + (logits[:, layout.slices[name]] * next(callables)).sum()
        (at_first,) = torch.autograd.grad(total, first)
    widths = [weights[0].shape[0] // len(layout.names)] * len(layout.names) if len(weights) > 1 else layout.widths
    return reference.gramian(reference.wide(at_first), reference.wide(weights[0]), widths)


def own_labels(y: Tensor, layout: TaskLayout, index: int) -> Tensor:
    """The columns of routed labels ``[N]`` or ``[N, W]`` that a task reads."""
    task = layout.tasks[layout.names[index]]
    if y.dim() == 1:
        return y
    own = y[:, : label_columns(task) or y.shape[1]]
    return own[:, 0] if task.loss == "cross_entropy" else own


def masked_labels(route: Tensor, y: Tensor, layout: TaskLayout) -> list[Tensor | None]:
    """Routed labels as one tensor for each task, missing in the rows of the others; float64, which holds them all."""
    labels: list[Tensor | None] = []
    for index, task in enumerate(layout.tasks.values()):
        own = own_labels(y, layout, index)
        wanted = label_columns(task)
        # Labels too narrow for a task are refused where it has rows.
        if not isinstance(task.loss, str) or (1 if own.dim() == 1 else own.shape[1]) != wanted:
            labels.append(None)
            continue
        mine = route == index if own.dim() == 1 else (route == index).unsqueeze(1)
        labels.append(torch.where(mine & labelled(task, own), own.double(), float("nan")))
    return labels


def rows_by_task(route: Tensor, tasks: int) -> list[tuple[int, Tensor]]:
    """The tasks that occur, and the rows of each in order."""
    order = torch.argsort(route, stable=True)
    counts = torch.bincount(route, minlength=tasks).tolist()
    return [(task, rows) for task, rows in enumerate(order.split(counts)) if rows.shape[0]]


def keep_mask(seed: Tensor, rows: Tensor, tasks: int, units: int, layer: int, dropout: float) -> Tensor:
    """Which hidden units stay: bool ``[N, tasks * units]``.

    A hash of seed, row, task, layer and unit: splitmix64 (Steele, Lea & Flood 2014) makes a key of all but the unit,
    and the finaliser of MurmurHash3 the 32 bits of each unit from that key.
    """
    device = rows.device
    task = torch.arange(tasks, device=device) + seed[1].to(device)
    key = seed[0].to(device) + rows.unsqueeze(1) * _signed(0x9E3779B97F4A7C15)
    key = key + (task * 64 + layer + 1) * _signed(0xD1B54A32D192ED03)
    key = (key ^ _shift(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shift(key, 27)) * _signed(0x94D049BB133111EB)
    key = (key ^ _shift(key, 31)).unsqueeze(2)
    low, high = key & _WORD, _shift(key, 32)
    v = (low + torch.arange(units, device=device) * 0x9E3779B9) & _WORD
    v = ((v ^ (v >> 16)) * 0x85EBCA6B) & _WORD
    v = v ^ high
    v = ((v ^ (v >> 13)) * 0xC2B2AE35) & _WORD
    v = v ^ (v >> 16)
    return (v >= round(dropout * 2**32)).reshape(rows.shape[0], tasks * units)


_WORD = 0xFFFFFFFF


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shift(v: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (v >> bits) & ((1 << (64 - bits)) - 1)


def _has_values(route: Tensor) -> bool:
    return not torch.compiler.is_compiling() and has_values(route)


def _first(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return F.linear(x, weights[0], biases[0] if biases else None)


def _act(h: Tensor, rows: Tensor | None, tasks: int, layer: int, hidden: Hidden, first_task: int = 0) -> Tensor:
    """Activation and dropout of ``[N, tasks * units]``; ``rows``: their numbers, or None: all in order."""
    h = ACTIVATIONS[hidden.act](h)
    if hidden.dropout == 0.0:
        return h
    assert hidden.seed is not None
    seed = hidden.seed if first_task == 0 else hidden.seed + torch.tensor([0, first_task], device="cpu")
    rows = torch.arange(h.shape[0], device=h.device) if rows is None else rows
    kept = keep_mask(seed, rows, tasks, h.shape[1] // tasks if tasks else 0, layer, hidden.dropout)
    scale = 0.0 if hidden.dropout == 1.0 else 1.0 / (1.0 - hidden.dropout)
    return torch.where(kept, h, 0.0) * scale


def _behind_first(
    h: Tensor,
    n: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden,
) -> Tensor:
    """All that comes behind the first layer's product, for all tasks: ``[N, K]``."""
    tasks, last = len(layout.names), len(weights) - 1
    for layer in range(last):
        h = _act(h, None, tasks, layer, hidden)
        units = h.shape[1] // tasks
        weight = weights[layer + 1]
        if layer + 1 < last or len(set(layout.widths)) == 1:
            w = weight.reshape(tasks, weight.shape[0] // tasks, units)
            h = torch.bmm(h.reshape(n, tasks, units).transpose(0, 1), w.transpose(1, 2)).transpose(0, 1)
            h = h.reshape(n, weight.shape[0])
        else:
            own = h.split(units, 1)
            h = torch.cat([o @ w.t() for o, w in zip(own, weight.split(layout.widths), strict=True)], 1)
        h = h + biases[layer + 1] if biases else h
    return h


def _one_task(
    x: Tensor,
    rows: Tensor,
    task: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layout: TaskLayout,
    hidden: Hidden,
) -> Tensor:
    """Some rows through one head: ``[n, C_t]``."""
    h, last = x[rows], len(weights) - 1
    for layer, weight in enumerate(weights):
        if layer == last:
            own = layout.slices[layout.names[task]]
        else:
            units = weight.shape[0] // len(layout.names)
            own = slice(task * units, (task + 1) * units)
        h = F.linear(h, weight[own], biases[layer][own] if biases else None)
        h = _act(h, rows, 1, layer, hidden, task) if layer < last else h
    return h
