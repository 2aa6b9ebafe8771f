"""Moving heads between single modules and the packed parameters, and between packed layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear

from ..task import TaskLayout

if TYPE_CHECKING:
    from .heads import MultiTaskHeads


def linear_modules(modules: Mapping[str, nn.Module] | nn.ModuleList) -> dict[str, Any]:
    """Checks that modules are linear layers which fit into one packed parameter.

    Raises:
        TypeError: ``modules`` has the wrong type, a module is no linear layer, or dtypes differ.
        ValueError: There is none; input sizes or devices differ; or some have a bias and some have none.
    """
    if isinstance(modules, nn.ModuleDict):
        named: dict[str, Any] = dict(modules.items())
    elif isinstance(modules, Mapping):
        named = dict(modules)
    elif isinstance(modules, (nn.ModuleList, list, tuple)):
        named = {str(i): module for i, module in enumerate(modules)}
    else:
        raise TypeError(f"modules: expected a dict or ModuleList, got {type(modules).__name__}.")
    if not named:
        raise ValueError("modules: expected at least one, got none.")
    first_name = next(iter(named))
    first = named[first_name]
    for name, module in named.items():
        if not isinstance(module, (nn.Linear, Linear)):
            raise TypeError(f"modules[{name!r}]: expected a linear layer, got {type(module).__name__}.")
        weight = module.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"modules[{name!r}]: expected an initialised layer, got a lazy one.")
        if weight.shape[1] != first.weight.shape[1]:
            raise ValueError(
                f"modules[{name!r}]: expected {first.weight.shape[1]} inputs, as modules[{first_name!r}] has, "
                f"got {weight.shape[1]}."
            )
        if weight.dtype != first.weight.dtype:
            raise TypeError(f"modules[{name!r}]: expected dtype {first.weight.dtype}, got {weight.dtype}.")
        if weight.device != first.weight.device:
            raise ValueError(f"modules[{name!r}]: expected device {first.weight.device}, got {weight.device}.")
        if (module.bias is None) != (first.bias is None):
            raise ValueError(
                f"modules[{name!r}]: expected {'no' if first.bias is None else 'a'} bias, as modules[{first_name!r}] "
                f"has {'none' if first.bias is None else 'one'}."
            )
    return named


def linear_of(heads: MultiTaskHeads, name: str) -> nn.Linear:
    """One head as a linear layer of its own."""
    rows = heads.slices[name]
    linear = nn.Linear(
        heads.in_channels,
        heads.tasks[name].out_channels,
        bias=heads.bias is not None,
        device=heads.weight.device,
        dtype=heads.weight.dtype,
    )
    with torch.no_grad():
        linear.weight.copy_(heads.weight[rows])
        if heads.bias is not None:
            linear.bias.copy_(heads.bias[rows])
    if name in heads.frozen:
        linear.requires_grad_(False)
    return linear.train(heads.training)


def repack(heads: MultiTaskHeads, layout: TaskLayout, optimizer: torch.optim.Optimizer | None) -> None:
    """Gives heads a new layout: those of the same name keep their values, new ones are drawn."""
    old_layout, old_weight, old_bias = heads.layout, heads.weight, heads.bias
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if id(old_weight) not in held:
            raise ValueError("optimizer: expected one that holds the parameters of these heads, got one that does not.")
    moves = [(old_layout.slices[n], layout.slices[n]) for n in layout.names if n in old_layout.slices]
    with torch.no_grad():
        heads.layout = layout
        heads.weight = nn.Parameter(old_weight.new_empty(layout.total, heads.in_channels), old_weight.requires_grad)
        if old_bias is not None:
            heads.bias = nn.Parameter(old_bias.new_empty(layout.total), old_bias.requires_grad)
        heads.reset_parameters()
        for old, new in moves:
            heads.weight[new] = old_weight[old]
            if heads.bias is not None and old_bias is not None:
                heads.bias[new] = old_bias[old]
    heads._layout_changed()
    if optimizer is not None:
        _move_state(optimizer, old_weight, heads.weight, moves)
        if old_bias is not None and heads.bias is not None:
            _move_state(optimizer, old_bias, heads.bias, moves)


def _move_state(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, moves: list[tuple[slice, slice]]
) -> None:
    """Puts a new parameter in the place of an old one; state of its shape follows row by row and starts at zero."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            moved = value.new_zeros(new.shape)
            for source, target in moves:
                moved[target] = value[source]
            state[key] = moved
    optimizer.state[new] = state
