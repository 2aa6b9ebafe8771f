"""Joint batches of several data sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torch_geometric.data.data import BaseData
from torch_geometric.loader import DataLoader
from torch_geometric.loader.dataloader import Collater

from .task import checked_integer

Sampling = Literal["proportional", "temperature", "round_robin"]
_OWN = ("batch_sampler", "sampler", "collate_fn")


class MultiTaskLoader(DataLoader):  # type: ignore[misc]
    r"""Batches drawn from the data sets of several tasks, each a dict from task to its part.

    What :class:`~torch_mtl_pyg.MultiTaskModel` takes. It is one ``torch_geometric.loader.DataLoader``, so that all
    tasks share its workers; all of its options can be given.

    An epoch has as many samples as all data sets have together, whatever the shares. Each batch is apportioned by
    largest remainders, and what rounding left is carried on, also into the next epoch: with shares :math:`q_t`, task
    ``t`` has had less than one sample more than :math:`m q_t` of the first ``m`` at the end of each batch. Data sets
    that are through start over, reshuffled; those that are not go on in the next epoch. With ``"proportional"``, each
    sample comes exactly once an epoch.

    Args:
        datasets: Name of each task to its data set: anything with a length and items of PyG (``Dataset``, a list of
            ``Data``), or one ``Data``: a single graph, which is not made a ``Batch``, and comes at most once a batch.
        batch_size: Samples of a batch, all tasks together.
        sampling: The shares. ``"proportional"``: :math:`q_t = n_t / n`; ``"temperature"``: as
            :math:`n_t^{1 / \tau}`; ``"round_robin"``: equal, one after the other.
        temperature: (temperature) :math:`\tau`, greater than 0: 1 is proportional, the larger the more equal.
        shuffle: Whether the samples of a data set come in random order, a new one each time it starts over.
        drop_last: Whether an incomplete last batch is left out.
        num_workers: Processes that load; 0: this one.
        pin_memory: Whether batches go to pinned memory.
        generator: What the order comes from, drawn from at the first batch; None: torch's own generator. The order is
            the same with any number of workers.
        **kwargs: Of ``torch_geometric.loader.DataLoader``: ``follow_batch``, ``persistent_workers``, ...

    A batch holds the tasks that have a sample in it, in the order of ``datasets``.

    Raises:
        TypeError: An argument has the wrong type, or is the loader's own (a sampler, a collate function).
        ValueError: There is no data set, one is empty, a number is out of range, an option belongs to another sampling,
            or no batch would be complete.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        batch_size: int,
        sampling: Sampling = "proportional",
        temperature: float = 2.0,
        shuffle: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        for name in _OWN:
            if name in kwargs:
                raise TypeError(f"{name}: expected none, since the loader has its own, got one.")
        joint = _JointDataset(datasets)
        batch_size = checked_integer("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
        for argument, value in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                raise TypeError(f"{argument}: expected a bool, got {type(value).__name__}.")
        sizes = list(joint.sizes.values())
        if drop_last and sum(sizes) < batch_size:
            raise ValueError(f"batch_size: expected at most {sum(sizes)}, the samples there are, got {batch_size}.")
        weights = _weights(sizes, sampling, temperature)
        self.shares: dict[str, float] = {n: w / sum(weights) for n, w in zip(joint.sizes, weights, strict=True)}
        sampler = _JointSampler(sizes, weights, batch_size, shuffle, drop_last, generator)
        super().__init__(
            joint,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=generator,
            **kwargs,
        )
        self.collate_fn = _Collate(joint, self.follow_batch, self.exclude_keys)


class _JointDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples by task and index."""

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        if not isinstance(datasets, Mapping):
            raise TypeError(f"datasets: expected a dict from task to data set, got {type(datasets).__name__}.")
        if not datasets:
            raise ValueError("datasets: expected at least one, got none.")
        self.sizes: dict[str, int] = {}
        for name, dataset in datasets.items():
            if not isinstance(name, str):
                raise TypeError(f"datasets: expected names that are strings, got {name!r}.")
            where = f"datasets[{name!r}]"
            single = isinstance(dataset, BaseData)
            if isinstance(dataset, (IterableDataset, Mapping, str, Tensor)) or not (
                single or (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))
            ):
                raise TypeError(f"{where}: expected a data set with a length, or a Data, got {type(dataset).__name__}.")
            self.sizes[name] = 1 if single else len(dataset)
            if not self.sizes[name]:
                raise ValueError(f"{where}: expected at least one sample, got none.")
        self.datasets = dict(datasets)
        self.names = tuple(datasets)

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Any]:
        task, index = place
        dataset = self.datasets[self.names[task]]
        # A copy that shares the tensors: data.to(device) changes the object itself.
        return task, copy.copy(dataset) if isinstance(dataset, BaseData) else dataset[index]


class _Collate:
    """A batch of each task by PyG's own rules."""

    def __init__(self, joint: _JointDataset, follow_batch: Any, exclude_keys: Any) -> None:
        self.names = joint.names
        self.single = frozenset(n for n, dataset in joint.datasets.items() if isinstance(dataset, BaseData))
        self.collater = Collater(joint, follow_batch, exclude_keys)

    def __call__(self, samples: list[tuple[int, Any]]) -> dict[str, Any]:
        by_task: dict[int, list[Any]] = {}
        for task, sample in samples:
            by_task.setdefault(task, []).append(sample)
        batches: dict[str, Any] = {}
        for task in sorted(by_task):
            name = self.names[task]
            batches[name] = by_task[task][0] if name in self.single else self.collater(by_task[task])
        return batches


class _JointSampler:
    """Batches of (task, index). What an epoch leaves of a data set, the next one begins with."""

    def __init__(
        self,
        sizes: list[int],
        weights: list[int] | list[float],
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.sizes, self.weights, self.batch_size = sizes, weights, batch_size
        self.shuffle, self.drop_last, self.generator = shuffle, drop_last, generator
        self.own: torch.Generator | None = None  # PyTorch draws from the other one as often as workers start
        self.taken = [0] * len(sizes)  # samples of each task so far
        self.rest = [torch.empty(0, dtype=torch.int64) for _ in sizes]  # indices of each task that come next

    def __len__(self) -> int:
        n = sum(self.sizes)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # The whole epoch at once: a loop that is left early, and workers that read ahead, do not change the next one.
        # Not before the first batch is asked for: DataLoader makes iterators that it does not use.
        if self.own is None:
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
            self.own = torch.Generator().manual_seed(seed)
        n = sum(self.sizes)
        counts = [self._apportion(min(self.batch_size, n - begin)) for begin in range(0, n, self.batch_size)]
        indices = [self._next(t, sum(column)) for t, column in enumerate(zip(*counts, strict=True))]
        places = [0] * len(self.sizes)
        for batch in counts[: len(self)]:
            samples: list[tuple[int, int]] = []
            for t, count in enumerate(batch):
                samples.extend((t, index) for index in indices[t][places[t] : places[t] + count].tolist())
                places[t] += count
            yield samples

    def _apportion(self, batch_size: int) -> list[int]:
        """How many samples of the next batch come from each task."""
        total = sum(self.weights)
        m = sum(self.taken) + batch_size
        # Times `total`, so that integer weights are exact.
        wanted = [weight * m - taken * total for weight, taken in zip(self.weights, self.taken, strict=True)]
        counts = [max(0, int(w // total)) for w in wanted]
        order = sorted(range(len(wanted)), key=lambda t: counts[t] * total - wanted[t])
        for t in order[: max(0, batch_size - sum(counts))]:
            counts[t] += 1
        while sum(counts) > batch_size:  # several tasks have had too much
            t = max(range(len(counts)), key=lambda t: counts[t])
            counts[t] -= 1
        self.taken = [a + b for a, b in zip(self.taken, counts, strict=True)]
        return counts

    def _next(self, t: int, count: int) -> Tensor:
        """The next indices of a task."""
        parts, have = [self.rest[t]], self.rest[t].shape[0]
        while have < count:
            n = self.sizes[t]
            parts.append(torch.randperm(n, generator=self.own) if self.shuffle else torch.arange(n))
            have += n
        every = torch.cat(parts)
        self.rest[t] = every[count:]
        return every[:count]


def _weights(sizes: list[int], sampling: object, temperature: object) -> list[int] | list[float]:
    """Numbers that the shares are proportional to: integers where these are exact."""
    if sampling not in get_args(Sampling):
        wanted = ", ".join(get_args(Sampling))
        error = ValueError if isinstance(sampling, str) else TypeError
        raise error(f"sampling: expected one of {wanted}, got {sampling!r}.")
    if isinstance(temperature, (bool, str)) or not hasattr(temperature, "__float__"):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}.")
    tau = float(temperature)
    if not (math.isfinite(tau) and tau > 0.0):
        raise ValueError(f"temperature: expected a finite number greater than 0, got {tau}.")
    if sampling != "temperature" and tau != 2.0:
        raise ValueError(f"temperature: is an option of the sampling 'temperature', got it for {sampling!r}.")
    if sampling == "round_robin":
        return [1] * len(sizes)
    if sampling == "proportional":
        return sizes
    largest = max(sizes)  # powers of ratios: large numbers of samples do not overflow at small temperatures
    weights = [(size / largest) ** (1.0 / tau) for size in sizes]
    if min(weights) == 0.0:
        raise ValueError(f"temperature: expected one that leaves each task a share, got {tau}.")
    return weights
