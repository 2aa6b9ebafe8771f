"""MultiTaskConv against one SAGEConv or GCNConv per task in float64, on real graphs and on hubs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_common import assert_same_training
from demo_common import planetoid_root
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.datasets import Planetoid
from torch_geometric.nn import GCNConv, SAGEConv

import torch_mtl_pyg as mtl

WIDTHS = {"subject": 7, "degree": 1, "triangle": 2}


def singles(kind: str, in_channels: int) -> dict[str, Any]:
    if kind == "gcn":
        return {name: GCNConv(in_channels, width).double() for name, width in WIDTHS.items()}
    return {name: SAGEConv(in_channels, width, aggr=kind).double() for name, width in WIDTHS.items()}


def check(kind: str, x: Tensor, edge_index: Any) -> None:
    separate = singles(kind, x.shape[1])
    conv = mtl.MultiTaskConv.from_modules(separate)
    assert_same_training(conv, separate, x, edge_index, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ("mean", "sum", "max", "gcn"))
@pytest.mark.parametrize("name", ("Cora", "CiteSeer"))
def test_planetoid(any_backend: str, name: str, kind: str, tmp_path: Any) -> None:
    root = planetoid_root()
    if not (root / name / "raw").is_dir():
        pytest.skip(f"no {name} below {root}")
    (tmp_path / name).mkdir()
    (tmp_path / name / "raw").symlink_to(root / name / "raw")
    data = Planetoid(str(tmp_path), name)[0]
    torch.manual_seed(0)
    x = torch.randn(data.num_nodes, 16, dtype=torch.float64)
    check(kind, x, data.edge_index)
    check(kind, x, EdgeIndex(data.edge_index, sparse_size=(data.num_nodes, data.num_nodes)))


@pytest.mark.parametrize("kind", ("mean", "sum", "max", "gcn"))
def test_a_hub_of_100000_neighbours(any_backend: str, kind: str) -> None:
    """In both directions: one node that receives from all others, and one that sends to all others."""
    n = 100_001
    others = torch.arange(n)
    edge_index = torch.cat(
        (torch.stack((others, torch.full_like(others, 5))), torch.stack((torch.full_like(others, 8), others))), dim=1
    )
    check(kind, torch.randn(n, 6, dtype=torch.float64), edge_index)
