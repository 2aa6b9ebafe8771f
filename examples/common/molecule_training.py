"""Training of a GINE model on molecules: one total loss, or one that a balancing method makes of the tasks' losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Batch

import torch_mtl_pyg as mtl
from torch_mtl_pyg.balancing import Balancer, balanced_step, task_cosine
from torch_mtl_pyg.metrics import MetricResults, TaskMetrics

from .gine import GINE, MoleculeModel
from .molecule_checkpoint import Checkpoint, fingerprint
from .molecule_kinds import KINDS, Kind
from .molecules import Molecules


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison share.

    Args:
        epochs: Number of training epochs.
        batch_size: Molecules in a batch.
        hidden: Width of the trunk and of the embedding.
        layers: Layers of the trunk.
        lr: The largest learning rate of the one-cycle schedule.
        device: A torch device.
        kind: A key of :data:`common.molecule_kinds.KINDS`.
        dropout: Of the embedding.
        weight_decay: Of AdamW; 0 is plain Adam.
        cosines_every: Steps between two looks at the angles of the tasks' gradients, counted anew in each epoch.
        amp: Whether the model runs under bfloat16 autocast.
        compile: Whether the trunk runs under ``torch.compile``. The heads and losses are one call with it or without.
    """

    epochs: int
    batch_size: int
    hidden: int
    layers: int
    lr: float
    device: str
    kind: str = "binary"
    dropout: float = 0.0
    weight_decay: float = 0.0
    cosines_every: int = 10
    amp: bool = False
    compile: bool = False


@dataclass
class Run:
    """One trained model.

    ``total`` and ``losses`` hold the training loss after each epoch, summed over the tasks and ``[T]``; ``val`` the
    mean of the validation metric over the tasks; ``test`` the test metrics at ``best_epoch``, the epoch with the best
    of ``val``. ``cosines`` are the ``[T, T]`` cosines of the tasks' gradients at the embedding at ``steps``.
    """

    seed: int
    names: tuple[str, ...]
    parameters: int
    kind: Kind = KINDS["binary"]
    total: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    best_epoch: int = 0
    test: MetricResults | None = None
    steps: list[int] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Mean of the test metric over the tasks, at the best epoch."""
        assert self.test is not None
        return self.test.mean(self.kind.metric)

    @property
    def auroc(self) -> float:
        """The same for binary tasks."""
        assert self.kind.metric == "AUROC"
        return self.score

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
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Run:
    """Trains one model on the tasks of ``molecules`` with Adam and a one-cycle schedule.

    Args:
        molecules: With labels as the kind of task has them, NaN where one is missing.
        method: A method of :class:`torch_mtl_pyg.balancing.Balancer`; ``"none"`` minimises the sum of the losses.
        seed: Of weights and the order of the molecules; the same for every method.
        settings: Everything else.
        on_epoch: Called with the run after each epoch.
        checkpoint: File that holds all that the next epoch depends on, written after each epoch.
        resume: Whether to go on from that file; where there is none, the training starts at its beginning.

    Raises:
        CheckpointError: The file is of another training.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    kind = KINDS[settings.kind]
    data = molecules.to(torch.device(settings.device))
    trunk = GINE(data.atom_dims, data.bond_dims, settings.hidden, settings.layers, settings.dropout)
    model = MoleculeModel(trunk, settings.hidden, kind.tasks(data.task_names))
    balancer = Balancer(method, tasks=model.heads.tasks)
    for module in (model, balancer):
        module.to(settings.device)
    if settings.compile:
        trunk.compile(dynamic=True, fullgraph=True)  # in place: the names in its state_dict stay
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    if learned := list(balancer.parameters()):  # some methods learn their weights, which do not decay
        optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
    run = Run(seed, data.task_names, sum(p.numel() for p in model.parameters()), kind)
    index = data.indices("train")
    index = index[~data.y[index].isnan().all(1)]  # for a single task: the molecules that have its label
    batches = math.ceil((len(index) - 1) / settings.batch_size)  # without one of a single molecule
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.epochs * batches, pct_start=0.1
    )
    kept = None
    if checkpoint is not None:
        of = {**asdict(settings), "method": method, "seed": seed, "data": fingerprint(molecules)}
        kept = Checkpoint(checkpoint, of, run, (model, balancer, optimizer, schedule), order)
        if resume:
            kept.load()
    for epoch in range(len(run.total) + 1, settings.epochs + 1):
        start = time.perf_counter()
        model.train()
        losses, counts, totals = torch.zeros(data.y.shape[1]), torch.zeros(data.y.shape[1]), []
        for i, batch in enumerate(data.batches(index, settings.batch_size, order)):
            look = i % settings.cosines_every == 0
            done = balanced_step(balancer, partial(_losses, model, batch, settings, look), optimizer)
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
        run.val.append(evaluate(model, data, "val", settings).mean(kind.metric))
        if run.best_epoch == 0 or kind.better(run.val[-1], run.val[run.best_epoch - 1]):
            run.best_epoch, run.test = epoch, evaluate(model, data, "test", settings)
        if kept is not None:
            kept.save()
        on_epoch(run)
    return run


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16, enabled=settings.amp)


def _losses(model: MoleculeModel, batch: Batch, settings: Settings, look: bool, gramian: bool) -> mtl.TaskLosses:
    with _autocast(settings):
        return model.heads.loss(model.embed(batch), batch.y, gramian=gramian or look)


@torch.no_grad()
def evaluate(model: MoleculeModel, data: Molecules, part: str, settings: Settings) -> MetricResults:
    """The metrics of all tasks on ``"val"`` or ``"test"``."""
    model.eval()
    metrics = TaskMetrics(model.heads)
    for batch in data.batches(data.indices(part), 1024):
        with _autocast(settings):
            outputs = model(batch)
        metrics.update(outputs, batch.y)
    return metrics.compute()
