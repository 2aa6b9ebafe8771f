"""One module for every way to weight tasks that TorchJD has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..task import Task, TaskLosses, as_task
from . import present, state
from .resolve import Method, is_stateful, resolve

_Pair = tuple[TaskLosses, TaskLosses]


class Balancer(nn.Module):
    r"""Turns the losses of all tasks into one, with weights by a method of `TorchJD <https://torchjd.org>`_.

    A *scalarizer* (UW, DWA, FAMO, ...) computes the scalar from the losses. A *weighting* (UPGrad, MGDA, PCGrad, ...)
    computes weights :math:`w` from the Gramian of the tasks' gradients, and the scalar is :math:`\sum_t w_t L_t`. The
    Gramian is that of the gradients at the shared embedding, :math:`\partial L_t / \partial X`, as in MGDA-UB (Sener &
    Koltun 2018, arXiv:1810.04650), not at the parameters below it; with ``shared``, it is the latter.

    The weights also scale the gradients of the heads. The tasks' own weights (``Task.weight``) count for the method
    None alone.

    A task without labels in a batch gets weight 0. A method without memory does not see it: it is given the others'
    losses or Gramian, and of its vectors with a number per task, their numbers. A method with memory (CRMOGM, DWA,
    ExcessMTL, FAMO, GradVac, MoDo, NashMTL, PCD, SDMGrad) sees all tasks always: an absent one with the loss it was
    last seen with, or with a gradient of the size it was last seen with, orthogonal to the others (never seen: the mean
    of the others). For ExcessMTL its gradient is the root mean square of the others.

    Args:
        method: The name of a method (see :func:`method_names`; case, ``-`` and ``_`` do not matter), an instance of
            TorchJD's ``Scalarizer``, ``Weighting`` or ``WeightedAggregator``, or None or ``"none"``: ``losses.total``.
        *args: Arguments of the method's class, where ``method`` is a name.
        tasks: ``heads.tasks``. Those without a loss are left out, and numbers that the method has per task are of the
            others, in order. None: all tasks have a loss. If given, arguments ``shape`` and ``n_tasks`` are filled in.
        **kwargs: Arguments of the method's class, where ``method`` is a name.

    Attributes:
        method: The module of TorchJD, or None.
        weights: ``[T]``, detached: the weights of the last call, 0 for tasks left out. Of a scalarizer, its gradient at
            the losses (None where gradients are off). For the method None, the tasks' weights, if ``tasks`` are known.

    Raises:
        ImportError: TorchJD, or a package that the method needs, is not installed.
        TypeError: An argument has the wrong type, or does not fit the method's class.
        ValueError: There is no such method, it does not weight tasks, or no task has a loss.
    """

    method: nn.Module | None
    _last: Tensor | None

    def __init__(
        self,
        method: str | nn.Module | None = None,
        *args: Any,
        tasks: Mapping[str, Task | int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if tasks is not None and not isinstance(tasks, Mapping):
            raise TypeError(f"tasks: expected a dict such as heads.tasks, got {type(tasks).__name__}.")
        self._tasks = None if tasks is None else {name: as_task(name, task) for name, task in tasks.items()}
        count = None if self._tasks is None else sum(task.loss is not None for task in self._tasks.values())
        if count == 0:
            raise ValueError("tasks: expected at least one with a loss, got none.")
        none = method is None or (isinstance(method, str) and method.lower() == "none")
        if none and (args or kwargs):
            raise TypeError("method: expected a name where arguments are given, got None.")
        self._found: Method | None = None if none else resolve(method, args, kwargs, count)
        self.method = None if self._found is None else self._found.module
        self.weights: Tensor | None = None
        self._names: tuple[str, ...] | None = None
        self._fill: Tensor | None = None
        self._skipped = False
        self.register_buffer("_last", None)

    @property
    def name(self) -> str:
        """The name of the method's class, or ``"none"``."""
        return "none" if self._found is None else self._found.name

    @property
    def needs_gramian(self) -> bool:
        """Whether the losses must come with their Gramian: ``heads.loss(x, y, gramian=True)``."""
        return self._found is not None and self._found.feed in ("gramian", "factor")

    @property
    def needs_shared(self) -> bool:
        """Whether the method needs the gradients at parameters, ``shared``: ExcessMTL, which keeps sums of squares."""
        return self._found is not None and self._found.feed == "jacobian"

    @property
    def needs_update(self) -> bool:
        """Whether the method wants the losses of the same batch again after the optimizer's step (FAMO)."""
        return callable(getattr(self.method, "update", None))

    def forward(
        self, losses: TaskLosses, shared: Iterable[Tensor] | None = None, independent: _Pair | None = None
    ) -> Tensor:
        """The scalar to call ``.backward()`` on.

        Args:
            losses: Of ``heads.loss``, with the Gramian if :attr:`needs_gramian` and ``shared`` is None.
            shared: Parameters below the heads. The Gramian is then of the gradients at these, by one backward pass per
                task. They are not kept, and not looked at by methods that take losses alone.
            independent: (MoDo and SDMGrad, with ``shared``) the losses of two more batches, drawn independently. The
                weights come from the products of the gradients of one with those of the other, as the papers want it
                for mini-batches; without it, from the Gramian of the batch itself, which is exact only if each batch is
                the whole data set.

        Returns:
            Scalar, differentiable. 0 with zero gradient where no task has labels.

        Raises:
            TypeError: ``losses`` are no :class:`~torch_mtl_pyg.TaskLosses`.
            ValueError: The tasks are not those of ``tasks`` or, for a method with memory, not those of the last call;
                something the method needs is missing, or ``independent`` is not for it; a loss, a gradient or a weight
                is not finite (without a method nothing is looked at, as in a plain step).
        """
        if not isinstance(losses, TaskLosses):
            raise TypeError(f"losses: expected TaskLosses, got {type(losses).__name__}.")
        if independent is not None and not (self._found is not None and self._found.two_batches and shared is not None):
            raise ValueError("independent: expected None, since it is for MoDo and SDMGrad together with shared.")
        places = self._balanced(losses)
        batches = [losses, *(independent or ())]
        labelled = torch.stack([batch.count[places] > 0 for batch in batches]).all(0)
        if self._found is None:
            self.weights = self._own_weights(losses)
            return losses.total
        values = losses.per_task[places]
        self._skipped = not bool(labelled.any())
        if self._skipped:
            self.weights = torch.zeros_like(losses.per_task)
            return (losses.per_task * 0.0).sum()
        self._check_finite("losses", values, losses, places)
        if self._found.feed == "losses":
            scalar, weights = self._scalarize(values, labelled)
        else:
            weights = self._weigh(losses, places, labelled, shared, independent)
            scalar = (weights * values).sum()
        self.weights = None
        if weights is not None:
            self._check_finite("weights", weights, losses, places)
            self.weights = torch.zeros_like(losses.per_task).index_copy(0, places, weights.to(losses.per_task.dtype))
        return scalar

    @torch.no_grad()
    def update(self, losses: TaskLosses) -> None:
        """Tells the method the losses of the same batch after the step, if :attr:`needs_update`; else does nothing."""
        if self.needs_update and not self._skipped:
            places = self._balanced(losses)
            self._check_finite("losses", losses.per_task[places], losses, places)
            values = losses.per_task[places]
            if self._fill is not None:
                values = torch.where(losses.count[places] > 0, values, self._fill)
            self.method.update(values)  # type: ignore[union-attr, operator]

    def end_epoch(self) -> None:
        """Tells the method that an epoch is over (DWA); for others it does nothing."""
        step = getattr(self.method, "step", None)
        if callable(step):
            step()

    def reset(self) -> None:
        """Forgets what the method has learned, for a new training or other tasks."""
        self.weights, self._last, self._names, self._fill = None, None, None, None
        if self.method is not None and is_stateful(self.method):
            self.method.reset()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The method."""
        return f"method={self.name}"

    # ---- The two kinds of methods.

    def _scalarize(self, values: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self._found is not None
        if self._found.memory:
            self._fill, self._last = present.remembered(values, labelled, self._last)
            scalar: Tensor = self._found.module(torch.where(labelled, values, self._fill))
        else:
            kept = labelled.nonzero()[:, 0]
            scalar = present.call_on(self._found.module, values[kept], kept, len(labelled))
        if not (scalar.requires_grad and values.requires_grad):
            return scalar, None
        (weights,) = torch.autograd.grad(scalar, values, retain_graph=True)
        return scalar, weights

    @torch.no_grad()
    def _weigh(
        self,
        losses: TaskLosses,
        places: Tensor,
        labelled: Tensor,
        shared: Iterable[Tensor] | None,
        independent: _Pair | None,
    ) -> Tensor:
        assert self._found is not None
        found = self._found
        if shared is None:
            if self.needs_shared:
                raise ValueError(
                    f"shared: expected parameters, since {self.name} needs the gradients at them, got None."
                )
            if losses.gramian is None:
                raise ValueError(
                    f"losses.gramian: expected a matrix, since {self.name} needs it, got None; gramian=True."
                )
            stat = losses.gramian[places][:, places]
        else:
            parameters = [parameter for parameter in shared if parameter.requires_grad]
            if not parameters:
                raise ValueError("shared: expected at least one parameter that requires a gradient, got none.")
            rows = [_jacobian(batch, places, parameters) for batch in independent or (losses,)]
            stat = rows[0] if self.needs_shared else rows[0] @ rows[-1].T
        self._check_finite("gradients", stat.sum(1) if self.needs_shared else stat.diagonal(), losses, places)
        kept = labelled.nonzero()[:, 0]
        if found.memory:
            if self.needs_shared:
                stat = present.filled_jacobian(stat, labelled)
            else:
                stat, self._last = present.filled_gramian(stat, labelled, self._last)
        else:
            stat = stat[kept][:, kept]
        if found.scale_free:
            stat = present.unit_scale(stat)
        if found.feed == "factor":
            stat = present.factor_of(stat)
        if found.memory:
            return torch.where(labelled, found.module(stat).to(stat), 0.0)
        weights = present.call_on(found.module, stat, kept, len(labelled))
        return stat.new_zeros(len(labelled)).index_copy(0, kept, weights.to(stat))

    # ---- Tasks.

    def _balanced(self, losses: TaskLosses) -> Tensor:
        """The indices of the tasks that have a loss."""
        if self._tasks is not None and tuple(self._tasks) != losses.names:
            raise ValueError(f"losses: expected the tasks {list(self._tasks)}, got {list(losses.names)}.")
        if self._found is not None and self._found.memory:
            if self._names not in (None, losses.names):
                raise ValueError(
                    f"losses: expected the tasks of the last call, {list(self._names or ())}, got "
                    f"{list(losses.names)}; reset() makes the balancer forget."
                )
            self._names = losses.names
        tasks = self._tasks
        places = [i for i, name in enumerate(losses.names) if tasks is None or tasks[name].loss is not None]
        return torch.tensor(places, device=losses.per_task.device)

    def _own_weights(self, losses: TaskLosses) -> Tensor | None:
        if self._tasks is None:
            return None
        own = [0.0 if task.loss is None else task.weight for task in self._tasks.values()]
        return losses.per_task.new_tensor(own) * (losses.count > 0)

    def _check_finite(self, what: str, values: Tensor, losses: TaskLosses, places: Tensor) -> None:
        if not bool(values.isfinite().all()):
            wrong = int((~values.isfinite()).nonzero()[0, 0])
            name = losses.names[int(places[wrong])]
            raise ValueError(
                f"{self.name}: {what}: expected finite numbers, got {values[wrong].item()} for the task {name!r}."
            )

    # ---- Saving and loading.

    def get_extra_state(self) -> dict[str, Any]:
        """What the method keeps beside parameters and buffers."""
        inner = {} if self.method is None else state.read(self.method)
        return {"method": self.name, "names": self._names, "inner": inner}

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        """Sets what :meth:`get_extra_state` has returned.

        Raises:
            ValueError: It is of another method.
        """
        if saved["method"] != self.name:
            raise ValueError(f"method: expected the state of {self.name}, got that of {saved['method']}.")
        self._names = None if saved["names"] is None else tuple(saved["names"])
        if self.method is not None:
            state.write(self.method, saved["inner"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state.make_room(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _jacobian(losses: TaskLosses, places: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``[n, P]``: gradients of the losses at all parameters side by side."""
    from torchjd.autojac import jac

    with torch.enable_grad():
        # One backward after the other: not every op of a GNN can be batched.
        blocks = jac(losses.per_task[places], parameters, retain_graph=True, parallel_chunk_size=1)
    return torch.cat([block.flatten(1) for block in blocks], dim=1)
