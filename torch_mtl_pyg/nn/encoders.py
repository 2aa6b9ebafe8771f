"""One input module per task, in front of a shared trunk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..ops._checks import check_floating, check_same
from ..ops._dispatch import REFUSALS, autocasts
from ..ops.grouped_linear import grouped_linear
from ..ops.multi_head_linear import multi_head_linear
from ..task import TaskLayout, checked_integer
from .encoder_modules import input_modules
from .saving import describe_tasks, wrong_tasks


class MultiTaskEncoders(nn.Module):
    r"""One linear input module per task, from features of different widths to one width.

    Task :math:`t` with features :math:`X_t` gets :math:`X_t W_t^\top + b_t`, as ``torch.nn.Linear(F_t, out_channels)``
    computes it; all tasks of a call are one launch, and their results lie below each other in one buffer.

    Args:
        in_channels: Name of each task to the number of its features ``F_t``; the order is the packing order.
        out_channels: Features of every task afterwards, ``D``.
        bias: Whether a bias is added.

    Attributes:
        weights: One parameter ``[D, F_t]`` per task, in the order of ``in_channels``.
        bias: ``[T, D]``, a row per task, or None.

    Shapes:
        - input: ``dict`` of ``[N_t, F_t]``
        - output: ``dict`` of ``[N_t, D]``, views of one packed ``[sum of N_t, D]``

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``in_channels`` is empty, or a size is below 1.
    """

    bias: nn.Parameter | None

    def __init__(self, in_channels: Mapping[str, int], out_channels: int, bias: bool = True) -> None:
        super().__init__()
        if isinstance(in_channels, Mapping):
            for name, width in in_channels.items():
                if checked_integer(f"in_channels[{name!r}]", width) < 1:
                    raise ValueError(f"in_channels[{name!r}]: expected at least 1 feature, got {width}.")
        self.layout = TaskLayout(in_channels, argument="in_channels")
        out_channels = checked_integer("out_channels", out_channels)
        if out_channels < 1:
            raise ValueError(f"out_channels: expected at least 1, got {out_channels}.")
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}.")
        self.out_channels = out_channels
        # In a list: names of tasks may hold what names of parameters cannot.
        self.weights = nn.ParameterList(torch.empty(out_channels, width) for width in self.layout.widths)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(len(self.layout.names), out_channels)) if bias else None
        )
        self.reset_parameters()
        backend.resolve()  # here, not while a first call is being traced

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names, in packing order."""
        return self.layout.names

    @property
    def in_channels(self) -> Mapping[str, int]:
        """Name to the number of features ``F_t``, in packing order; read-only."""
        return MappingProxyType(dict(self.layout.describe()))

    def reset_parameters(self) -> None:
        r"""Draws all weights and biases anew as ``torch.nn.Linear`` does: uniform in :math:`\pm 1 / \sqrt{F_t}`."""
        for t, width in enumerate(self.layout.widths):
            bound = 1.0 / math.sqrt(width)
            nn.init.uniform_(self.weights[t], -bound, bound)
            if self.bias is not None:
                with torch.no_grad():
                    self.bias[t].uniform_(-bound, bound)

    def extra_repr(self) -> str:
        """The tasks with their widths, and the width afterwards."""
        widths = ", ".join(f"{name}: {width}" for name, width in self.layout.describe())
        return f"{{{widths}}}, {self.out_channels}, bias={self.bias is not None}"

    def forward(self, x: Mapping[str, Tensor] | Tensor, task: str | int | None = None) -> dict[str, Tensor] | Tensor:
        """Computes the input modules of the tasks that are there.

        Args:
            x: Name of a task to its features ``[N_t, F_t]``; tasks may be left out. With ``task``: its features.
            task: None, or the name or index of one task.

        Returns:
            ``dict`` of name to ``[N_t, D]`` in packing order, views of one buffer; with ``task``, its ``[N, D]``.

        Raises:
            TypeError: An argument has the wrong type, or features have not the dtype of the weights.
            ValueError: There is no such task, ``x`` is empty, or a shape or device does not fit.
            IndexError: ``task`` is not in ``[0, T)``.
        """
        if task is not None:
            name = self.layout.name(task)
            index = self.layout.names.index(name)
            if not isinstance(x, Tensor):
                raise TypeError(f"x: expected a tensor, since task is given, got {type(x).__name__}.")
            self._check(index, "x", x)
            return multi_head_linear(x, self.weights[index], None if self.bias is None else self.bias[index])
        present = self._present(x)
        packed = self.packed(x)  # type: ignore[arg-type]
        parts = packed.split([x[name].shape[0] for name in present])  # type: ignore[index]
        return dict(zip(present, parts, strict=True))

    def packed(self, x: Mapping[str, Tensor]) -> Tensor:
        """The results of the tasks that are there, below each other in packing order.

        Args:
            x: As for :meth:`forward`.

        Returns:
            ``[sum of N_t, D]``.

        Raises:
            TypeError, ValueError: As in :meth:`forward`.
        """
        present = self._present(x)
        places = [t for t, name in enumerate(self.layout.names) if name in x]
        for t, name in zip(places, present, strict=True):  # here, where the messages know the names
            own = x[name]
            if not isinstance(own, Tensor) or own.dim() != 2 or own.shape[1] != self.layout.widths[t]:
                self._check(t, f"x[{name!r}]", own)
        bias: Tensor | None = self.bias
        if bias is not None and len(places) < len(self.layout.names):
            bias = bias[places]
        try:
            return grouped_linear([x[name] for name in present], [self.weights[t] for t in places], bias)
        except REFUSALS as error:
            refused = error
        for t, name in zip(places, present, strict=True):
            self._check(t, f"x[{name!r}]", x[name])
            if not autocasts(x[name].device.type):
                check_same(f"x[{name!r}]", x[name], "weight", self.weights[t])
        raise refused

    def _present(self, x: object) -> list[str]:
        """The names of the tasks that are there, in packing order."""
        if not isinstance(x, Mapping):
            raise TypeError(f"x: expected a dict from task to features, got {type(x).__name__}.")
        if not x:
            raise ValueError("x: expected the features of at least one task, got an empty dict.")
        for name in x:
            if not isinstance(name, str):
                raise TypeError(f"x: expected names of tasks, got {name!r}.")
            self.layout.name(name, "x")
        return [name for name in self.layout.names if name in x]

    def _check(self, index: int, argument: str, x: object) -> None:
        check_floating(argument, x, 2, "[N, {}]", self.weights[index], 1)

    # ---- Exchanging them with single modules.

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module]) -> MultiTaskEncoders:
        """Takes over linear layers; weights are copied, bit for bit.

        Args:
            modules: ``dict`` or ``ModuleDict`` of ``torch.nn.Linear`` or PyG ``Linear``, by task.

        Raises:
            TypeError: A module is no linear layer (a subclass may compute something else), or their dtypes differ.
            ValueError: There is none; the output sizes or devices differ; some have a bias and some have none.
        """
        linears = input_modules(modules)
        first = next(iter(linears.values()))
        with torch.device("meta"):  # draws no random numbers
            encoders = cls(
                {name: linear.weight.shape[1] for name, linear in linears.items()},
                first.weight.shape[0],
                bias=first.bias is not None,
            )
        encoders.weights = nn.ParameterList(
            nn.Parameter(linear.weight.detach().clone(), linear.weight.requires_grad) for linear in linears.values()
        )
        if first.bias is not None:
            encoders.bias = nn.Parameter(
                torch.stack([linear.bias.detach() for linear in linears.values()]), first.bias.requires_grad
            )
        return encoders.train(first.training)

    def to_modules(self) -> dict[str, nn.Linear]:
        """One ``torch.nn.Linear`` for each task, by name; weights are copied, bit for bit."""
        modules: dict[str, nn.Linear] = {}
        for t, name in enumerate(self.layout.names):
            weight = self.weights[t]
            linear: nn.Linear = nn.utils.skip_init(  # draws no random numbers
                nn.Linear,
                weight.shape[1],
                self.out_channels,
                bias=self.bias is not None,
                device=weight.device,
                dtype=weight.dtype,
            )
            with torch.no_grad():
                linear.weight.copy_(weight)
                if self.bias is not None:
                    linear.bias.copy_(self.bias[t])
            linear.weight.requires_grad_(weight.requires_grad)
            if self.bias is not None:
                linear.bias.requires_grad_(self.bias.requires_grad)
            modules[name] = linear.train(self.training)
        return modules

    # ---- Saving and loading: the names travel with the weights, which lie in a list.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        describe_tasks(destination, prefix, self.layout)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = wrong_tasks(local_metadata, prefix, self.layout)
        if wrong:
            error_msgs.append(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        backend.resolve()
