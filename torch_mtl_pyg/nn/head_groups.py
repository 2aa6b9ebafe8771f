"""Some of the heads together, and each head on rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops import multi_head_linear_split, multi_head_mlp_split
from ..ops.multi_head_loss import Labels
from ..task import TaskLayout, TaskLosses
from . import freezing
from .heads import MultiTaskHeads
from .loss import losses_of_all


@dataclass
class _Some:
    """What the losses ask heads for, of some of them."""

    layout: TaskLayout
    hidden_channels: Sequence[int]
    depth: int

    rows_of = MultiTaskHeads.rows_of

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.layout.tasks


def outputs_of(heads: MultiTaskHeads, names: Sequence[str], h: Tensor) -> dict[str, Tensor]:
    """The outputs of some heads, in packing order, in one launch."""
    if len(names) == len(heads.tasks):
        return heads(h)  # type: ignore[no-any-return]
    if len(names) == 1:
        return {names[0]: heads(h, task=names[0])}
    weights, biases = _rows(heads, names)
    layout = TaskLayout({name: heads.tasks[name] for name in names})
    if heads.depth == 1:
        outputs = multi_head_linear_split(h, weights[0], biases[0] if biases else None, layout.widths)
    else:
        outputs = multi_head_mlp_split(h, weights, biases, layout, heads._hidden())
    return dict(zip(names, outputs, strict=True))


def outputs_of_own(heads: MultiTaskHeads, h: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The output of each head on rows of its own, in one launch. ``sizes``: name to number of rows, as they lie."""
    if len(sizes) == 1:
        return {name: heads(h, task=name) for name in sizes}
    out = heads(h, task=routes(heads, sizes, h))
    parts = zip(sizes, out.split(list(sizes.values())), strict=True)
    return {name: part[:, : heads.tasks[name].out_channels] for name, part in parts}


def routes(heads: MultiTaskHeads, sizes: Mapping[str, int], h: Tensor) -> Tensor:
    """The index of the task of each row ``[N]``."""
    places = torch.tensor([heads.layout.names.index(name) for name in sizes], device=h.device)
    counts = torch.tensor(list(sizes.values()), device=h.device)
    return places.repeat_interleave(counts, output_size=h.shape[0])


def losses_of(heads: MultiTaskHeads, names: Sequence[str], h: Tensor, y: Labels, gramian: bool) -> TaskLosses:
    """The losses of some heads; ``names`` of the result are all of the heads, the others' losses are 0."""
    if len(names) == len(heads.tasks):
        return heads.loss(h, y, gramian=gramian)
    layout = TaskLayout({name: heads.tasks[name] for name in names})
    some: Any = _Some(layout, heads.hidden_channels, heads.depth)
    losses = losses_of_all(some, h, y, *_rows(heads, names), heads._hidden(), gramian)
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


def _rows(heads: MultiTaskHeads, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of the packed layers that belong to some heads."""
    weights, biases = freezing.effective(heads)
    own_weights, own_biases = [], []
    for layer, weight in enumerate(weights):
        slices = [heads.rows_of(layer, name) for name in names]
        if all(a.stop == b.start for a, b in pairwise(slices)):
            rows: slice | Tensor = slice(slices[0].start, slices[-1].stop)
        else:
            rows = torch.cat([torch.arange(s.start, s.stop, device=weight.device) for s in slices])
        own_weights.append(weight[rows])
        if biases:
            own_biases.append(biases[layer][rows])
    return own_weights, own_biases
