"""What the tests of balancing share: tasks, arguments of TorchJD's methods, a small setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mtl_pyg as mtl
from torch_mtl_pyg.balancing import Balancer, balanced_step

aggregation = pytest.importorskip("torchjd.aggregation", reason="balancing needs the extra [balancing]")
scalarization = pytest.importorskip("torchjd.scalarization")
autojac = pytest.importorskip("torchjd.autojac")
linalg = pytest.importorskip("torchjd.linalg")
Stateful = pytest.importorskip("torchjd").Stateful

TASKS = {
    "kind": mtl.Task(3, loss="cross_entropy"),
    "none": 2,
    "flag": mtl.Task(1, loss="bce", weight=2.0),
    "size": mtl.Task(1, loss="mse"),
    "mass": mtl.Task(1, loss="l1"),
}
BALANCED = [0, 2, 3, 4]
ABSENT = 3
PREFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

# Every method TorchJD exports, by the name of its class; and what those that need arguments are given.
EXPORTED = sorted(
    {name for name in aggregation.__all__ if name.endswith("Weighting") and name != "Weighting"}
    | {name for name in scalarization.__all__ if name != "Scalarizer"}
    | {"NashMTL"}
)
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "CAGradWeighting": lambda: {"c": 0.4},
    "COSMOS": lambda: {"lambda_": 0.1, "weights": PREFERENCE},
    "CRMOGMWeighting": lambda: {"weighting": aggregation.UPGradWeighting(PREFERENCE)},
    "Constant": lambda: {"weights": PREFERENCE},
    "ConstantWeighting": lambda: {"weights": PREFERENCE},
    "FairGradWeighting": lambda: {"alpha": 1.0},
    "KrumWeighting": lambda: {"n_byzantine": 0},
    # The gradients are of mean losses at an embedding, and small.
    "MoDoWeighting": lambda: {"gamma": 10.0, "rho": 0.01},
    "PBI": lambda: {"theta": 0.5, "weights": PREFERENCE, "reference": -PREFERENCE},
    "STCH": lambda: {"mu": 0.5, "weights": PREFERENCE},
    "UPGradWeighting": lambda: {"pref_vector": PREFERENCE},
}
WITH_MEMORY = {"CRMOGM", "DWA", "ExcessMTL", "FAMO", "GradVac", "MoDo", "NashMTL", "PCD", "SDMGrad"}
MEMORY = [name for name in EXPORTED if name.removesuffix("Weighting") in WITH_MEMORY]
MEMORYLESS = [name for name in EXPORTED if name not in MEMORY]


class Setting:
    """A trunk, heads and one batch in float64."""

    def __init__(self, tasks: dict[str, Any] = TASKS, rows: int = 24) -> None:
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double()
        self.heads = mtl.MultiTaskHeads(8, tasks).double()
        self.inputs = torch.randn(rows, 5).double()
        labels = {"kind": torch.randint(0, 3, (rows,)), "flag": torch.rand(rows).round(), "size": torch.randn(rows)}
        self.y: dict[str, Tensor | None] = {**labels, "mass": torch.randn(rows)}
        self.y = {name: self.y[name] for name, task in self.heads.tasks.items() if task.loss is not None}

    def losses(
        self, gramian: bool = True, absent: tuple[str, ...] = (), inputs: Tensor | None = None
    ) -> mtl.TaskLosses:
        y = {name: None if name in absent else labels for name, labels in self.y.items()}
        return self.heads.loss(self.trunk(self.inputs if inputs is None else inputs), y, gramian=gramian)

    def balancer(self, name: str) -> Balancer:
        return Balancer(name, tasks=self.heads.tasks, **ARGUMENTS.get(name, dict)())

    def step(self, balancer: Balancer, absent: tuple[str, ...] = (), **kwargs: Any) -> mtl.TaskLosses:
        parameters = [*self.trunk.parameters(), *self.heads.parameters(), *balancer.parameters()]
        shared = self.trunk.parameters() if balancer.needs_shared else None
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        return balanced_step(balancer, lambda g: self.losses(g, absent), optimizer, shared=shared, **kwargs)

    def oppose(self) -> None:
        """Makes two tasks want the opposite of each other."""
        rows = self.heads.slices
        with torch.no_grad():
            self.heads.weight[rows["mass"]] = self.heads.weight[rows["size"]]
        self.y["size"], self.y["mass"] = torch.full((24,), 3.0), torch.full((24,), -3.0)

    def jacobian(self, at: Tensor | list[Tensor], losses: mtl.TaskLosses) -> Tensor:
        blocks = autojac.jac(losses.per_task, at, retain_graph=True, parallel_chunk_size=1)
        return torch.cat([block.flatten(1) for block in blocks], 1)


def weights_of(balancer: Balancer) -> Tensor:
    assert balancer.weights is not None
    return balancer.weights
