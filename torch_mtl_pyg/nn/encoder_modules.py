"""Linear layers as the input modules of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch_geometric.nn import Linear

from ..ops._checks import check_floating


def input_modules(modules: object) -> dict[str, Any]:
    """Checks that modules are linear layers with outputs of one size.

    Raises:
        TypeError: ``modules`` is no dict, a module is no linear layer, or dtypes differ.
        ValueError: There is none; output sizes or devices differ; some have a bias or are trainable, and some not; or a
            layer is lazy or has hooks.
    """
    if not isinstance(modules, (Mapping, nn.ModuleDict)):
        raise TypeError(f"modules: expected a dict from task to a linear layer, got {type(modules).__name__}.")
    named: dict[str, Any] = dict(modules.items())
    if not named:
        raise ValueError("modules: expected at least one, got none.")
    first_name = next(iter(named))
    for name, module in named.items():
        where = f"modules[{name!r}]"
        # Exactly these types: a subclass (also weight_norm, which makes one) may compute something else.
        if type(module) not in (nn.Linear, Linear):
            raise TypeError(f"{where}: expected a linear layer, got {type(module).__name__}.")
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"{where}: expected an initialised layer, got a lazy one.")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{where}: expected a layer without hooks, got one with hooks.")
        check_floating(f"{where}.weight", module.weight, 2, "[D, F]")
        first = named[first_name]
        for what, of, error in (
            ("dtype", lambda m: m.weight.dtype, TypeError),
            ("outputs", lambda m: m.weight.shape[0], ValueError),
            ("device", lambda m: m.weight.device, ValueError),
            ("a bias", lambda m: m.bias is not None, ValueError),
            ("a trainable bias", lambda m: m.bias is not None and m.bias.requires_grad, ValueError),
        ):
            if of(module) != of(first):
                raise error(f"{where}: expected {what} as modules[{first_name!r}] has, {of(first)}, got {of(module)}.")
    return named
