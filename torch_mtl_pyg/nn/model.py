"""A shared trunk with input and output modules of several tasks around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn.inits import reset

from ..labels import FLOATING, MISSING, missing_value
from ..ops._checks import check_route, check_route_values
from ..ops.multi_head_loss import Labels
from ..task import TaskLosses
from .encoders import MultiTaskEncoders
from .head_groups import losses_of, outputs_of, sum_of
from .heads import MultiTaskHeads
from .joint import is_joint, joint_losses, joint_outputs
from .levels import Edge, Pool, checked_edge, checked_pool, edge_embedding, graph_embedding, level_of, num_graphs
from .model_labels import Mask, labels_by_level, labels_in, labels_of_one, mask_of, masked, outside_missing
from .trunk_inputs import TrunkInputs


class MultiTaskModel(nn.Module):
    r"""Any trunk with a head for each task behind it and, for MIMO, an input module for each task in front.

    Tasks predict for nodes, edges or graphs (``Task(level=)``), also several of these in one model: the trunk runs
    once, and the heads of each level are computed together from that level's embedding. An edge's embedding is made
    from those of its ends in ``data.edge_label_index``, a graph's by pooling its nodes.

    A dict from task to data goes through the trunk as **one** graph without edges between the parts, each part through
    its own head alone. That equals one pass of the trunk per task to rounding, as long as the trunk has no state of the
    batch: dropout draws other numbers, and BatchNorm in training mode takes its statistics over all tasks together.

    Args:
        trunk: Any module. Its forward gets, by name, those of its arguments that the data has (``x``, ``edge_index``,
            ``edge_weight``, ``edge_attr``, ``pos``, ``z``, ``batch``, ...); a first argument called ``data`` gets the
            data, and one of another unknown name ``x``. It returns ``[N, D]``.
        heads: The heads.
        encoders: The input modules of the same tasks, or None: the trunk takes the features as they are.
        pool: How graphs are made from nodes: ``"mean"``, ``"sum"``, ``"max"`` or another name of PyG's aggregations, an
            ``Aggregation``, a callable ``pool(x, batch, size)`` as ``global_mean_pool``, or None: the rows that the
            trunk returns are what all tasks predict for.
        edge: How edges are made from their ends: ``"mul"``, ``"add"``, ``"mean"`` or a callable
            ``edge(source, target)``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``encoders`` has other tasks than ``heads``, there is no such ``pool`` or ``edge``, or without pool
            some tasks predict for graphs and some for nodes or edges.
    """

    encoders: MultiTaskEncoders | None

    def __init__(
        self,
        trunk: nn.Module,
        heads: MultiTaskHeads,
        encoders: MultiTaskEncoders | None = None,
        pool: Pool = "mean",
        edge: Edge = "mul",
    ) -> None:
        super().__init__()
        self.inputs = TrunkInputs(trunk)
        if not isinstance(heads, MultiTaskHeads):
            raise TypeError(f"heads: expected MultiTaskHeads, got {type(heads).__name__}.")
        if encoders is not None and not isinstance(encoders, MultiTaskEncoders):
            raise TypeError(f"encoders: expected MultiTaskEncoders or None, got {type(encoders).__name__}.")
        if encoders is not None and set(encoders.tasks) != set(heads.tasks):
            raise ValueError(f"encoders: expected the tasks {list(heads.tasks)}, got {list(encoders.tasks)}.")
        if encoders is not None and self.inputs.features is None:
            raise ValueError("trunk: expected a forward that takes x, since there are encoders, got one without.")
        levels = {task.level for task in heads.tasks.values()}
        if pool is None and "graph" in levels and levels & {"node", "edge"}:
            raise ValueError("pool: expected a way from nodes to graphs, since there are tasks of both, got None.")
        self.trunk = trunk
        self.heads = heads
        self.encoders = encoders
        self.pool = checked_pool(pool)
        self.edge: Callable[[Tensor, Tensor], Tensor] = checked_edge(edge)

    def reset_parameters(self) -> None:
        """Draws the parameters of all modules anew: by their ``reset_parameters``, or those of their children."""
        for module in self.children():
            reset(module)

    def forward(
        self, data: Data | Mapping[str, Data], task: str | int | Tensor | None = None
    ) -> dict[str, Tensor] | Tensor:
        """Computes the outputs.

        Args:
            data: One ``Data`` or ``Batch``, for all tasks. Or a dict from task to its own; tasks may be left out. A
                ``Data`` whose ``x`` is a dict from task to features stands for as many copies of the graph.
            task: For one data: None: all tasks. A name or an index: this task alone. An int64 tensor with the index of
                a task for each row (node, edge or graph, as all tasks have one level): through this head only.

        Returns:
            ``dict`` of name to ``[N, C_t]``, ``[M, C_t]`` (edges) or ``[G, C_t]`` (graphs), each task's for its own
            data. One task: its tensor. Rows routed: ``[N, max C_t]``.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: There is no such task, or the data lacks something, or shapes do not fit.
            IndexError: The index of a task or of a node is out of range.
        """
        if is_joint(data) and (task is None or isinstance(data, Mapping) or isinstance(task, Tensor)):
            self._check_no_task(task)
            return joint_outputs(self, data)
        data = self._checked(data)
        if isinstance(task, Tensor):
            level = self._one_level(data)
            return self.heads(self._embedding(level, self._trunk(data, None), data), task=task)  # type: ignore[no-any-return]
        if task is not None:
            name = self.heads.layout.name(task)
            return self.heads(self._of_task(data, name), task=name)  # type: ignore[no-any-return]
        h = self._trunk(data, None)
        outputs: dict[str, Tensor] = {}
        for level, names in self._levels(data).items():
            outputs.update(outputs_of(self.heads, names, self._embedding(level, h, data)))
        return {name: outputs[name] for name in self.heads.tasks}

    def loss(
        self,
        data: Data | Mapping[str, Data],
        y: Labels | None = None,
        mask: Mask = None,
        task: str | int | Tensor | None = None,
        gramian: bool = False,
    ) -> TaskLosses:
        """Computes the losses, as :meth:`MultiTaskHeads.loss` from the embedding.

        Args:
            data: As for :meth:`forward`. A task that a dict leaves out has loss 0.
            y: Labels, as heads take them; a dict from task to labels where tasks have several levels or data of their
                own. None: those in ``y`` of the data (as a tensor or as a dict), for edges also in ``edge_label``.
            mask: Where labels count: the name of a field of the data (``"train_mask"``) or a bool tensor, one entry per
                row of the labels; or a dict of these by task. Labels outside are missing. None: all count.
            task: As for :meth:`forward`.
            gramian: Whether to compute the Gramian of the tasks' gradients at the embedding. Tasks with data of their
                own have no rows in common: their inner products are 0.

        Returns:
            :class:`~torch_mtl_pyg.TaskLosses` of all tasks.

        Raises:
            TypeError, ValueError, IndexError: As in :meth:`forward` and :meth:`MultiTaskHeads.loss`; or labels or a
                mask are not there; or ``gramian`` is asked for while tasks have several levels.
        """
        if gramian is not True and gramian is not False:
            raise TypeError(f"gramian: expected a bool, got {type(gramian).__name__}.")
        if not self.heads.layout.has_loss:
            raise ValueError("loss: expected at least one task with a loss, got none; give it one: Task(7, loss=...).")
        if is_joint(data) and (task is None or isinstance(data, Mapping) or isinstance(task, Tensor)):
            self._check_no_task(task)
            return joint_losses(self, data, y, mask, gramian)
        data = self._checked(data)
        if isinstance(task, Tensor):
            return self._routed_loss(data, y, mask, task, gramian)
        if task is not None:
            return self._loss_of_one(data, y, mask, self.heads.layout.name(task), gramian)
        tasks = self.heads.tasks
        levels = {
            level: names
            for level, names in self._levels(data).items()
            if any(tasks[name].loss is not None for name in names)
        }
        if gramian and len(levels) > 1:
            raise ValueError(f"gramian: expected False, since tasks have the levels {' and '.join(levels)}, got True.")
        labels = labels_by_level(data, y, levels, self.heads.layout)
        if isinstance(mask, Mapping):
            for key in mask:
                self.heads.layout.name(key, "mask")
        labels = {level: masked(own, mask, data, self.heads.layout, levels[level]) for level, own in labels.items()}
        h = self._trunk(data, None)
        return sum_of(
            [
                losses_of(self.heads, names, self._embedding(level, h, data), labels[level], gramian)
                for level, names in levels.items()
            ]
        )

    # ---- One graph for all tasks.

    def _checked(self, data: Any) -> Data:
        if not isinstance(data, Data):
            raise TypeError(f"data: expected a Data, a Batch or a dict from task to these, got {type(data).__name__}.")
        return data

    def _check_no_task(self, task: object) -> None:
        if task is not None:
            raise ValueError(
                "task: expected None, since the data is given by task; leave tasks out of the dict instead."
            )

    def _trunk(self, data: Data, x: Tensor | None) -> Tensor:
        if x is None and self.encoders is not None:
            raise ValueError(
                "data.x: expected a dict from task to features, since the model has encoders, or task= the name of "
                "one, got a tensor."
            )
        return self.inputs.call(self.trunk, data, x, int(data.num_graphs) if isinstance(data, Batch) else None)

    def _of_task(self, data: Data, name: str) -> Tensor:
        """The embedding of what one task predicts for, by way of its own input module."""
        x = data.x if "x" in data else None
        if isinstance(x, Mapping):
            if name not in x:
                raise ValueError(f"data.x: expected features of the task {name!r}, got those of {list(x)}.")
            x = x[name]
        elif self.encoders is None:
            x = None  # the trunk takes what there is
        if self.encoders is not None:
            x = self.encoders(x, task=name)
        return self._embedding(
            level_of(self.heads.tasks[name], data, self.pool is not None), self._trunk(data, x), data
        )

    def _levels(self, data: Data) -> dict[str, tuple[str, ...]]:
        """Level to the names of its tasks, both in packing order."""
        levels: dict[str, tuple[str, ...]] = {}
        for name, task in self.heads.tasks.items():
            level = level_of(task, data, self.pool is not None)
            levels[level] = (*levels.get(level, ()), name)
        return levels

    def _one_level(self, data: Data) -> str:
        levels = list(self._levels(data))
        if len(levels) > 1:
            raise ValueError(
                f"task: expected a name, since tasks have the levels {' and '.join(levels)}, got a tensor."
            )
        return levels[0]

    def _embedding(self, level: str, h: Tensor, data: Data) -> Tensor:
        if level == "node":
            return h
        if level == "edge":
            index = getattr(data, "edge_label_index", None)
            return edge_embedding(h, index, self.edge, "data.edge_label_index")
        return graph_embedding(h, data.batch if "batch" in data else None, num_graphs(data), self.pool)

    def _outside_missing(self, y: Tensor, task: Tensor, mask: Tensor) -> Tensor:
        """Routed labels with those outside of a mask missing, as the task of each row has it."""
        tasks = list(self.heads.tasks.values())
        if y.dtype in FLOATING:
            return outside_missing(tasks[0], y, mask, "mask")
        check_route(task, y)
        check_route_values(task, len(tasks))
        if tuple(mask.shape) != (y.shape[0],):
            raise ValueError(f"mask: expected shape [{y.shape[0]}], one per row of the labels, got {list(mask.shape)}.")
        y = y.to(torch.int64)  # not every type can hold what stands for "missing"
        absent = [missing_value(one, torch.int64) for one in tasks]
        numbers = torch.tensor([MISSING if v is None else v for v in absent], dtype=y.dtype, device=y.device)[task]
        one = y.dim() == 1
        return torch.where(mask if one else mask.unsqueeze(1), y, numbers if one else numbers.unsqueeze(1))

    def _loss_of_one(self, data: Data, y: Any, mask: Mask, name: str, gramian: bool) -> TaskLosses:
        """``y``: labels of this task alone; those of the data may be of all tasks."""
        heads, task = self.heads, self.heads.tasks[name]
        level = level_of(task, data, self.pool is not None)
        if y is None:
            y = labels_of_one(data, name, level, self._levels(data)[level], heads.layout)
        for argument, given in (("y", y), ("mask", mask)):
            if isinstance(given, Mapping):
                for key in given:
                    heads.layout.name(key, argument)
        if isinstance(y, Mapping):
            y = y.get(name)
        if y is None:
            raise ValueError(f"y: expected labels of the task {name!r}, got none.")
        one: Any = mask.get(name) if isinstance(mask, Mapping) else mask
        if one is not None and isinstance(y, Tensor):
            y = outside_missing(task, y, mask_of(one, data, "data", "mask"), "mask")
        return heads.loss(self._of_task(data, name), y, task=name, gramian=gramian)

    def _routed_loss(self, data: Data, y: Any, mask: Mask, task: Tensor, gramian: bool) -> TaskLosses:
        level = self._one_level(data)
        if y is None:
            y = labels_in(data, level)
        if y is None:
            raise ValueError("y: expected labels, one per row, got none.")
        if isinstance(mask, Mapping):
            raise TypeError("mask: expected a bool tensor or the name of a field, since task is a tensor, got a dict.")
        if mask is not None and isinstance(y, Tensor):
            y = self._outside_missing(y, task, mask_of(mask, data, "data", "mask"))
        return self.heads.loss(self._embedding(level, self._trunk(data, None), data), y, task=task, gramian=gramian)
