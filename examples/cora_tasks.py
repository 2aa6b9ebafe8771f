"""PyG's two-layer GCN, its last layer exchanged for a MultiTaskConv: several tasks on the nodes of one graph.

With ``--root``, the graph is Cora: papers, their words and citations. Tasks: the subject, whether a paper lies on a
triangle of citations, and its log-degree, the last two computed from the graph. Without, it is that of scikit-learn's
digits (see demo.py), which needs no network.

Beside it, for each task, PyG's own model: the same with a ``GCNConv`` as its last layer. Width, dropout, learning
rate, weight decay (there on the first layer only) and epochs are those of PyG's example ``gcn.py``, not tuned for
several tasks; the weights of the losses are those of demo.py. Metrics are chosen as there: at the epoch with the task's
lowest validation loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.data import MultiTaskGraph, cora, digits
from common.study import parsed, parser, seeds_of, study
from common.tasks import NodeTask
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv

import torch_mtl_pyg as mtl

HIDDEN = 16


class GCN(torch.nn.Module):
    """PyG's model for Cora, whose last layer is given."""

    def __init__(self, in_channels: int, hidden_channels: int, last: torch.nn.Module) -> None:
        super().__init__()
        self.conv1 = GCNConv(in_channels, hidden_channels)
        self.conv2 = last

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        x = F.dropout(x, p=0.5, training=self.training)
        x = self.conv1(x, edge_index).relu()
        x = F.dropout(x, p=0.5, training=self.training)
        return self.conv2(x, edge_index)


class Named(torch.nn.Module):
    """A model of one task, whose output is a dict too."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        super().__init__()
        self.name, self.model = name, model

    def forward(self, x: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
        return {self.name: self.model(x, edge_index)}


def multi_task(graph: MultiTaskGraph, tasks: Mapping[str, NodeTask]) -> torch.nn.Module:
    """All tasks from the last layer, a dict from task to ``[N, C_t]``."""
    last = mtl.MultiTaskConv(HIDDEN, {name: task.head for name, task in tasks.items()}, normalize="gcn")
    return GCN(graph.data.num_features, HIDDEN, last)


def single_task(graph: MultiTaskGraph, tasks: Mapping[str, NodeTask]) -> torch.nn.Module:
    """PyG's model as it is."""
    ((name, task),) = tasks.items()
    return Named(name, GCN(graph.data.num_features, HIDDEN, GCNConv(HIDDEN, task.head.out_channels)))


def as_in_pyg(graph: MultiTaskGraph) -> MultiTaskGraph:
    """Dense features, edges whose order is kept between calls, and the settings of PyG's example."""
    data, n = graph.data.clone(), graph.data.num_nodes
    data.x = data.x.to_dense() if data.x.is_sparse else data.x
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(n, n))
    return dataclasses.replace(graph, data=data, hidden=HIDDEN, lr=0.01, weight_decay=5e-4, epochs=200)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example and returns what it saves as ``metrics.json``."""
    p = parser("A GCN whose last layer serves several tasks.", Path("demo_output/cora_tasks"))
    p.add_argument("--root", type=Path, help="folder that holds Cora/raw/ind.cora.* (only read); without: digits")
    args = parsed(p, argv)
    try:
        graphs = [cora(args.root)] * args.runs if args.root else [digits(seed) for seed in seeds_of(args)]
    except ValueError as error:
        p.error(str(error))
    return study([as_in_pyg(graph) for graph in graphs], args, multi_task, single_task)


if __name__ == "__main__":
    main()
