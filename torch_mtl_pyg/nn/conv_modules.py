"""Moving a convolution between single PyG layers and the packed parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric.nn import GCNConv, Linear, MessagePassing, SAGEConv

from . import conv_parameters

if TYPE_CHECKING:
    from .conv import MultiTaskConv

# Options of the layers that this one does not have, and the value that means "not used".
_UNUSED: dict[type[MessagePassing], dict[str, Any]] = {
    SAGEConv: {"project": False, "normalize": False},
    GCNConv: {"improved": False, "cached": False, "normalize": True, "add_self_loops": True},
}
# Aggregations that are what their name says: no options, no parameters.
_NAMED = ("add", "sum", "mean", "max", "min", "mul", "var", "std", "median")
_HOOKS = tuple(
    f"{step}_forward{pre}_hooks" for step in ("", "_propagate", "_message", "_aggregate") for pre in ("", "_pre")
)


def pack(cls: type[MultiTaskConv], modules: Mapping[str, nn.Module]) -> MultiTaskConv:
    """The layer that computes what these do; see :meth:`MultiTaskConv.from_modules`."""
    layers = _checked(modules)
    parts = {name: _parameters(layer) for name, layer in layers.items()}
    _check_parameters(parts)
    first = next(iter(layers.values()))
    gcn = isinstance(first, GCNConv)
    sizes = {name: _in_channels(layer) for name, layer in layers.items()}
    pair: list[int | dict[str, int]] = []
    for side in (0, 1):
        widths = {name: size[side] for name, size in sizes.items()}
        pair.append(next(iter(widths.values())) if len(set(sizes.values())) == 1 else widths)
    with torch.device("meta"):  # draws no random numbers
        conv = cls(
            pair[0] if pair[0] == pair[1] else pair,
            {name: layer.out_channels for name, layer in layers.items()},
            first.aggr,
            parts[next(iter(parts))][1] is not None,
            "gcn" if gcn else None,
            parts[next(iter(parts))][2] is not None,
            flow=first.flow,
        )
    conv.aggr_module = copy.deepcopy(first.aggr_module)
    for name, own in zip(("weight", "weight_root", "bias"), zip(*parts.values(), strict=True), strict=True):
        if own[0] is None:
            continue
        if isinstance(getattr(conv, name), nn.ParameterList):
            setattr(conv, name, nn.ParameterList(nn.Parameter(t.detach().clone(), t.requires_grad) for t in own))
        else:
            setattr(conv, name, nn.Parameter(torch.cat([t.detach() for t in own]), own[0].requires_grad))
    conv.train(first.training)
    return conv


def unpack(conv: MultiTaskConv) -> dict[str, MessagePassing]:
    """One layer per task; see :meth:`MultiTaskConv.to_modules`."""
    if conv_parameters.is_lazy(conv):
        raise ValueError("to_modules: expected a layer whose parameters have a shape, got a lazy one: call it first.")
    if conv.normalize and (conv.root_weight or conv.aggr not in ("sum", "add")):
        raise ValueError(
            "to_modules: expected root_weight=False and aggr='sum' with normalize='gcn', as GCNConv has, "
            f"got {conv.root_weight} and {conv.aggr!r}."
        )
    return {name: _layer(conv, i) for i, name in enumerate(conv.layout.names)}


def _layer(conv: MultiTaskConv, task: int) -> MessagePassing:
    name, width = conv.layout.names[task], conv.layout.widths[task]
    options: dict[str, Any] = {"bias": conv.bias is not None, "flow": conv.flow}
    sizes = tuple(side if isinstance(side, int) else side[name] for side in conv.channels)
    aggr = conv.aggr if conv.aggr in _NAMED else copy.deepcopy(conv.aggr_module)
    with torch.device("meta"):  # draws no random numbers
        if conv.normalize:
            layer: Any = GCNConv(sizes[0], width, **options)
        else:
            layer = SAGEConv(
                sizes if conv.bipartite else sizes[0], width, aggr, root_weight=conv.root_weight, **options
            )
    layer.aggr_module = copy.deepcopy(conv.aggr_module)
    weight, root, bias = (
        conv_parameters.rows_of(conv.weight, conv.layout, task),
        conv_parameters.rows_of(conv.weight_root, conv.layout, task),
        None if conv.bias is None else conv.bias[conv.layout.slices[name]],
    )
    assert weight is not None
    if conv.normalize:
        layer.lin.weight, layer.bias = _copied(weight), _copied(bias)
    else:
        layer.lin_l.weight, layer.lin_l.bias = _copied(weight), _copied(bias)
        if root is not None:
            layer.lin_r.weight = _copied(root)
    trained: MessagePassing = layer.train(conv.training)
    return trained


def _copied(t: Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t.detach().clone(), t.requires_grad)


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, weight of the root, and bias."""
    if isinstance(layer, GCNConv):
        return layer.lin.weight, None, layer.bias
    return layer.lin_l.weight, layer.lin_r.weight if layer.root_weight else None, layer.lin_l.bias


def _in_channels(layer: Any) -> tuple[int, int]:
    # Not in_channels, which stays -1 in a layer that was lazy.
    weight, root, _ = _parameters(layer)
    given = layer.in_channels
    other = given[1] if isinstance(given, (tuple, list)) else weight.shape[1]
    return weight.shape[1], other if root is None or isinstance(root, UninitializedParameter) else root.shape[1]


def _checked(modules: object) -> dict[str, Any]:
    """Checks that layers are of one kind and share all options.

    Raises:
        TypeError: ``modules`` is no mapping, or a layer is of another kind.
        ValueError: There is none, or an option does not fit.
    """
    if isinstance(modules, nn.ModuleDict):
        modules = dict(modules.items())
    if not isinstance(modules, Mapping):
        raise TypeError(f"modules: expected a dict from task to layer, got {type(modules).__name__}.")
    if not modules:
        raise ValueError("modules: expected at least one, got none.")
    layers: dict[str, Any] = dict(modules)
    first_name, first = next(iter(layers.items()))
    for name, layer in layers.items():
        own = f"modules[{name!r}]"
        kind = type(layer)
        # Exactly these types: a subclass may compute something else.
        if kind not in _UNUSED:
            raise TypeError(f"{own}: expected a SAGEConv or a GCNConv, got {kind.__name__}.")
        if kind is not type(first):
            raise TypeError(
                f"{own}: expected a {type(first).__name__}, as modules[{first_name!r}], got {kind.__name__}."
            )
        for option, unused in _UNUSED[kind].items():
            if getattr(layer, option) != unused:
                raise ValueError(f"{own}: expected {option}={unused}, got {getattr(layer, option)}.")
        if layer.aggr not in _NAMED:
            raise ValueError(f"{own}: expected aggr to be one of {', '.join(_NAMED)}, got {layer.aggr}.")
        if kind is GCNConv and layer.aggr not in ("add", "sum"):
            raise ValueError(f"{own}: expected aggr='add' of a GCNConv, got {layer.aggr!r}.")
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            raise ValueError(f"{own}: expected a layer without hooks, got one with hooks.")
        for part in ("lin", "lin_l", "lin_r"):
            linear = getattr(layer, part, None)
            if linear is None:
                continue
            if type(linear) not in (nn.Linear, Linear):  # also weight_norm makes a subclass
                raise TypeError(f"{own}.{part}: expected a linear layer, got {type(linear).__name__}.")
            if linear._forward_hooks or (linear._forward_pre_hooks and not _is_lazy(linear)):
                raise ValueError(f"{own}.{part}: expected a layer without hooks, got one with hooks.")
        for option in ("aggr", "flow", "root_weight", "node_dim", "training"):
            mine, theirs = getattr(layer, option, None), getattr(first, option, None)
            if mine != theirs:
                raise ValueError(f"{own}: expected {option}={theirs!r}, as modules[{first_name!r}] has, got {mine!r}.")
    return layers


def _is_lazy(linear: Any) -> bool:
    """Whether its one hook is that which gives it a shape."""
    return isinstance(linear.weight, UninitializedParameter)


def _check_parameters(parts: Mapping[str, tuple[Tensor | None, ...]]) -> None:
    first_name = next(iter(parts))
    for name, tensors in parts.items():
        own = f"modules[{name!r}]"
        for kind, mine, theirs in zip(("weight", "root weight", "bias"), tensors, parts[first_name], strict=True):
            if (mine is None) != (theirs is None):
                raise ValueError(
                    f"{own}: expected {'no' if theirs is None else 'a'} {kind}, as modules[{first_name!r}] has "
                    f"{'none' if theirs is None else 'one'}."
                )
            if mine is None or theirs is None:
                continue
            if isinstance(mine, UninitializedParameter):
                raise ValueError(f"{own}: expected an initialised layer, got a lazy one.")
            if mine.dtype != theirs.dtype:
                raise TypeError(f"{own}: expected dtype {theirs.dtype}, got {mine.dtype}.")
            if mine.device != theirs.device:
                raise ValueError(f"{own}: expected device {theirs.device}, got {mine.device}.")
            if mine.requires_grad != theirs.requires_grad:
                raise ValueError(
                    f"{own}: expected requires_grad={theirs.requires_grad} of its {kind}, got {mine.requires_grad}."
                )
