"""Graphs of several tasks in one pass of the trunk, and the losses of that."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from ..labels import LabelError
from ..task import TaskLosses
from .head_groups import outputs_of_own, routes, sum_of
from .levels import edge_embedding, graph_embedding, level_of
from .model_labels import Mask, check_each, check_names, mask_of, outside_missing, own_labels, routed_labels
from .union import check_graphs, disjoint_union, fields_of, node_counts

if TYPE_CHECKING:
    from .model import MultiTaskModel


@dataclass
class Joint:
    """The embeddings of several tasks.

    Attributes:
        graphs: Name to the task's graph.
        parts: Name to the embedding ``[N_t, D]`` of what the task predicts for.
        levels: Level to the names of its tasks.
        whole: Level to the embeddings of its tasks below each other, where they lie so.
    """

    graphs: dict[str, Data]
    parts: dict[str, Tensor]
    levels: dict[str, tuple[str, ...]]
    whole: dict[str, Tensor]

    def together(self, level: str, names: tuple[str, ...]) -> Tensor:
        """The embeddings of some of a level's tasks below each other."""
        if level in self.whole and names == tuple(self.parts):
            return self.whole[level]
        rows = [self.parts[name] for name in names]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def is_joint(data: object) -> bool:
    """Whether there is a graph, or are features of one graph, for each task."""
    return isinstance(data, Mapping) or (isinstance(data, Data) and "x" in data and isinstance(data.x, Mapping))


def by_task(data: Mapping[str, Data] | Data) -> dict[str, Data]:
    """A graph for each task. One graph with features per task becomes a copy for each of them; tensors are shared."""
    if not isinstance(data, Data):
        return dict(data)
    if not data.x:
        raise ValueError("data.x: expected the features of at least one task, got an empty dict.")
    copies = {}
    for name, x in data.x.items():
        copies[name] = copy.copy(data)
        copies[name].x = x
    return copies


def joint_embedding(model: MultiTaskModel, data: Mapping[str, Data] | Data) -> Joint:
    """Runs the trunk once on the graphs of all tasks that are there."""
    given = by_task(data)
    if not given:
        raise ValueError("data: expected the graph of at least one task, got an empty dict.")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"data: expected names of tasks, got {name!r}.")
        model.heads.layout.name(name, "data")
        if model.encoders is not None and name not in model.encoders.tasks:
            known = list(model.encoders.tasks)
            raise ValueError(f"data: expected tasks that encoders has an input module for, {known}, got {name!r}.")
    check_graphs(given)
    encoders, inputs = model.encoders, model.inputs
    graphs = {name: given[name] for name in (encoders or model.heads).tasks if name in given}
    nodes = node_counts(graphs, inputs.features is not None)
    x = None
    if encoders is not None:
        x = encoders.packed({name: one.x for name, one in graphs.items()})
    levels: dict[str, tuple[str, ...]] = {}
    for name, one in graphs.items():
        level = level_of(model.heads.tasks[name], one, model.pool is not None)
        levels[level] = (*levels.get(level, ()), name)
    names = fields_of(graphs) if inputs.whole else inputs.names
    fields = dict.fromkeys("x" if field == inputs.features else field for field in names)
    # Normalisation may be per graph: nodes must not seem to be of one.
    by_graph = "graph" in levels or not {"batch", "ptr", "num_graphs"}.isdisjoint(fields)
    union = disjoint_union(graphs, fields, x, nodes, by_graph)
    count = sum(union.graphs.values()) if union.graphs else None
    features = union.data.x if inputs.features is not None and "x" in union.data else None
    h = inputs.call(model.trunk, union.data, features, count)
    parts: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    if "node" in levels or "edge" in levels:
        total = sum(nodes.values())
        if h.shape[0] != total:
            raise ValueError(
                f"trunk: expected one row for each of {total} nodes, got shape {list(h.shape)}; where it pools them by "
                'itself, give the tasks level="graph".'
            )
        rows = dict(zip(nodes, h.split(list(nodes.values())), strict=True))
        whole["node"] = h
        for name in levels.get("node", ()):
            parts[name] = rows[name]
        for name in levels.get("edge", ()):
            index = getattr(graphs[name], "edge_label_index", None)
            parts[name] = edge_embedding(rows[name], index, model.edge, f"data[{name!r}].edge_label_index")
    if "graph" in levels:
        assert count is not None
        pooled = graph_embedding(h, union.data.batch, count, model.pool)
        whole["graph"] = pooled
        rows = dict(zip(union.graphs, pooled.split(list(union.graphs.values())), strict=True))
        parts.update({name: rows[name] for name in levels["graph"]})
    return Joint(graphs, {name: parts[name] for name in graphs}, levels, whole)


def joint_outputs(model: MultiTaskModel, data: Mapping[str, Data] | Data) -> dict[str, Tensor]:
    """The output of each task for its own graph, in packing order."""
    joint = joint_embedding(model, data)
    outputs: dict[str, Tensor] = {}
    for level, names in joint.levels.items():
        sizes = {name: joint.parts[name].shape[0] for name in names}
        outputs.update(outputs_of_own(model.heads, joint.together(level, names), sizes))
    return {name: outputs[name] for name in model.heads.tasks if name in outputs}


def joint_losses(
    model: MultiTaskModel, data: Mapping[str, Data] | Data, y: Any, mask: Mask, gramian: bool
) -> TaskLosses:
    """The losses of each task on its own graph."""
    heads = model.heads
    y = _given_labels(model, data, y)
    joint = joint_embedding(model, data)
    levels = {
        level: own
        for level, names in joint.levels.items()
        if (own := tuple(name for name in names if heads.tasks[name].loss is not None))
    }
    if not levels:
        raise ValueError("data: expected graphs of at least one task with a loss, got none.")
    if gramian and len(levels) > 1:
        raise ValueError(f"gramian: expected False, since tasks have the levels {' and '.join(levels)}, got True.")
    labels: dict[str, Tensor | None] = {}
    for level, names in levels.items():
        for name in names:
            found = _labels_of(model, joint, name, level, y)
            labels[name] = _masked(model, joint, name, found, mask, shared=isinstance(data, Data))
    return sum_of([_losses(model, joint, level, names, labels, gramian) for level, names in levels.items()])


def _losses(
    model: MultiTaskModel,
    joint: Joint,
    level: str,
    names: tuple[str, ...],
    labels: dict[str, Tensor | None],
    gramian: bool,
) -> TaskLosses:
    heads = model.heads
    if len(names) == 1 or any(callable(heads.tasks[name].loss) for name in names):
        # A callable takes its labels as they are, which rows of several tasks could not hold.
        return sum_of(
            [heads.loss(joint.parts[name], {name: labels[name]}, task=name, gramian=gramian) for name in names]
        )
    rows = {name: joint.parts[name] for name in names}
    y = routed_labels(rows, labels, heads.layout)
    h = joint.together(level, names)
    task = routes(heads, {name: part.shape[0] for name, part in rows.items()}, h)
    try:
        return heads.loss(h, y, task=task, gramian=gramian)
    except LabelError:
        check_each({name: labels[name] for name in names}, heads.layout)
        raise


def _given_labels(model: MultiTaskModel, data: Mapping[str, Data] | Data, y: Any) -> Any:
    """Labels by task, or None: each graph has its own."""
    if y is None and isinstance(data, Data):
        y = data.y if "y" in data else None
        if y is None:
            return None
    if y is None:
        return None
    names = model.heads.layout.names
    if isinstance(y, Tensor) and isinstance(data, Data):
        if y.dim() == 2 and y.shape[1] == len(names):
            return dict(zip(names, y.unbind(1), strict=True))
        if len(data.x) == 1:
            return {next(iter(data.x)): y}
        raise ValueError(f"y: expected a dict or a matrix [N, {len(names)}], one column per task, got {list(y.shape)}.")
    if not isinstance(y, Mapping):
        raise TypeError(f"y: expected a dict from task to labels, got {type(y).__name__}.")
    check_names(y, model.heads.layout)
    return y


def _labels_of(model: MultiTaskModel, joint: Joint, name: str, level: str, y: Any) -> Tensor | None:
    graph = joint.graphs[name]
    if y is None or (level == "edge" and name not in y):
        return own_labels(graph, name, level, model.heads.layout, f"data[{name!r}]")
    if name not in y:
        raise ValueError(f"y: expected labels of the task {name!r} (None if there are none), got no such key.")
    own: Tensor | None = y[name]
    return own


def _masked(
    model: MultiTaskModel, joint: Joint, name: str, y: Tensor | None, mask: Mask, shared: bool
) -> Tensor | None:
    where = f"data[{name!r}]"
    if isinstance(mask, Tensor) and not shared:
        raise TypeError("mask: expected the name of a field or a dict from task to masks, got Tensor.")
    one = mask
    argument = "mask"
    if isinstance(mask, Mapping):
        for key in mask:
            model.heads.layout.name(key, "mask")
        one, argument = mask.get(name), f"mask[{name!r}]"
    if one is None or not isinstance(y, Tensor):
        return y
    found = mask_of(one, joint.graphs[name], where, argument)
    return outside_missing(model.heads.tasks[name], y, found, f"{where}.{one}" if isinstance(one, str) else argument)
