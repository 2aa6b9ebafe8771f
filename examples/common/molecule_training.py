"""Training of a GINE model on molecules: one total loss, or one that a balancing method makes of the tasks' losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch_geometric.data import Batch

import torch_mtl_pyg as mtl
from torch_mtl_pyg.balancing import Balancer, balanced_step, task_cosine
from torch_mtl_pyg.metrics import MetricResults, TaskMetrics

from .gine import GINE, MoleculeModel
from .molecules import Molecules

COSINES_EVERY = 10  # steps between two looks at the angles of the tasks' gradients


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share. ``lr`` is the largest learning rate of the one-cycle schedule."""

    epochs: int
    batch_size: int
    hidden: int
    layers: int
    lr: float
    device: str


@dataclass
class Run:
    """One trained model.

    ``total`` and ``losses`` hold the training loss after each epoch, summed over the tasks and ``[T]``; ``val`` the
    mean validation AUROC; ``test`` the test metrics at ``best_epoch``, the epoch with the best of ``val``. ``cosines``
    are the ``[T, T]`` cosines of the tasks' gradients at the embedding at ``steps``: every tenth of each epoch.
    """

    seed: int
    names: tuple[str, ...]
    parameters: int
    total: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    best_epoch: int = 0
    test: MetricResults | None = None
    steps: list[int] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def auroc(self) -> float:
        """Mean test AUROC at the best epoch."""
        assert self.test is not None
        return self.test.mean("AUROC")

    @property
    def conflicts(self) -> float:
        """Share of task pairs whose gradients point against each other (negative cosine), mean over the steps."""
        cosines = torch.stack(self.cosines)
        pairs = torch.triu_indices(*cosines.shape[1:], offset=1)
        cosines, has = cosines[:, pairs[0], pairs[1]], cosines.diagonal(dim1=1, dim2=2) > 0
        both = has[:, pairs[0]] & has[:, pairs[1]]  # of a task without labels in a batch the cosines are 0
        return float((cosines[both] < 0).double().mean()) if both.any() else 0.0


def train(
    molecules: Molecules,
    method: str,
    seed: int,
    settings: Settings,
    on_epoch: Callable[[Run], object] = lambda run: None,
) -> Run:
    """Trains one model on the binary tasks of ``molecules`` with Adam and a one-cycle schedule.

    Args:
        molecules: With labels 0, 1 or NaN.
        method: A method of :class:`torch_mtl_pyg.balancing.Balancer`; ``"none"`` minimises the sum of the losses.
        seed: Of weights and the order of the molecules; the same for every method.
        settings: Everything else.
        on_epoch: Called with the run after each epoch.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    data = molecules.to(torch.device(settings.device))
    trunk = GINE(data.atom_dims, data.bond_dims, settings.hidden, settings.layers)
    model = MoleculeModel(trunk, settings.hidden, binary(data.task_names))
    balancer = Balancer(method, tasks=model.heads.tasks)
    for module in (model, balancer):
        module.to(settings.device)
    # Some methods learn their weights: those are parameters too.
    optimizer = torch.optim.Adam([*model.parameters(), *balancer.parameters()], lr=settings.lr)
    run = Run(seed, data.task_names, sum(p.numel() for p in model.parameters()))
    index = data.indices("train")
    index = index[~data.y[index].isnan().all(1)]  # for a single task: the molecules that have its label
    batches = math.ceil((len(index) - 1) / settings.batch_size)  # without one of a single molecule
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * batches, pct_start=0.1
    )
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        model.train()
        losses, counts, totals = torch.zeros(data.y.shape[1]), torch.zeros(data.y.shape[1]), []
        for i, batch in enumerate(data.batches(index, settings.batch_size, order)):
            look = i % COSINES_EVERY == 0
            done = balanced_step(balancer, partial(_losses, model, batch, look), optimizer)
            schedule.step()
            if look:
                run.steps.append((epoch - 1) * batches + i + 1)
                run.cosines.append(task_cosine(done.gramian).cpu())
            losses += (done.per_task.detach() * done.count).cpu()
            counts += done.count.cpu()
            totals.append(done.total.detach())
        balancer.end_epoch()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(losses / counts)  # NaN where a task had no label
        run.total.append(float(torch.stack(totals).mean()))
        run.val.append(evaluate(model, data, "val").mean("AUROC"))
        if run.best_epoch == 0 or run.val[-1] > run.val[run.best_epoch - 1]:
            run.best_epoch, run.test = epoch, evaluate(model, data, "test")
        on_epoch(run)
    return run


def binary(names: Iterable[str]) -> dict[str, mtl.Task]:
    """A binary task for each name."""
    return {name: mtl.Task(1, loss="bce") for name in names}


def _losses(model: MoleculeModel, batch: Batch, look: bool, gramian: bool) -> mtl.TaskLosses:
    return model.heads.loss(model.trunk(batch), batch.y, gramian=gramian or look)


@torch.no_grad()
def evaluate(model: MoleculeModel, data: Molecules, part: str) -> MetricResults:
    """The metrics of all tasks on ``"val"`` or ``"test"``."""
    model.eval()
    metrics = TaskMetrics(model.heads)
    for batch in data.batches(data.indices(part), 1024):
        metrics.update(model(batch), batch.y)
    return metrics.compute()
