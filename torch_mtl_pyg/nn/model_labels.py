"""Labels of a model's tasks: found in the data, masked, and put together for rows of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data

from ..labels import FLOATING, INTEGER, check_values, label_columns, labelled, missing_value, split_labels
from ..ops.multi_head_loss import Labels
from ..task import Task, TaskLayout

Mask = str | Tensor | Mapping[str, str | Tensor] | None


def labels_by_level(
    data: Data, y: Labels | None, levels: Mapping[str, tuple[str, ...]], layout: TaskLayout
) -> dict[str, Labels]:
    """The labels of each level's tasks: given ones, or those of the data.

    Args:
        data: The graph; its ``y``, and ``edge_label`` for edges.
        y: Labels as heads take them, or None: those of the data.
        levels: Level to the names of its tasks.
        layout: The tasks.

    Raises:
        TypeError: The labels are neither a dict nor a tensor.
        ValueError: There are none, or a matrix is to serve tasks of several levels.
    """
    given = y is not None
    source: Any = y if given else _field(data, "y")
    if source is not None and not isinstance(source, (Mapping, Tensor)):
        where = "y" if given else "data.y"
        raise TypeError(f"{where}: expected a dict from task to labels or a tensor, got {type(source).__name__}.")
    if isinstance(source, Mapping):
        check_names(source, layout)
    edge_label = None if given else _field(data, "edge_label")
    others = [level for level in levels if level != "edge" or edge_label is None]
    found: dict[str, Labels] = {}
    for level, names in levels.items():
        own: Any = source
        if isinstance(source, Mapping):
            own = {name: source[name] for name in names if name in source}
            missing = [name for name in names if name not in source and layout.tasks[name].loss is not None]
            if level == "edge" and edge_label is not None and len(missing) == 1:
                own[missing[0]] = edge_label
        elif level == "edge" and edge_label is not None:
            own = edge_label
        elif isinstance(source, Tensor) and len(others) > 1:
            raise ValueError(
                f"y: expected a dict from task to labels, since tasks have the levels {' and '.join(levels)}, "
                f"got a tensor."
            )
        # Several columns of one task alone; a column for each task is a matrix.
        if isinstance(own, Tensor) and own.dim() == 2 and own.shape[1] > 1 and len(names) == 1:
            own = {names[0]: own}
        if own is None:
            field = "edge_label" if level == "edge" else "y"
            raise ValueError(
                f"y: expected labels of the tasks {', '.join(map(repr, names))}, got none; nor has data a {field}."
            )
        if isinstance(own, Tensor) and own.dim() == 1 and len(names) == 1:
            own = {names[0]: own}
        found[level] = own
    return found


def labels_of_one(data: Data, name: str, level: str, names: tuple[str, ...], layout: TaskLayout) -> Any:
    """The labels that a graph holds for one task, or None: its entry, its column, or all where they are its own.

    Args:
        data: The graph; its ``y``, and ``edge_label`` for edges.
        name: The task.
        level: What it predicts for.
        names: The tasks of that level that the graph is for.
        layout: All tasks.
    """
    y = _field(data, "y")
    edge_label = _field(data, "edge_label") if level == "edge" else None
    if isinstance(y, Mapping):
        for key in y:
            layout.name(key, "y")
        if name in y:
            return y[name]
        missing = [other for other in names if other not in y and layout.tasks[other].loss is not None]
        return edge_label if missing == [name] else None
    y = y if edge_label is None else edge_label
    matrix = isinstance(y, Tensor) and y.dim() == 2 and y.shape[1] == len(names) > 1
    return y[:, names.index(name)] if matrix and label_columns(layout.tasks[name]) in (1, None) else y


def own_labels(data: Data, name: str, level: str, layout: TaskLayout, where: str) -> Tensor | None:
    """The labels of one task in a graph of its own."""
    y = labels_of_one(data, name, level, (name,), layout)
    source = _field(data, "y")
    if isinstance(source, Mapping) and y is None and name not in source:
        raise ValueError(f"{where}.y: expected labels of the task {name!r}, got none.")
    if y is None and not isinstance(source, Mapping) and layout.tasks[name].loss is not None:
        raise ValueError(f"{where}.{'edge_label' if level == 'edge' else 'y'}: expected labels, got none.")
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(f"{where}.y: expected a tensor, got {type(y).__name__}.")
    return y


def masked(y: Labels, mask: Mask, data: Data, layout: TaskLayout, names: tuple[str, ...]) -> Labels:
    """Labels that are missing where a mask is False.

    Args:
        y: Labels of the tasks ``names``: a matrix with a column for each, or a dict.
        mask: The name of a field of the data, a bool tensor, or a dict of these by task.
        data: The graph.
        layout: The tasks.
        names: Those that ``y`` belongs to.

    Raises:
        TypeError: A mask is no bool tensor.
        ValueError: A mask has another number of rows than the labels, or the data lacks it.
    """
    if mask is None:
        return y
    single = None if isinstance(mask, Mapping) else mask_of(mask, data, "data", "mask")
    if isinstance(y, Tensor) and y.dim() == 2 and y.dtype in FLOATING and single is not None:
        return torch.where(_fitting(single, y, "mask").unsqueeze(1), y, torch.nan)
    if isinstance(y, Tensor):
        if y.dim() != 2 or y.shape[1] != len(names):
            return y  # whose error the heads tell
        y = dict(zip(names, y.unbind(1), strict=True))
    out: dict[str, Tensor | None] = {}
    for name, own in y.items():
        one = single
        if isinstance(mask, Mapping):
            one = mask_of(mask[name], data, "data", f"mask[{name!r}]") if name in mask else None
        out[name] = (
            own
            if one is None or not isinstance(own, Tensor)
            else outside_missing(layout.tasks[name], own, one, f"mask for the task {name!r}")
        )
    return out


def mask_of(mask: object, data: Data, where: str, argument: str) -> Tensor:
    """A mask by name or as it is."""
    found: Any = mask
    if isinstance(mask, str):
        argument = f"{where}.{mask}"
        found = _field(data, mask)
        if found is None:
            raise ValueError(f"{argument}: expected a mask, got none.")
    if not isinstance(found, Tensor) or found.dtype != torch.bool:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{argument}: expected a bool tensor or the name of a field, got {kind}.")
    return found


def outside_missing(task: Task, y: Tensor, mask: Tensor, argument: str) -> Tensor:
    """Labels ``[N]`` or ``[N, C]`` of a task, missing where the mask is False. bool becomes int16, which can be."""
    mask = _fitting(mask, y, argument)
    if y.dtype in (torch.bool, torch.uint8):
        y = y.to(torch.int16)
    missing: float | None = torch.nan if y.dtype in FLOATING else missing_value(task, y.dtype)
    if missing is None:  # an ignore_index that the dtype does not hold
        y, missing = y.to(torch.int64), task.ignore_index
    return torch.where(mask.reshape(-1, *[1] * (y.dim() - 1)), y, missing)


def routed_labels(parts: Mapping[str, Tensor], y: Mapping[str, Tensor | None], layout: TaskLayout) -> Tensor:
    """The labels of tasks that have rows of their own, below each other: ``[N]`` or ``[N, max C_t]``, NaN for missing.

    Args:
        parts: Name to the embedding ``[N_t, D]`` of the task's rows.
        y: Name to its labels, or None.
        layout: All tasks.
    """
    first = next(iter(parts.values()))
    exact = first.dtype == torch.float64 or any(own is not None and own.dtype == torch.float64 for own in y.values())
    # float32 holds the classes up to 2^24.
    exact = exact or any(t.loss == "cross_entropy" and t.out_channels > 2**24 for t in layout.tasks.values())
    dtype = torch.float64 if exact else torch.float32
    width = max(label_columns(task) or 1 for task in layout.tasks.values())
    rows = []
    for name, part in parts.items():
        own = y[name]
        if own is None:
            rows.append(part.new_full((part.shape[0], width), torch.nan, dtype=dtype))
            continue
        (own,) = split_labels({name: own}, TaskLayout({name: layout.tasks[name]}), part)
        assert own is not None
        if own.dtype in INTEGER:
            own = torch.where(labelled(layout.tasks[name], own), own.to(dtype), torch.nan)
        own = own.to(dtype)
        own = own.unsqueeze(1) if own.dim() == 1 else own
        rows.append(F.pad(own, (0, width - own.shape[1]), value=torch.nan))
    joined = torch.cat(rows)
    return joined[:, 0] if width == 1 else joined


def check_names(y: Mapping[str, Any], layout: TaskLayout) -> None:
    """Checks that labels are of tasks that there are, and that have a loss."""
    for name, own in y.items():
        if layout.tasks[layout.name(name, "y")].loss is None and own is not None:
            raise ValueError(f"y[{name!r}]: expected no labels, since the task has no loss, got some.")


def check_each(y: Mapping[str, Tensor | None], layout: TaskLayout) -> None:
    """Checks the labels of each task by itself, so that an error names the row as the task counts it."""
    for name, own in y.items():
        if own is not None:
            check_values(name, layout.tasks[name], own)


def labels_in(data: Data, level: str) -> Any:
    """The labels that a graph holds for a level, or None."""
    edge_label = _field(data, "edge_label") if level == "edge" else None
    return _field(data, "y") if edge_label is None else edge_label


def _field(data: Data, name: str) -> Any:
    return getattr(data, name, None)


def _fitting(mask: Tensor, y: Tensor, argument: str) -> Tensor:
    if mask.dim() != 1 or mask.shape[0] != y.shape[0]:
        raise ValueError(
            f"{argument}: expected shape [{y.shape[0]}], one per row of the labels, got {list(mask.shape)}; "
            f"tasks of several levels take a dict."
        )
    if mask.device != y.device:
        raise ValueError(f"{argument}: expected the device of the labels, {y.device}, got {mask.device}.")
    return mask
