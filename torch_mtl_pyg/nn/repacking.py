"""Moving heads between single modules and the packed parameters, and between packed layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear

from ..ops._checks import check_floating
from ..task import TaskLayout
from . import freezing

if TYPE_CHECKING:
    from .heads import MultiTaskHeads


def named_modules(modules: Mapping[str, nn.Module] | nn.ModuleList) -> dict[str, Any]:
    """Modules by name; those of a list are called ``"0"``, ``"1"``, ...

    Raises:
        TypeError: ``modules`` has the wrong type.
        ValueError: There is none.
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
    return named


def linear_modules(modules: Mapping[str, nn.Module] | nn.ModuleList) -> dict[str, Any]:
    """Checks that modules are linear layers which fit into one packed parameter.

    Raises:
        TypeError: ``modules`` has the wrong type, a module is no linear layer, or dtypes differ.
        ValueError: There is none; input sizes or devices differ; or some have a bias and some have none.
    """
    named = named_modules(modules)
    first_name = next(iter(named))
    first = named[first_name]
    for name, module in named.items():
        # Exactly these types: a subclass (also weight_norm, which makes one) may compute something else.
        if type(module) not in (nn.Linear, Linear):
            raise TypeError(f"modules[{name!r}]: expected a linear layer, got {type(module).__name__}.")
        weight = module.weight
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"modules[{name!r}]: expected an initialised layer, got a lazy one.")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"modules[{name!r}]: expected a layer without hooks, got one with hooks.")
        check_floating(f"modules[{name!r}].weight", weight, 2, "[C, D]")
        if module.bias is not None and module.bias.requires_grad != weight.requires_grad:
            raise ValueError(
                f"modules[{name!r}]: expected weight and bias both trainable or both frozen, got "
                f"requires_grad={weight.requires_grad} and {module.bias.requires_grad}."
            )
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


def check_optimizer(heads: MultiTaskHeads, optimizer: object) -> None:
    """Checks that an optimizer's state can follow the rows of the packed parameters.

    Raises:
        TypeError: It is no optimizer of ``torch.optim``.
        ValueError: It does not hold all parameters of the heads, or its state does not lie row by row.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in heads.named_parameters(recurse=False):
        if id(parameter) not in held:
            raise ValueError(f"optimizer: expected one that holds {name} of these heads, got one that does not.")
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer: expected state of the shape of {name}, {list(parameter.shape)}, "
                    f"got {list(value.shape)} for {key!r} of {type(optimizer).__name__}."
                )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer: expected one whose state lies row by row, got LBFGS: make a new one.")


def repack(heads: MultiTaskHeads, layout: TaskLayout, optimizer: torch.optim.Optimizer | None) -> None:
    """Gives heads a new layout: those of the same name keep their values, new ones are drawn."""
    computed = freezing.computed_parameters(heads)
    if computed:
        raise ValueError(
            f"{computed[0]}: expected a plain parameter of heads whose tasks change, got one computed from others."
        )
    if optimizer is not None:
        check_optimizer(heads, optimizer)
    old_layout = heads.layout
    for layer in range(heads.depth):
        moves = [
            (heads.rows_of(layer, n), heads.rows_of(layer, n, layout)) for n in layout.names if n in old_layout.slices
        ]
        new = [heads.rows_of(layer, n, layout) for n in layout.names if n not in old_layout.slices]
        bound = heads.bound_of(layer)
        for name in heads.layer_names(layer):
            old = getattr(heads, name)
            if old is None:
                continue
            rows = max(target.stop for target in [target for _, target in moves] + new)
            fresh = nn.Parameter(old.detach().new_empty(rows, *old.shape[1:]), old.requires_grad)
            with torch.no_grad():
                for source, target in moves:
                    fresh[target] = old[source]
                for target in new:
                    fresh[target].uniform_(-bound, bound)
            setattr(heads, name, fresh)
            if optimizer is not None:
                _move_state(optimizer, old, fresh, moves)
    heads.layout = layout
    freezing.set_frozen(heads, heads._frozen & frozenset(layout.names))


# State that does not start at zero, and the option of the parameter group it starts at.
_FRESH_STATE = {"step_size": "lr", "sum": "initial_accumulator_value"}


def _move_state(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, moves: list[tuple[slice, slice]]
) -> None:
    """Puts a new parameter in the place of an old one; state of its shape follows row by row."""
    options: dict[str, Any] = {}
    for group in optimizer.param_groups:
        if any(p is old for p in group["params"]):
            options = group
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape and value.dim() > 0:
            moved = value.new_full(new.shape, float(options.get(_FRESH_STATE.get(key, ""), 0.0)))
            for source, target in moves:
                moved[target] = value[source]
            state[key] = moved
    optimizer.state[new] = state
