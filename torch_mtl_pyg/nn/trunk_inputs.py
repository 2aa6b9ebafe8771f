"""What the forward of a trunk takes, and how it is filled from a graph."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import Sequential

# Fields of PyG's Data. A first argument of another name ("input", "h") is the node features.
FIELDS = ("x", "edge_index", "edge_weight", "edge_attr", "edge_type", "pos", "z", "batch")


class TrunkInputs:
    """The arguments of a trunk's forward, by name.

    Args:
        trunk: The module. Its forward is inspected once, here.

    Attributes:
        whole: Whether it takes the graph itself (its first argument is called ``data``).
        names: The names it takes fields by; those of ``FIELDS`` if it takes the graph itself.
        features: The name of the argument that takes the node features, or None.

    Raises:
        TypeError: The trunk is no module, or its forward has no arguments with names.
    """

    def __init__(self, trunk: object) -> None:
        if not isinstance(trunk, nn.Module):
            raise TypeError(f"trunk: expected a torch.nn.Module, got {type(trunk).__name__}.")
        module: Any = getattr(trunk, "_orig_mod", trunk)  # of torch.compile
        if isinstance(module, Sequential):
            # Its forward is generated, and may be that of another Sequential.
            self._required = dict.fromkeys(module.signature.param_dict, True)
            self._by_name: frozenset[str] = frozenset()
        else:
            parameters = inspect.signature(module.forward).parameters.values()
            named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            self._required = {p.name: p.default is p.empty for p in named}
            self._by_name = frozenset(p.name for p in named if p.kind is p.KEYWORD_ONLY)
        if not self._required:
            raise TypeError("trunk: expected a forward with named arguments (x, edge_index, ...), got none.")
        first = next(iter(self._required))
        self.whole = first == "data"
        self.features: str | None = None
        if self.whole or "x" in self._required:
            self.features = "x"
        elif first not in FIELDS:
            self.features = first
        self.names = FIELDS if self.whole else tuple(self._required)

    def call(self, trunk: nn.Module, data: Data, x: Tensor | None, num_graphs: int | None) -> Tensor:
        """Runs the trunk on a graph.

        Args:
            trunk: The module.
            data: The graph.
            x: Node features in the place of those of the graph, or None.
            num_graphs: The number of graphs in a batch where it is known.

        Raises:
            TypeError: The trunk returns no tensor.
            ValueError: The graph lacks something the forward takes, or the trunk returns no matrix.
        """
        if self.whole:
            if x is not None:
                data = copy.copy(data)
                data.x = x
            return _checked(trunk(data))
        positional: list[Any] = []
        named: dict[str, Any] = {}
        gap = False
        keys = set(data.keys())  # once: each "in data" would make it anew
        for name, required in self._required.items():
            value = self._value(name, data, keys, x, num_graphs)
            if value is None:
                if required and name != "batch":  # None: a single graph
                    raise ValueError(f"data.{name}: expected it, since the forward of the trunk takes it, got none.")
                if not required:
                    gap = True
                    continue
            if gap or name in self._by_name:
                named[name] = value
            else:
                positional.append(value)
        return _checked(trunk(*positional, **named))

    def _value(self, name: str, data: Data, keys: set[str], x: Tensor | None, num_graphs: int | None) -> Any:
        if name == self.features and (x is not None or name not in keys):
            return data.x if x is None else x
        # PyG's models call the number of graphs so, and PyG's samplers the number of seeds.
        if name == "batch_size" and "batch" in self._required:
            return num_graphs if "batch" in keys else None
        if name in keys:
            return data[name]
        if name == "edge_index" and "adj_t" in keys:
            return data["adj_t"]
        return None


def _checked(out: object) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"trunk: expected it to return a tensor [N, D], got {type(out).__name__}.")
    if out.dim() != 2:
        raise ValueError(f"trunk: expected it to return a tensor [N, D], got shape {list(out.shape)}.")
    return out
