"""Training of a GNN trunk with one head per task; a single-task model is the same with one task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import torch_mtl_pyg as mtl

from .data import MultiTaskGraph
from .tasks import NodeTask

EVALUATE_EVERY = 5
# Makes a model (x, edge_index) -> {task: [N, C_t]} for some of a graph's tasks.
ModelOf = Callable[[MultiTaskGraph, Mapping[str, NodeTask]], nn.Module]


class MultiTaskGNN(nn.Module):
    """A shared trunk and all heads on its embedding."""

    def __init__(self, graph: MultiTaskGraph, tasks: Mapping[str, NodeTask]) -> None:
        super().__init__()
        self.trunk = graph.trunk()
        self.heads = mtl.MultiTaskHeads(in_channels=graph.hidden, tasks={name: t.head for name, t in tasks.items()})

    def forward(self, x: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
        """Outputs ``[N, C_t]`` by task name."""
        out: dict[str, Tensor] = self.heads(self.trunk(x, edge_index))
        return out


@dataclass
class Result:
    """One trained model.

    ``val[task]`` holds the validation metric after each of ``epochs``, ``val_loss[task]`` the loss; ``test[task]`` the
    test metric at ``best_epoch[task]``, the epoch with the task's lowest validation loss.
    """

    parameters: int
    seconds: float = 0.0
    epochs: list[int] = field(default_factory=list)
    val: dict[str, list[float]] = field(default_factory=dict)
    val_loss: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: dict[str, int] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)


def total_loss(
    out: Mapping[str, Tensor], tasks: Mapping[str, NodeTask], y: Mapping[str, Tensor], mask: Tensor
) -> Tensor:
    """Sum over tasks of weight times the mean loss over the nodes in ``mask``."""
    losses = [task.weight * task.spec.loss(out[name][mask], y[name][mask]) for name, task in tasks.items()]
    return torch.stack(losses).sum()


def train(
    graph: MultiTaskGraph,
    names: list[str],
    seed: int,
    epochs: int,
    device: torch.device,
    on_epoch: Callable[[], object] = lambda: None,
    model_of: ModelOf = MultiTaskGNN,
) -> Result:
    """Trains one model on the tasks ``names`` for ``epochs`` epochs of full-batch Adam.

    Every 5 epochs, and after the last, each task is evaluated. The test metric of a task is the one at the epoch with
    its lowest validation loss, by the same rule whether the model has one task or many. The loss, since the accuracy
    on a few hundred nodes moves in steps and ties.
    A task keeps its weight when it is alone, so that its loss stands in the same ratio to the weight decay.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    data = graph.data.to(device)
    tasks = {name: graph.tasks[name] for name in names}
    y = {name: task.y.to(device) for name, task in tasks.items()}
    val_mask, test_mask = data.val_mask.cpu(), data.test_mask.cpu()
    model = model_of(graph, tasks).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=graph.lr, weight_decay=graph.weight_decay)
    result = Result(parameters=sum(p.numel() for p in model.parameters()))
    result.val, result.val_loss = {name: [] for name in names}, {name: [] for name in names}
    for epoch in range(1, epochs + 1):
        model.train()
        optimizer.zero_grad()
        loss = total_loss(model(data.x, data.edge_index), tasks, y, data.train_mask)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if epoch % EVALUATE_EVERY == 0 or epoch == epochs:
            model.eval()
            with torch.no_grad():
                out = {name: o.cpu() for name, o in model(data.x, data.edge_index).items()}
            result.epochs.append(epoch)
            for name, task in tasks.items():
                loss_now = float(task.spec.loss(out[name][val_mask], task.y[val_mask]))
                if all(loss_now < earlier for earlier in result.val_loss[name]):
                    result.best_epoch[name] = epoch
                    result.test[name] = task.spec.metric(out[name][test_mask], task.y[test_mask])
                result.val_loss[name].append(loss_now)
                result.val[name].append(task.spec.metric(out[name][val_mask], task.y[val_mask]))
        on_epoch()
    result.seconds = time.perf_counter() - start
    return result
