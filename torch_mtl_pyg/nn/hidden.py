"""Hidden layers of the heads: their options, one head alone, and the exchange with ``torch.nn.Sequential``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear
from torch_geometric.nn.resolver import activation_resolver, swish

from ..ops import Hidden, multi_head_linear, multi_head_mlp
from ..ops.reference_mlp import ACTIVATIONS
from ..task import checked_integer
from .repacking import linear_modules, named_modules

if TYPE_CHECKING:
    from .heads import MultiTaskHeads

# The masks number the layers of a task with 6 bits.
MOST_HIDDEN = 62

_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}


def hidden_widths(hidden_channels: object) -> tuple[int, ...]:
    """Checks the widths of the hidden layers; None: there is none.

    Raises:
        TypeError: Neither None nor an int nor a sequence of ints.
        ValueError: A width is below 1, or the sequence is empty.
    """
    if hidden_channels is None:
        return ()
    if isinstance(hidden_channels, Sequence) and not isinstance(hidden_channels, str):
        widths = tuple(checked_integer(f"hidden_channels[{i}]", width) for i, width in enumerate(hidden_channels))
        if not widths:
            raise ValueError("hidden_channels: expected None or at least one width, got none.")
    else:
        widths = (checked_integer("hidden_channels", hidden_channels),)
    if len(widths) > MOST_HIDDEN:
        raise ValueError(f"hidden_channels: expected at most {MOST_HIDDEN} layers, got {len(widths)}.")
    for width in widths:
        if width < 1:
            raise ValueError(f"hidden_channels: expected widths of at least 1, got {width}.")
    return widths


def checked_act(act: object, used: bool) -> str:
    """The name of an activation as the ops know it; where it is not used, any that PyG knows.

    Raises:
        TypeError: No string.
        ValueError: Not such a name.
    """
    if not isinstance(act, str):
        raise TypeError(f"act: expected the name of an activation, got {type(act).__name__}.")
    try:
        module = activation_resolver(act)
    except (TypeError, ValueError) as error:
        raise ValueError(f"act: expected the name of an activation, got {act!r}.") from error
    name = act_of(module)
    if name is None and used:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)} for hidden layers, got {act!r}.")
    return name or act


def act_of(module: nn.Module) -> str | None:
    """What the ops call an activation module, or None if they do not have it."""
    for name, kind in _MODULES.items():
        if type(module) is kind:
            plain = getattr(module, "approximate", "none") == "none" and getattr(module, "alpha", 1.0) == 1.0
            return name if plain else None
    return "silu" if module is swish else None


def output_of(
    heads: MultiTaskHeads, name: str, x: Tensor, weights: list[Tensor], biases: list[Tensor], hidden: Hidden
) -> Tensor:
    """One head alone, ``[N, C_t]``."""
    own_weights, own_biases, own_hidden = of_task(heads, name, weights, biases, hidden)
    if heads.depth == 1:
        return multi_head_linear(x, own_weights[0], own_biases[0] if own_biases else None)
    return multi_head_mlp(x, own_weights, own_biases, heads.layout.only(name), own_hidden)


def of_task(
    heads: MultiTaskHeads, name: str, weights: list[Tensor], biases: list[Tensor], hidden: Hidden
) -> tuple[list[Tensor], list[Tensor], Hidden]:
    """The rows of one task in each layer, and its dropout masks."""
    rows = [heads.rows_of(layer, name) for layer in range(heads.depth)]
    if hidden.seed is not None:
        first = torch.tensor([0, heads.layout.names.index(name)], device=hidden.seed.device)
        hidden = hidden._replace(seed=hidden.seed + first)
    own_biases = [b[r] for b, r in zip(biases, rows, strict=True)] if biases else []
    return [w[r] for w, r in zip(weights, rows, strict=True)], own_biases, hidden


# ---- Modules.


def layers_of_modules(
    modules: Mapping[str, nn.Module] | nn.ModuleList,
) -> tuple[list[dict[str, Any]], str, float]:
    """The linear layers of some heads, layer by layer, with activation and dropout between them.

    Raises:
        TypeError: A module is neither a linear layer nor a ``Sequential`` of linear layers, activations and dropout.
        ValueError: The modules do not have the same form; see :meth:`.MultiTaskHeads.from_modules`.
    """
    named = named_modules(modules)
    parts = {name: _parts(name, module) for name, module in named.items()}
    first_name, first = next(iter(parts.items()))
    for name, own in parts.items():
        if (len(own[0]), own[1], own[2]) != (len(first[0]), first[1], first[2]):
            raise ValueError(
                f"modules[{name!r}]: expected {len(first[0])} layers, activation {first[1]!r} and dropout {first[2]}, "
                f"as modules[{first_name!r}] has, got {len(own[0])}, {own[1]!r} and {own[2]}."
            )
    layers = []
    for i in range(len(first[0])):
        layer = linear_modules({name: own[0][i] for name, own in parts.items()})
        widths = {name: linear.weight.shape[0] for name, linear in layer.items()}
        if i < len(first[0]) - 1:
            for name, width in widths.items():
                if width != widths[first_name]:
                    raise ValueError(
                        f"modules[{name!r}]: expected {widths[first_name]} units in layer {i}, as "
                        f"modules[{first_name!r}] has, got {width}."
                    )
        layers.append(layer)
    for name, (linears, _, _) in parts.items():
        for linear in linears[1:]:
            if (linear.bias is None) != (linears[0].bias is None):
                raise ValueError(f"modules[{name!r}]: expected a bias in all layers or in none, got both.")
            if linear.weight.requires_grad != linears[0].weight.requires_grad:
                raise ValueError(f"modules[{name!r}]: expected all layers trainable or all frozen, got both.")
    return layers, first[1] or "relu", first[2]


def _parts(name: str, module: nn.Module) -> tuple[list[Any], str | None, float]:
    """The linear layers of one head, its activation and its dropout."""
    if type(module) is not nn.Sequential:
        if type(module) not in (nn.Linear, Linear):
            raise TypeError(f"modules[{name!r}]: expected a linear layer, got {type(module).__name__}.")
        return [module], None, 0.0
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"modules[{name!r}]: expected a module without hooks, got one with hooks.")
    linears: list[Any] = []
    between: list[list[nn.Module]] = [[]]
    for part in module:
        if type(part) in (nn.Linear, Linear):
            linears.append(part)
            between.append([])
        else:
            between[-1].append(part)
    if not linears or between[0] or between[-1]:
        raise ValueError(f"modules[{name!r}]: expected a Sequential that begins and ends with a linear layer.")
    found = {_between(name, parts) for parts in between[1:-1]}
    if len(found) > 1:
        raise ValueError(
            f"modules[{name!r}]: expected the same activation and dropout everywhere, got {sorted(found)}."
        )
    return (linears, *(found.pop() if found else (None, 0.0)))


def _between(name: str, parts: list[nn.Module]) -> tuple[str, float]:
    """Activation and dropout between two linear layers; they commute only in this order or for none."""
    parts = [part for part in parts if type(part) is not nn.Identity]
    if not parts or len(parts) > 2 or (len(parts) == 2 and type(parts[1]) is not nn.Dropout):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise TypeError(
            f"modules[{name!r}]: expected an activation, then perhaps Dropout, between layers, got {kinds}."
        )
    act = act_of(parts[0])
    if act is None or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        raise TypeError(f"modules[{name!r}]: expected one of {', '.join(ACTIVATIONS)}, without hooks, got {parts[0]}.")
    return act, float(parts[1].p) if len(parts) == 2 else 0.0  # type: ignore[arg-type]


def module_of(heads: MultiTaskHeads, name: str) -> nn.Module:
    """One head as a module of its own."""
    parts: list[nn.Module] = []
    for layer in range(heads.depth):
        weight, bias = (getattr(heads, parameter) for parameter in heads.layer_names(layer))
        rows = heads.rows_of(layer, name)
        linear: nn.Linear = nn.utils.skip_init(  # draws no random numbers
            nn.Linear,
            weight.shape[1],
            rows.stop - rows.start,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(weight[rows])
            if bias is not None:
                linear.bias.copy_(bias[rows])
        linear.weight.requires_grad_(weight.requires_grad)
        if bias is not None:
            linear.bias.requires_grad_(bias.requires_grad)
        if layer:
            parts.append(_MODULES[heads.act]())
            if heads.dropout:
                parts.append(nn.Dropout(heads.dropout))
        parts.append(linear)
    module = nn.Sequential(*parts) if heads.depth > 1 else parts[0]
    if name in heads.frozen:
        module.requires_grad_(False)
    return module.train(heads.training)
