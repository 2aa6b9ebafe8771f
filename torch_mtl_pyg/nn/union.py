"""Graphs of several tasks as one graph without edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.data.data import BaseData

from ..ops._checks import has_values
from .levels import has_batch, num_graphs


@dataclass
class GraphUnion:
    """One graph of all, and what of it belongs to whom.

    Attributes:
        data: The graph.
        nodes: Name to number of nodes, in the order in which they lie.
        graphs: Name to number of graphs.
    """

    data: Data
    nodes: dict[str, int]
    graphs: dict[str, int]


def disjoint_union(
    parts: Mapping[str, Data], fields: Iterable[str], x: Tensor | None, nodes: dict[str, int], graphs: bool
) -> GraphUnion:
    """Puts graphs side by side.

    Args:
        parts: Name of a task to its graph or batch of graphs.
        fields: The fields to put together; one that no graph has is left out.
        x: Node features of all, or None: those of the graphs.
        nodes: The number of nodes of each graph, in the order of ``parts``.
        graphs: Whether nodes are assigned to graphs (``batch``).

    Raises:
        TypeError: A field is no dense tensor.
        ValueError: A field is there in some graphs only, or their shapes, dtypes or devices do not fit together.
        IndexError: An edge leads to a node that its own graph does not have.
    """
    counts = {name: num_graphs(data) for name, data in parts.items()} if graphs else {}
    keys = {name: set(data.keys()) for name, data in parts.items()}  # once: each "in data" would make it anew
    merged: dict[str, Any] = {"num_nodes": sum(nodes.values())}
    if x is not None:
        merged["x"] = x
    if graphs:
        merged["batch"] = _batch(parts, nodes, counts)
    for field in fields:
        if field in merged or field == "batch":
            continue
        if field == "num_graphs":  # this and the next one as PyG's Batch has them
            merged[field] = sum(counts.values())
            continue
        if field == "ptr":
            sizes = torch.bincount(merged["batch"], minlength=sum(counts.values()))
            merged[field] = F.pad(sizes.cumsum(0), (1, 0))
            continue
        values = _values(field, parts, keys)
        if values:
            merged[field] = _merged(field, values, parts, nodes)
    return GraphUnion(Data.from_dict(merged), nodes, counts)


# Of a graph, but nothing that a trunk reads of it.
_LABELS = ("y", "edge_label", "edge_label_index", "num_nodes")


def fields_of(parts: Mapping[str, Data]) -> list[str]:
    """The fields that a trunk may read of a graph: all tensors but labels; masks where all graphs have them."""
    fields: dict[str, int] = {}
    for data in parts.values():
        for field, value in data.to_dict().items():
            if isinstance(value, Tensor) and field not in _LABELS:
                fields[field] = fields.get(field, 0) + 1
    names = [field for field, count in fields.items() if count == len(parts) or not field.endswith("mask")]
    return [*names, "batch", "ptr", "num_graphs"]


def node_counts(parts: Mapping[str, Data], with_x: bool) -> dict[str, int]:
    """The number of nodes of each graph.

    Raises:
        ValueError: A graph has no node features where these are needed, or nothing that tells its number of nodes.
    """
    counts = {}
    for name, data in parts.items():
        x = data.x
        if isinstance(x, Tensor):
            counts[name] = int(x.shape[0])
            continue
        if with_x:
            kind = "none" if x is None else type(x).__name__
            raise ValueError(f"data[{name!r}].x: expected node features, got {kind}.")
        known = [key for key in ("num_nodes", "pos", "z", "batch") if key in data]
        if not known:
            raise ValueError(
                f"data[{name!r}].num_nodes: expected it, since nothing else tells how many nodes, got none."
            )
        counts[name] = int(data.num_nodes) if known[0] == "num_nodes" else int(data[known[0]].shape[0])
    return counts


def check_graphs(data: Mapping[Any, Any]) -> None:
    """Checks that each value is a graph of PyG with one type of nodes."""
    for name, one in data.items():
        if not isinstance(one, Data) or not isinstance(one, BaseData):
            raise TypeError(f"data[{name!r}]: expected a Data or Batch, got {type(one).__name__}.")


def _values(field: str, parts: Mapping[str, Data], keys: Mapping[str, set[str]]) -> dict[str, Tensor]:
    """The field of each graph, or nothing where none has it."""
    found = {name: value for name, data in parts.items() if field in keys[name] and (value := data[field]) is not None}
    if found and len(found) < len(parts):
        without = next(name for name in parts if name not in found)
        raise ValueError(f"data[{without!r}].{field}: expected it, as data[{next(iter(found))!r}] has it, got none.")
    return found


def _merged(field: str, values: dict[str, Tensor], parts: Mapping[str, Data], nodes: dict[str, int]) -> Tensor:
    first_name, first = next(iter(values.items()))
    for name, value in values.items():
        where = f"data[{name!r}].{field}"
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{where}: expected a dense tensor, got {kind}.")
        if value.dim() == 0 and len(values) > 1:
            raise ValueError(f"{where}: expected at least one dimension, along which to put graphs together, got none.")
        if value.dtype != first.dtype:
            raise TypeError(f"{where}: expected dtype {first.dtype}, as data[{first_name!r}] has, got {value.dtype}.")
        if value.device != first.device:
            raise ValueError(
                f"{where}: expected device {first.device}, as data[{first_name!r}] has, got {value.device}."
            )
    dim = parts[first_name].__cat_dim__(field, first)
    for name, value in values.items():
        if value.dim() != first.dim() or _other_sizes(value, dim) != _other_sizes(first, dim):
            raise ValueError(
                f"data[{name!r}].{field}: expected shape {_pattern(first, dim)}, as data[{first_name!r}] has, "
                f"got {list(value.shape)}."
            )
    _check_lengths(
        field, {name: value.shape[dim] if value.dim() else 1 for name, value in values.items()}, parts, nodes
    )
    # EdgeIndex knows a size and an order, which a union does not have.
    plain = [value.as_subclass(Tensor) for value in values.values()]
    joined = plain[0] if len(plain) == 1 else torch.cat(plain, dim=dim)
    if "index" not in field:
        return _counted_on(field, plain, joined, dim, parts)
    if joined.dim() != 2 or joined.shape[0] != 2 or joined.dtype != torch.int64:
        raise ValueError(
            f"data[{first_name!r}].{field}: expected an int64 tensor [2, E], "
            f"got {joined.dtype} of shape {list(first.shape)}."
        )
    _check_ends(field, values, nodes)
    offset, begin = 0, 0
    for value, count in zip(plain, nodes.values(), strict=True):
        if offset:
            joined[:, begin : begin + value.shape[1]] += offset
        begin += value.shape[1]
        offset += count
    return joined


def _check_lengths(field: str, sizes: dict[str, int], parts: Mapping[str, Data], nodes: dict[str, int]) -> None:
    """Entries of one graph must not become those of the next."""
    edges = {
        name: data.edge_index.shape[1] for name, data in parts.items() if isinstance(data.edge_index, Tensor)
    }  # fmt: skip
    of_edges = field.startswith("edge_") and "index" not in field and not field.startswith("edge_label")
    if of_edges and len(edges) == len(parts):
        wanted, what = edges, "edge"
    elif field in ("pos", "z") or sum(sizes.values()) == sum(nodes.values()):
        wanted, what = nodes, "node"
    else:
        return
    for name, size in sizes.items():
        if size != wanted[name]:
            raise ValueError(f"data[{name!r}].{field}: expected {wanted[name]} entries, one per {what}, got {size}.")


def _counted_on(field: str, plain: list[Tensor], joined: Tensor, dim: int, parts: Mapping[str, Data]) -> Tensor:
    """Fields that point to something count on from graph to graph, as the data says (``Data.__inc__``)."""
    steps = [data.__inc__(field, value) for data, value in zip(parts.values(), plain, strict=True)]
    if all(isinstance(step, int) and step == 0 for step in steps):
        return joined
    moved, offset = [], 0
    for value, step in zip(plain, steps, strict=True):
        moved.append(value + offset)
        offset = offset + step
    return torch.cat(moved, dim=dim)


def _check_ends(field: str, values: dict[str, Tensor], nodes: dict[str, int]) -> None:
    """An end outside of its own graph would be a node of the next."""
    some = {name: value for name, value in values.items() if value.numel() and has_values(value)}
    if not some:
        return
    # Read together: on a GPU, each number read by itself would wait for it.
    ends = torch.stack([torch.stack(torch.aminmax(value)) for value in some.values()]).tolist()
    for (name, value), (low, high) in zip(some.items(), ends, strict=True):
        if low < 0 or high >= nodes[name]:
            row, column = ((value < 0) | (value >= nodes[name])).nonzero()[0].tolist()
            raise IndexError(
                f"data[{name!r}].{field}: expected nodes in [0, {nodes[name]}), got {int(value[row, column])} "
                f"at edge {column}."
            )


def _batch(parts: Mapping[str, Data], nodes: dict[str, int], counts: dict[str, int]) -> Tensor:
    given = [data.batch for data in parts.values() if has_batch(data)]
    if not given:
        some = next((v for v in next(iter(parts.values())).to_dict().values() if isinstance(v, Tensor)), None)
        device = None if some is None else some.device
        sizes = torch.tensor(list(nodes.values()), device=device)
        return torch.arange(len(nodes), device=device).repeat_interleave(sizes, output_size=sum(nodes.values()))
    batches: dict[str, Tensor] = {}
    for name, data in parts.items():
        own = data.batch if has_batch(data) else given[0].new_zeros(nodes[name])
        if own.dim() != 1 or own.shape[0] != nodes[name]:
            raise ValueError(
                f"data[{name!r}].batch: expected shape [{nodes[name]}], one per node, got {list(own.shape)}."
            )
        batches[name] = own
    _check_numbers(batches, counts)
    vectors, offset = [], 0
    for name, own in batches.items():
        vectors.append(own + offset)
        offset += counts[name]
    return torch.cat(vectors)


def _check_numbers(batches: Mapping[str, Tensor], counts: dict[str, int]) -> None:
    """A graph that its own data does not have would be one of the next."""
    some = {name: batch for name, batch in batches.items() if batch.numel() and has_values(batch)}
    if not some:
        return
    ends = torch.stack([torch.stack(torch.aminmax(batch)) for batch in some.values()]).tolist()  # read together
    for name, (low, high) in zip(some, ends, strict=True):
        if low < 0 or high >= counts[name]:
            raise ValueError(
                f"data[{name!r}].batch: expected numbers of graphs in [0, {counts[name]}), got "
                f"{low if low < 0 else high}."
            )


def _other_sizes(value: Tensor, dim: int) -> list[int]:
    sizes = list(value.shape)
    if sizes:
        sizes.pop(dim)
    return sizes


def _pattern(value: Tensor, dim: int) -> str:
    sizes: list[Any] = list(value.shape)
    if sizes:
        sizes[dim] = "*"
    return f"[{', '.join(map(str, sizes))}]"
