"""Several classifiers on one GNN, each row through the classifier of its own task: ``model(data, task_idx)``.

Data: Cora, 2,708 papers with their words and citations. Tasks: the subject of a paper (7 classes), whether it lies on a
triangle of citations (2), and how many papers are linked to it (1 to 2, 3 to 4, more: 3). The last two are properties
of the graph, there to have several tasks on the same rows.

Where each row comes with its task, as in data put together from several sources, ``task_idx`` is part of the data.
Here every paper has a label of every task, so the rows take turns: in epoch ``e``, paper ``i`` serves the task
``(i + e) mod T``. After ``T`` epochs each training paper has served each task once.

    python examples/shared_representation.py --root folder    # folder holds Cora/raw/ind.cora.*, and is only read
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common.data import cora
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn import GCN
from torch_geometric.utils import degree

import torch_mtl_pyg as mtl


def load(root: Path) -> tuple[Data, Tensor, dict[str, mtl.Task]]:
    """The graph; the labels of all tasks, ``[T, N]``; and the tasks in the order of their indices."""
    graph = cora(root)
    data = graph.data
    data.x = data.x.to_dense()
    links = degree(data.edge_index[1], data.num_nodes)
    y = torch.stack([data.y, graph.tasks["triangle"].y.long(), torch.bucketize(links, torch.tensor([2.0, 4.0]))])
    tasks = {
        "subject": mtl.Task(7, loss="cross_entropy"),
        "triangle": mtl.Task(2, loss="cross_entropy", weight=0.1),  # a factor of its loss in the total
        "links": mtl.Task(3, loss="cross_entropy", weight=0.1),
    }
    return data, y, tasks


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, and returns the test accuracy of each task."""
    p = argparse.ArgumentParser(description="Several classifiers on one GNN, rows routed to the one of their task.")
    p.add_argument("--root", type=Path, required=True, help="folder that holds Cora/raw/ind.cora.* (only read)")
    p.add_argument("--epochs", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="a torch device")
    args = p.parse_args(argv)
    if args.epochs < 1:
        p.error(f"--epochs must be at least 1, got {args.epochs}")
    try:
        data, y, tasks = load(args.root)
    except ValueError as error:
        p.error(str(error))

    torch.manual_seed(args.seed)
    data, y = data.to(args.device), y.to(args.device)
    rows = torch.arange(data.num_nodes, device=y.device)
    trunk = GCN(data.num_features, hidden_channels=64, num_layers=2, dropout=0.5)  # any GNN of PyG
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(64, tasks)).to(y.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)

    for epoch in range(1, args.epochs + 1):
        model.train()
        optimizer.zero_grad()
        task_idx = (rows + epoch) % len(tasks)
        own = y[task_idx, rows]  # each row's label in its own task
        losses = model.loss(data, own, mask="train_mask", task=task_idx)
        losses.total.backward()
        optimizer.step()
        print(f"epoch {epoch:3d}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    # Nothing is chosen by these numbers: they are those of the last epoch.
    model.eval()
    accuracy = {}
    print("\ntest accuracy, and that of always guessing the largest class")
    for name, labels in zip(tasks, y, strict=True):
        with torch.no_grad():
            right = model(data, name).argmax(1) == labels
        accuracy[name] = float(right[data.test_mask].double().mean())
        guess = labels[data.test_mask].bincount().max() / data.test_mask.sum()
        print(f"  {name:8s}  {accuracy[name]:.3f}  {guess:.3f}")

    # One call serves rows of all tasks, and each row gets what its own head alone would give.
    task_idx = rows % len(tasks)
    with torch.no_grad():
        routed = model(data, task_idx)  # [N, 7]: columns that a row's head does not have are 0
        for index, (name, task) in enumerate(tasks.items()):
            mine = task_idx == index
            torch.testing.assert_close(routed[mine, : task.out_channels], model(data, name)[mine])
    return accuracy


if __name__ == "__main__":
    main()
