"""A whole training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..task import TaskLosses
from .balancer import Balancer

LossesFn = Callable[[bool], TaskLosses]


def balanced_step(
    balancer: Balancer,
    losses_fn: LossesFn,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    shared: Iterable[Tensor] | None = None,
    independent: tuple[LossesFn, LossesFn] | None = None,
) -> TaskLosses:
    """Runs one step: gradients to zero, losses, weights, backward, optimizer; and the losses again if FAMO wants them.

    Args:
        balancer: The :class:`Balancer`.
        losses_fn: ``losses_fn(gramian)`` runs the trunk and ``heads.loss(x, y, gramian=gramian)`` on the batch of this
            step. FAMO calls it twice: dropout is drawn again, and batch norm sees the batch again.
        optimizer: Any but those that need a closure.
        scaler: For float16: scales the loss, and skips the step where gradients overflow.
        clip: The largest norm of the gradient of all parameters together.
        shared: As in :meth:`Balancer.forward`.
        independent: As in :meth:`Balancer.forward`, each a ``losses_fn`` of a batch of its own.

    Returns:
        The losses before the step, detached, so that a list of them keeps no graphs.

    Raises:
        TypeError: ``balancer`` is no :class:`Balancer`.
        ValueError: As :meth:`Balancer.forward`; the optimizer has made no step then.
    """
    if not isinstance(balancer, Balancer):
        raise TypeError(f"balancer: expected a Balancer, got {type(balancer).__name__}.")
    parameters = None if shared is None else list(shared)
    optimizer.zero_grad()
    losses = losses_fn(balancer.needs_gramian and parameters is None)
    others = None if independent is None else (independent[0](False), independent[1](False))
    loss = balancer(losses, parameters, others)
    (loss if scaler is None else scaler.scale(loss)).backward()
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if balancer.needs_update:
        with torch.no_grad():
            balancer.update(losses_fn(False))
    return TaskLosses(losses.names, losses.per_task.detach(), losses.total.detach(), losses.count, losses.gramian)
