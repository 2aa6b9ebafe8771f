"""Some of the heads together, and each head on rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..ops.multi_head_linear import multi_head_linear, multi_head_linear_split
from ..task import TaskLayout, TaskLosses
from . import freezing
from .heads import MultiTaskHeads
from .loss import Labels, losses_of_all


def outputs_of(heads: MultiTaskHeads, names: Sequence[str], h: Tensor) -> dict[str, Tensor]:
    """The outputs of some heads, in packing order, in one launch."""
    if len(names) == len(heads.tasks):
        return heads(h)  # type: ignore[no-any-return]
    if len(names) == 1 or heads.hidden_channels is not None:
        return {name: heads(h, task=name) for name in names}
    weight, bias = _rows(heads, names)
    widths = tuple(heads.tasks[name].out_channels for name in names)
    return dict(zip(names, multi_head_linear_split(h, weight, bias, widths), strict=True))


def outputs_of_own(heads: MultiTaskHeads, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output of each head on rows of its own, which no other head sees."""
    if len(parts) == 1 or heads.hidden_channels is not None:
        return {name: heads(part, task=name) for name, part in parts.items()}
    weight, bias = freezing.effective(heads)
    # Split once: the gradients of slices would each be as large as all heads.
    weights = dict(zip(heads.tasks, weight.split(heads.layout.widths), strict=True))
    biases = (
        dict.fromkeys(heads.tasks)
        if bias is None
        else dict(zip(heads.tasks, bias.split(heads.layout.widths), strict=True))
    )
    return {name: multi_head_linear(part, weights[name], biases[name]) for name, part in parts.items()}


def losses_of(heads: MultiTaskHeads, names: Sequence[str], h: Tensor, y: Labels, gramian: bool) -> TaskLosses:
    """The losses of some heads; ``names`` of the result are all of the heads, the others' losses are 0."""
    if len(names) == len(heads.tasks):
        return heads.loss(h, y, gramian=gramian)
    if heads.hidden_channels is not None:
        columns = y if isinstance(y, Mapping) else dict(zip(names, y.unbind(1), strict=True))
        return heads.loss(h, {**dict.fromkeys(heads.tasks), **columns}, gramian=gramian)
    weight, bias = _rows(heads, names)
    layout = TaskLayout({name: heads.tasks[name] for name in names})
    losses = losses_of_all(h, weight, bias, y, layout, gramian)
    places = torch.tensor([heads.layout.names.index(name) for name in names], device=losses.per_task.device)
    count = len(heads.tasks)
    product = None
    if losses.gramian is not None:
        product = losses.gramian.new_zeros(count, count)
        product[places.unsqueeze(1), places] = losses.gramian
    return TaskLosses(
        heads.layout.names,
        losses.per_task.new_zeros(count).index_add(0, places, losses.per_task),
        losses.total,
        losses.count.new_zeros(count).index_add(0, places, losses.count),
        product,
    )


def sum_of(parts: Sequence[TaskLosses]) -> TaskLosses:
    """Losses of disjoint tasks, each with zeros for the others, as one."""
    if len(parts) == 1:
        return parts[0]
    dtype = torch.float64 if any(part.per_task.dtype == torch.float64 for part in parts) else torch.float32
    gramians = [part.gramian for part in parts if part.gramian is not None]
    return TaskLosses(
        parts[0].names,
        torch.stack([part.per_task.to(dtype) for part in parts]).sum(0),
        torch.stack([part.total.to(dtype) for part in parts]).sum(0),
        torch.stack([part.count for part in parts]).sum(0),
        torch.stack(gramians).sum(0) if gramians else None,
    )


def _rows(heads: MultiTaskHeads, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """The rows of the packed parameters that belong to some heads."""
    weight, bias = freezing.effective(heads)
    slices = [heads.slices[name] for name in names]
    if all(a.stop == b.start for a, b in pairwise(slices)):
        rows: slice | Tensor = slice(slices[0].start, slices[-1].stop)
    else:
        rows = torch.cat([torch.arange(s.start, s.stop, device=weight.device) for s in slices])
    return weight[rows], None if bias is None else bias[rows]
