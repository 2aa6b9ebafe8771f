"""What a method remembers beside parameters and buffers, for ``state_dict``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .resolve import is_stateful

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def read(method: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain data (numbers, tensors, sequences of these) of each module that has a state, by the module's path.

    As with a learning rate scheduler, these are the settings too. A module that holds anything else, such as the
    solver of NashMTL, is left out, and starts anew.
    """
    state = {}
    for path, module in method.named_modules():
        if is_stateful(module):
            own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
            if all(_is_plain(value) or isinstance(value, torch.optim.Adam) for value in own.values()):
                state[path] = {name: v if _is_plain(v) else v.state_dict() for name, v in own.items()}
    return state


def write(method: nn.Module, state: dict[str, dict[str, Any]]) -> None:
    """Sets what :func:`read` has read."""
    for path, values in state.items():
        module = method.get_submodule(path)
        for name, value in values.items():
            if isinstance(value, dict):  # FAMO's optimizer
                optimizer = torch.optim.Adam(module.parameters(recurse=False))
                optimizer.load_state_dict(value)
                vars(module)[name] = optimizer
            else:
                vars(module)[name] = list(value) if isinstance(value, list) else value


def make_room(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Gives buffers the shapes they have in ``state_dict``: TorchJD makes those of a state at the first call."""
    for path, module in root.named_modules():
        for name, buffer in list(module._buffers.items()):
            saved = state_dict.get(f"{prefix}{path}{'.' if path else ''}{name}")
            if saved is not None and (buffer is None or buffer.shape != saved.shape):
                module._buffers[name] = torch.empty_like(saved)
            elif saved is None and name.startswith("_"):
                module._buffers[name] = None


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype, torch.device))
