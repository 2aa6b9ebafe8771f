"""What the tests of MultiTaskModel share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GAT, GCN, GIN, GINEConv, GraphSAGE

import torch_mtl_pyg as mtl

WIDTHS = {"a": 5, "b.x": 7, "c": 3}


def graph(n: int, features: int, edges: int, **fields: Any) -> Data:
    index = torch.randint(0, max(1, n), (2, edges if n else 0))
    return Data(x=torch.randn(n, features, dtype=torch.float64), edge_index=index, **fields)


class GINE(nn.Module):
    """Takes edge_attr, and leaves out what PyG's models leave out."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = GINEConv(nn.Linear(in_channels, out_channels), edge_dim=2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        return self.conv(x, edge_index, edge_attr).relu()


class OnData(nn.Module):
    """Takes the graph itself."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.gcn = GCN(in_channels, out_channels, 2)

    def forward(self, data: Data) -> Tensor:
        out: Tensor = self.gcn(data.x, data.edge_index)
        return out


TRUNKS: dict[str, Any] = {
    "gcn": lambda i, o: GCN(i, o, 2),
    "gat": lambda i, o: GAT(i, o, 2, heads=2),
    "gin": lambda i, o: GIN(i, o, 2, norm="batch_norm"),
    "graph norm": lambda i, o: GraphSAGE(i, o, 2, norm="graph_norm"),
    "gine": GINE,
    "on data": OnData,
    "mlp": lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Tanh()),
}


def trained(module: nn.Module) -> nn.Module:
    """float64, with statistics of BatchNorm that are not those of the start, in eval mode."""
    module = module.double()
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return module.eval()


def several(edge_attr: bool = True) -> dict[str, Data]:
    """Graphs of three tasks: one has no edges, one no nodes, and they come in another order than the heads."""
    sizes = {"c": (0, 3, 0), "a": (11, 5, 30), "b.x": (4, 7, 0)}
    graphs = {name: graph(*size) for name, size in sizes.items()}
    for one in graphs.values():
        if edge_attr:
            one.edge_attr = torch.randn(one.edge_index.shape[1], 2, dtype=torch.float64)
    return graphs


def batch(features: int, sizes: tuple[int, ...] = (4, 1, 6), **fields: Any) -> Batch:
    return Batch.from_data_list(
        [graph(n, features, 2 * n, **{k: v[i : i + 1] for k, v in fields.items()}) for i, n in enumerate(sizes)]
    )


def mimo(trunk: nn.Module, tasks: dict[str, Any], **options: Any) -> mtl.MultiTaskModel:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 6)
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(8, tasks), encoders, **options)
    trained(model)
    return model
