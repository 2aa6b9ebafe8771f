"""The three kinds of node-level task: their loss, their metric and their head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from torch import Tensor

import torch_mtl_pyg as mtl


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Args:
        loss_name: The loss of :class:`torch_mtl_pyg.Task`.
        loss: ``loss(out, y)`` of outputs ``[n, C]`` and labels ``[n]``: the mean over the n labelled nodes.
        metric_name: What ``metric`` measures, as printed.
        metric: ``metric(out, y)``, higher is better.
        chance: The metric's value for a prediction that ignores the input, or ``None`` where it depends on the classes.
    """

    loss_name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metric_name: str
    metric: Callable[[Tensor, Tensor], float]
    chance: float | None


KINDS = {
    "multi-class": Kind(
        loss_name="cross_entropy",
        loss=F.cross_entropy,
        metric_name="accuracy",
        metric=lambda out, y: float(accuracy_score(y.numpy(), out.argmax(dim=1).numpy())),
        chance=None,
    ),
    "binary": Kind(
        loss_name="bce",
        loss=lambda out, y: F.binary_cross_entropy_with_logits(out[:, 0], y),
        metric_name="AUROC",
        metric=lambda out, y: float(roc_auc_score(y.numpy(), out[:, 0].numpy())),
        chance=0.5,
    ),
    "regression": Kind(
        loss_name="mse",
        loss=lambda out, y: F.mse_loss(out[:, 0], y),
        metric_name="R2",
        metric=lambda out, y: float(r2_score(y.numpy(), out[:, 0].numpy())),
        chance=0.0,
    ),
}


@dataclass(frozen=True)
class NodeTask:
    """A task on the nodes of one graph.

    Args:
        kind: A key of :data:`KINDS`.
        y: Labels ``[N]``: int64 classes, or float32 (0/1 for binary, standardised for regression).
        weight: Factor of this task's loss in the sum that is minimised.
        description: What is predicted, one line.
    """

    kind: str
    y: Tensor
    weight: float
    description: str

    @property
    def spec(self) -> Kind:
        """Loss and metric of this task."""
        return KINDS[self.kind]

    @property
    def head(self) -> mtl.Task:
        """The task as :class:`torch_mtl_pyg.MultiTaskHeads` takes it: as many outputs as classes, or one."""
        width = int(self.y.max()) + 1 if self.kind == "multi-class" else 1
        return mtl.Task(width, loss=self.spec.loss_name, weight=self.weight)

    @property
    def chance(self) -> float:
        """Metric of a prediction that ignores the input (multi-class: the share of the largest class)."""
        if self.spec.chance is not None:
            return self.spec.chance
        return float(np.bincount(self.y.numpy()).max() / self.y.numel())


def standardise(values: Tensor, train_mask: Tensor) -> Tensor:
    """``(values - mean) / std`` with the mean and standard deviation of the training nodes only."""
    train = values[train_mask]
    return ((values - train.mean()) / train.std()).float()
