"""Frozen heads: rows of the packed parameters that training leaves alone.

A parameter has one `requires_grad`, and the heads share a parameter. The frozen rows are therefore detached in the
forward pass, and set back after every optimizer step, since weight decay and momentum move rows whose gradient is zero.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from .heads import MultiTaskHeads

_watched: weakref.WeakSet[MultiTaskHeads] = weakref.WeakSet()
_hooked = False
# Rows as they were when the step of an optimizer began: (parameter, mask, rows).
_before: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def set_frozen(heads: MultiTaskHeads, names: frozenset[str]) -> None:
    """Freezes these heads and no others.

    Raises:
        ValueError: The packed parameters are computed from others (torch.nn.utils.parametrize, prune): an optimizer
            then holds those, and rows cannot be kept.
    """
    computed = computed_parameters(heads)
    if names and computed:
        raise ValueError(
            f"names: expected heads whose weight is a plain parameter, got {computed[0]} computed from others."
        )
    heads._frozen = names
    remake_mask(heads)
    watch(heads)


def computed_parameters(heads: MultiTaskHeads) -> list[str]:
    """The names of weights and biases that are no parameters of their own (torch.nn.utils.parametrize, prune)."""
    names = [name for layer in range(heads.depth) for name in heads.layer_names(layer)]
    return [name for name in names if name not in heads._parameters]


def remake_mask(heads: MultiTaskHeads) -> None:
    """Marks the frozen rows of each layer's parameters. Buffers, so that they follow the module's device."""
    for layer in range(heads.depth):
        mask = None
        if heads._frozen:
            weight = heads.get_parameter(heads.layer_names(layer)[0])
            mask = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
            for name in heads._frozen:
                mask[heads.rows_of(layer, name)] = True
        heads.register_buffer(_mask_name(layer), mask, persistent=False)


def _mask_name(layer: int) -> str:
    return f"_frozen_rows_{layer}"


def effective(heads: MultiTaskHeads) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and biases of all layers as the forward pass takes them: no gradient reaches the frozen rows."""
    if not heads._frozen and heads.depth == 1:
        last = heads.bias
        return [heads.weight], [] if last is None else [last]
    computed = computed_parameters(heads) if heads._frozen and not torch.compiler.is_compiling() else []
    if computed:
        raise ValueError(
            f"{computed[0]}: expected a plain parameter, since some heads are frozen, got one computed from others; "
            f"unfreeze them first."
        )
    weights, biases = [], []
    for layer in range(heads.depth):
        names = heads.layer_names(layer)
        weight, bias = getattr(heads, names[0]), getattr(heads, names[1])
        if heads._frozen:
            mask: Any = getattr(heads, _mask_name(layer))
            weight = torch.where(mask.unsqueeze(1), weight.detach(), weight)
            bias = None if bias is None else torch.where(mask, bias.detach(), bias)
        weights.append(weight)
        if bias is not None:
            biases.append(bias)
    return weights, biases


def watch(heads: MultiTaskHeads) -> None:
    """Has the frozen rows set back after each step of any optimizer of ``torch.optim``."""
    global _hooked
    if not heads._frozen:
        _watched.discard(heads)
        return
    _watched.add(heads)
    if not _hooked:
        register_optimizer_step_pre_hook(_remember)
        register_optimizer_step_post_hook(_set_back)
        _hooked = True


def _remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for heads in list(_watched):
        for layer in range(heads.depth):
            mask: Any = getattr(heads, _mask_name(layer))
            for name in heads.layer_names(layer):
                parameter = heads._parameters.get(name)
                if parameter is not None and id(parameter) in held:
                    rows.append((parameter, mask, parameter.detach()[mask]))
    if rows:
        _before[optimizer] = rows


def _set_back(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for parameter, mask, rows in _before.pop(optimizer, ()):
            parameter[mask] = rows
