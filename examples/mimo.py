"""Two citation graphs, each with its own features and classes, around one GNN: several inputs, several outputs.

Data: Cora, 2,708 papers with 1,433 words and 7 subjects; CiteSeer, 3,327 papers with 3,703 words and 6 subjects. Each
data set is a task with an input module and a head of its own. Both go through the same trunk as one graph without edges
between the two, so that a step is one pass, and each row meets its own head alone.

    cora.x     [2708, 1433] -> encoder \\                           / head -> [2708, 7]
                                         GNN, the same for all rows
    citeseer.x [3327, 3703] -> encoder /                           \\ head -> [3327, 6]

The test accuracies are those of the epoch with the best validation accuracy, mean of the two tasks, the first of equal
ones. examples/README.md says how the settings were chosen.

    python examples/mimo.py --root folder    # folder holds Cora/raw/ind.cora.* and CiteSeer/raw/ind.citeseer.*
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common.data import read_planetoid
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import APPNP

import torch_mtl_pyg as mtl

HIDDEN = 64


class Trunk(torch.nn.Module):
    """A layer for all rows, then ten steps of personalised PageRank (Gasteiger et al. 2019, arXiv:1810.05997)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.lin = torch.nn.Linear(channels, channels)
        self.propagate = APPNP(K=10, alpha=0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """``[N, channels]`` to ``[N, channels]``."""
        x = F.dropout(x.relu(), self.dropout, self.training)
        out: Tensor = self.propagate(self.lin(x), edge_index)
        return out


def build(graphs: Mapping[str, Data]) -> mtl.MultiTaskModel:
    """Encoders, trunk and heads."""
    return mtl.MultiTaskModel(
        trunk=Trunk(HIDDEN, dropout=0.8),
        heads=mtl.MultiTaskHeads(
            HIDDEN, {name: mtl.Task(int(data.y.max()) + 1, loss="cross_entropy") for name, data in graphs.items()}
        ),
        encoders=mtl.MultiTaskEncoders({name: data.num_features for name, data in graphs.items()}, HIDDEN),
    )


def accuracies(out: Mapping[str, Tensor], graphs: Mapping[str, Data], mask: str) -> dict[str, float]:
    """The share of each graph's nodes in its mask whose class is right."""
    right = {name: (out[name].argmax(1) == data.y)[data[mask]] for name, data in graphs.items()}
    return {name: float(r.double().mean()) for name, r in right.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and returns the test accuracy of each task."""
    p = argparse.ArgumentParser(description="Cora and CiteSeer around one GNN.")
    p.add_argument("--root", type=Path, required=True, help="folder that holds Cora/raw and CiteSeer/raw (only read)")
    p.add_argument("--epochs", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="a torch device")
    args = p.parse_args(argv)
    if args.epochs < 1:
        p.error(f"--epochs must be at least 1, got {args.epochs}")
    try:
        graphs = {name: read_planetoid(args.root, name).to(args.device) for name in ("Cora", "CiteSeer")}
    except ValueError as error:
        p.error(str(error))

    torch.manual_seed(args.seed)
    model = build(graphs).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-3)
    best, best_epoch, test = -1.0, 0, {}
    for epoch in range(1, args.epochs + 1):
        model.train()
        optimizer.zero_grad()
        losses = model.loss(graphs, mask="train_mask")  # one pass for both
        losses.total.backward()
        optimizer.step()

        model.eval()
        with torch.no_grad():
            out = model(graphs)  # {"Cora": [2708, 7], "CiteSeer": [3327, 6]}
        val = accuracies(out, graphs, "val_mask")
        if sum(val.values()) > best:
            best, best_epoch, test = sum(val.values()), epoch, accuracies(out, graphs, "test_mask")
        print(f"epoch {epoch:3d}: " + "; ".join(f"{n} loss {losses[n]:.4f}, validation {val[n]:.3f}" for n in val))

    print(f"\ntest accuracy at epoch {best_epoch}, the one with the best mean validation accuracy ({best / 2:.3f})")
    for name, value in test.items():
        print(f"  {name:8s}  {value:.3f}")
    return test


if __name__ == "__main__":
    main()
