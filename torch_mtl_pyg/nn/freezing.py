"""Frozen heads: rows of the packed parameters that training leaves alone.

A parameter has one `requires_grad`, and the heads share a parameter. The frozen rows are therefore detached in the
forward pass, and set back after every optimizer step, since weight decay and momentum move rows whose gradient is zero.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .heads import MultiTaskHeads

_watched: weakref.WeakSet[MultiTaskHeads] = weakref.WeakSet()
_hooked = False


def change(heads: MultiTaskHeads, names: tuple[str, ...], frozen: bool) -> None:
    """Freezes or unfreezes heads by name.

    Raises:
        ValueError: No name was given, or there is no such task.
    """
    if not names:
        raise ValueError(f"names: expected at least one of {', '.join(map(repr, heads.layout.names))}, got none.")
    checked = {heads.layout.name(name) for name in names}
    heads._frozen = heads._frozen | checked if frozen else heads._frozen - checked
    snapshot(heads)
    watch(heads)


def snapshot(heads: MultiTaskHeads) -> None:
    """Remembers the frozen rows as they are now, in buffers, which follow the module's device and dtype."""
    mask = None
    if heads._frozen:
        mask = torch.zeros(heads.layout.total, dtype=torch.bool, device=heads.weight.device)
        for name in heads._frozen:
            mask[heads.slices[name]] = True
    weight, bias = heads.weight.detach(), None if heads.bias is None else heads.bias.detach()
    heads.register_buffer("_frozen_rows", mask, persistent=False)
    heads.register_buffer("_frozen_weight", None if mask is None else weight[mask], persistent=False)
    heads.register_buffer("_frozen_bias", None if mask is None or bias is None else bias[mask], persistent=False)


def effective(heads: MultiTaskHeads) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the forward pass takes them: no gradient reaches the frozen rows."""
    mask: Any = heads._frozen_rows
    if mask is None:
        return heads.weight, heads.bias
    weight = torch.where(mask.unsqueeze(1), heads.weight.detach(), heads.weight)
    return weight, None if heads.bias is None else torch.where(mask, heads.bias.detach(), heads.bias)


def watch(heads: MultiTaskHeads) -> None:
    """Has the frozen rows set back after each step of any optimizer of ``torch.optim``."""
    global _hooked
    if not heads._frozen:
        _watched.discard(heads)
        return
    _watched.add(heads)
    if not _hooked:
        register_optimizer_step_post_hook(_set_back)
        _hooked = True


def _set_back(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for heads in list(_watched):
            mask: Any = heads._frozen_rows
            if id(heads.weight) in held:
                heads.weight[mask] = heads._frozen_weight  # type: ignore[assignment]
            if heads.bias is not None and id(heads.bias) in held:
                heads.bias[mask] = heads._frozen_bias  # type: ignore[assignment]
