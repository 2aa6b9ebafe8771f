"""The packed parameters of a convolution: their shapes, their first values, and those whose shape is not known yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import inits
from torch_geometric.nn.aggr import MultiAggregation

from ..task import TaskLayout
from .features import Channels, Features

if TYPE_CHECKING:
    from .conv import MultiTaskConv

# To PyTorch's annotations it is no parameter.
_Lazy: Any = UninitializedParameter
Weights = nn.Parameter | nn.ParameterList | None


def create(conv: MultiTaskConv, bias: bool) -> None:
    """Gives a layer its parameters, without values."""
    conv.weight = _new(_aggregated(conv, conv.channels[0]), conv.layout)
    if conv.root_weight:
        conv.weight_root = _new(conv.channels[1], conv.layout)
    else:
        conv.register_parameter("weight_root", None)
    conv.register_parameter("bias", nn.Parameter(torch.zeros(conv.layout.total)) if bias else None)


def _aggregated(conv: MultiTaskConv, channels: Channels) -> Channels:
    """Channels after the aggregation: several ones side by side have several times as many."""
    module = conv.aggr_module
    if not isinstance(module, MultiAggregation) or channels == -1:
        return channels
    if isinstance(channels, int):
        return int(module.get_out_channels(channels))
    return {task: int(module.get_out_channels(width)) for task, width in channels.items()}


def _new(channels: Channels, layout: TaskLayout) -> nn.Parameter | nn.ParameterList:
    if channels == -1:
        lazy: nn.Parameter = _Lazy()
        return lazy
    if isinstance(channels, int):
        return nn.Parameter(torch.empty(layout.total, channels))
    return nn.ParameterList(torch.empty(layout.widths[i], width) for i, width in enumerate(channels.values()))


def rows_of(weight: Weights, layout: TaskLayout, task: int) -> Tensor | None:
    """``[C_t, F_t]`` of one task; None where there is none, or none yet."""
    if weight is None or isinstance(weight, UninitializedParameter):
        return None
    if isinstance(weight, nn.ParameterList):
        own: Tensor = weight[task]
        return own
    return weight[layout.slices[layout.names[task]]]


def first(weight: Any) -> Tensor:
    """One of the tensors of a weight: all have its dtype and device."""
    tensor: Tensor = weight[0] if isinstance(weight, nn.ParameterList) else weight
    return tensor


def block_weights(weight: Any, features: Features, layout: TaskLayout) -> Sequence[Tensor]:
    """The blocks of weights that read these features: one for all tasks, or one for each."""
    if isinstance(weight, nn.ParameterList):
        return list(weight)
    return [weight] if features.widths is None else weight.split(layout.widths)


def draw(conv: MultiTaskConv, neighbours: bool = True, root: bool = True) -> None:
    """First values, task by task in the order in which a layer per task would draw them."""
    gcn = conv.normalize == "gcn"
    with torch.no_grad():
        for i, name in enumerate(conv.layout.names):
            own = rows_of(conv.weight, conv.layout, i)
            if neighbours and own is not None:
                if gcn:
                    inits.glorot(own)
                else:
                    _as_linear(own)
                if conv.bias is not None:
                    bias = conv.bias[conv.layout.slices[name]]
                    inits.zeros(bias) if gcn else inits.uniform(own.shape[1], bias)
            own = rows_of(conv.weight_root, conv.layout, i)
            if root and own is not None:
                _as_linear(own)


def _as_linear(weight: Tensor) -> None:
    inits.kaiming_uniform(weight, fan=weight.shape[1], a=math.sqrt(5))


# ---- Shapes found later.


def is_lazy(conv: MultiTaskConv) -> bool:
    """Whether a parameter has no shape yet."""
    return isinstance(conv.weight, UninitializedParameter) or isinstance(conv.weight_root, UninitializedParameter)


def settle(conv: MultiTaskConv, sources: Features, targets: Features | None) -> None:
    """Gives parameters that wait for it their shape and first values.

    Raises:
        ValueError: Every task has features of its own, and their widths differ.
    """
    if not is_lazy(conv):
        return
    for side, (name, features) in enumerate((("weight", sources), ("weight_root", targets))):
        if features is None or not isinstance(getattr(conv, name), UninitializedParameter):
            continue
        width = features.packed.shape[1] if features.widths is None else features.widths[0]
        _set_channels(conv, side, width)
        rows = _aggregated(conv, width) if name == "weight" else width
        getattr(conv, name).materialize((conv.layout.total, rows))
        draw(conv, neighbours=name == "weight", root=name == "weight_root")


def settle_for(conv: MultiTaskConv, state_dict: Any, prefix: str) -> None:
    """Has parameters with and without a shape take the place of each other, as a ``state_dict`` holds them."""
    for side, name in enumerate(("weight", "weight_root")):
        saved, mine = state_dict.get(f"{prefix}{name}"), getattr(conv, name)
        if saved is None or isinstance(mine, nn.ParameterList) or mine is None:
            continue
        if isinstance(saved, UninitializedParameter):
            setattr(conv, name, _Lazy(device=mine.device, dtype=mine.dtype))
            _set_channels(conv, side, -1)
        elif isinstance(mine, UninitializedParameter) and saved.dim() == 2:
            mine.materialize(saved.shape)
            aggregations = conv.aggr_module if name == "weight" else None
            factor = aggregations.get_out_channels(1) if isinstance(aggregations, MultiAggregation) else 1
            _set_channels(conv, side, saved.shape[1] // factor)


def _set_channels(conv: MultiTaskConv, side: int, width: int) -> None:
    conv.channels = (width, conv.channels[1]) if side == 0 else (conv.channels[0], width)
