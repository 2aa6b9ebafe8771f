"""The last layer of a model: which it is, and how a trunk is left without it."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor, nn
from torch_geometric.nn import (
    MLP,
    DimeNet,
    Linear,
    MessagePassing,
    SchNet,
    Sequential,
    global_add_pool,
    global_max_pool,
    global_mean_pool,
)
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.nn.models.basic_gnn import BasicGNN

_POOLS = (global_add_pool, global_max_pool, global_mean_pool)


class UnclearError(ValueError):
    """The last layer cannot be told."""


@dataclass
class Final:
    """What is exchanged.

    Attributes:
        names: The names of the layers, within the model; none: heads go behind the model.
        in_channels: What the heads read.
        pools: Whether the model makes graphs of nodes by itself, before or behind the layer.
    """

    names: tuple[str, ...]
    in_channels: int
    pools: bool = False


class Identity(nn.Module):
    """In the place of a layer: takes what it took (edges, weights, ...) and returns the nodes.

    Attributes:
        weight, bias: One number each, which nothing reads: models draw them anew in ``reset_parameters``.
    """

    def __init__(self) -> None:
        super().__init__()
        # No parameters: nothing to train, to save or to move.
        self.weight, self.bias = torch.zeros(1, 1, device="cpu"), torch.zeros(1, device="cpu")

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The nodes as they came; of a pair, those that messages go to."""
        out: Tensor = x[1] if isinstance(x, tuple) else x
        return out

    def reset_parameters(self) -> None:
        """Nothing to draw."""


def without(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A copy of the model with identities in the place of some layers."""
    trunk = copy.deepcopy(model)
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(trunk.get_submodule(parent), own, Identity())
    return trunk


def named_layer(model: nn.Module, name: str) -> Final:
    """The layer of this name; ``""``: none, heads go behind the model."""
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"final: expected the name of a module of the model, got {name!r}.") from error
    pools = False
    with contextlib.suppress(UnclearError):  # then the caller says what pools
        pools = final_layer(model).pools
    if name == "":
        width = getattr(model, "out_channels", None)
        if not isinstance(width, int) or width < 1:
            raise ValueError("final: expected a model with an attribute out_channels to put heads behind, got none.")
        return Final((), width, pools)
    return Final((name,), _in_channels(layer, name), pools)


def final_layer(model: nn.Module) -> Final:
    """The layer whose result is what the model returns, perhaps pooled.

    Raises:
        UnclearError: It cannot be told.
    """
    return _find(model, "")


def _find(model: Any, prefix: str) -> Final:
    if not prefix and (type(model) in (nn.Linear, Linear) or isinstance(model, MessagePassing)):
        raise UnclearError("the model has one layer, so that nothing would be left")
    if type(model) in (nn.Linear, Linear):
        return Final((prefix,), _in_channels(model, prefix))
    if isinstance(model, BasicGNN):
        return _of_basic_gnn(model, prefix)
    if isinstance(model, SchNet):
        return _of_schnet(model, prefix)
    if isinstance(model, DimeNet):
        names = tuple(_joined(prefix, f"output_blocks.{i}.lin") for i in range(len(model.output_blocks)))
        return Final(names, model.output_blocks[0].lin.in_features, pools=True)
    if isinstance(model, MessagePassing):
        return Final((prefix,), _in_channels(model, prefix))
    if isinstance(model, MLP):
        if not model.plain_last:
            raise UnclearError(f"{_shown(prefix)} ends in an activation, normalisation or dropout")
        last = f"lins.{len(model.lins) - 1}"
        return Final((_joined(prefix, last),), _in_channels(model.lins[-1], last))
    if isinstance(model, Sequential):
        return _of_children([(child.name, getattr(model, child.name)) for child in model._children], prefix)
    if type(model) is nn.Sequential:
        return _of_children(list(model._modules.items()), prefix)  # named_children() leaves out repetitions
    if not any(True for _ in model.children()):
        raise UnclearError(f"{_shown(prefix)} ends in {type(model).__name__}, which is no linear layer or convolution")
    return _traced(model, prefix)


def _of_children(children: list[tuple[str, Any]], prefix: str) -> Final:
    if not children:
        raise UnclearError(f"{_shown(prefix)} is empty")
    pools = any(child in _POOLS or isinstance(child, Aggregation) for _, child in children)
    while len(children) > 1 and (children[-1][1] in _POOLS or isinstance(children[-1][1], Aggregation)):
        children = children[:-1]
    name, last = children[-1]
    if not isinstance(last, nn.Module):
        raise UnclearError(f"{_shown(prefix)} ends in a function, {getattr(last, '__name__', last)}")
    if sum(child is last for _, child in children) > 1:
        raise UnclearError(f"{_shown(prefix)} calls {name} more than once")
    found = _find(last, _joined(prefix, name))
    return Final(found.names, found.in_channels, pools or found.pools)


def _of_basic_gnn(model: Any, prefix: str) -> Final:
    if model.jk_mode is not None:
        if model.out_channels == model.hidden_channels:
            lin = _joined(prefix, "lin")
            raise UnclearError(
                f"{_shown(prefix)} may have been made with or without out_channels: give final={lin!r} to exchange its "
                f"last linear layer, or final='' to keep it and put heads behind"
            )
        return Final((_joined(prefix, "lin"),), _in_channels(model.lin, "lin"))
    if not getattr(model, "_is_conv_to_out", False):
        return Final((), int(model.out_channels))
    if model.num_layers == 1:
        raise UnclearError(f"{_shown(prefix)} has one layer, so that nothing would be left")
    return Final((_joined(prefix, f"convs.{model.num_layers - 1}"),), int(model.hidden_channels))


def _of_schnet(model: Any, prefix: str) -> Final:
    what = {"dipole": model.dipole, "atomref": model.atomref is not None}
    what.update({name: getattr(model, name) is not None for name in ("mean", "std", "scale")})
    given = [name for name, there in what.items() if there]
    if given:
        raise UnclearError(f"{_shown(prefix)} does more behind its last layer ({', '.join(given)})")
    return Final((_joined(prefix, "lin2"),), int(model.lin2.in_features), pools=True)


class _Pooled(nn.Module):
    """Stands for an aggregation, which tracing does not see."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _traced(model: nn.Module, prefix: str) -> Final:
    """Follows the data of the forward pass back from what it returns."""
    model = copy.deepcopy(model)
    for name, child in list(model.named_children()):
        if isinstance(child, Aggregation):
            setattr(model, name, _Pooled())
    modules: Any = (math, torch_geometric.nn)
    try:
        graph = _Tracer(autowrap_modules=modules, autowrap_functions=_POOLS).trace(model)
    except Exception as error:  # whatever the model does with a stand-in for its input
        raise UnclearError(f"{_shown(prefix)} cannot be traced ({type(error).__name__}: {error})") from error
    nodes = list(graph.nodes)
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    pools = any(node.target in _POOLS for node in nodes) or any(
        isinstance(model.get_submodule(name), _Pooled) for name in calls
    )
    node: Any = nodes[-1].args[0]
    while isinstance(node, torch.fx.Node) and (
        node.target in _POOLS
        or (node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _Pooled))
    ):
        node = node.args[0] if node.args else None
    if not isinstance(node, torch.fx.Node) or node.op != "call_module":
        what = node.target if isinstance(node, torch.fx.Node) else type(node).__name__
        raise UnclearError(f"what {_shown(prefix)} returns comes from {getattr(what, '__name__', what)}")
    name = str(node.target)
    if calls.count(name) > 1:
        raise UnclearError(f"{_shown(prefix)} calls {name} more than once")
    found = _find(model.get_submodule(name), _joined(prefix, name))
    return Final(found.names, found.in_channels, pools or found.pools)


def _in_channels(layer: Any, name: str) -> int:
    if type(layer) in (nn.Linear, Linear):
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"model.{name}: expected an initialised layer, got a lazy one.")
        return int(layer.weight.shape[1])
    if not isinstance(layer, MessagePassing):
        raise ValueError(f"final: expected a linear layer or a convolution, got {type(layer).__name__}.")
    width = getattr(layer, "in_channels", None)
    width = width[-1] if isinstance(width, (tuple, list)) else width
    if not isinstance(width, int) or width < 1:
        raise UnclearError(f"the number of features that {name} takes is not known")
    return width


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _shown(prefix: str) -> str:
    return f"model.{prefix}" if prefix else "the model"
