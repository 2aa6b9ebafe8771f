"""What a training of molecules has to remember so that it can be stopped after any epoch and gone on with."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from torch_mtl_pyg.metrics import MetricResults

from .molecules import Molecules

if TYPE_CHECKING:
    from .molecule_training import Run

# What of a Run grows from epoch to epoch.
_HISTORY = ("total", "losses", "val", "best_epoch", "steps", "cosines", "seconds")


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of another training."""


class Stateful(Protocol):
    """A model, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Sets it."""


class Checkpoint:
    """One training's file, replaced as a whole after each epoch, so that a stop while writing leaves the last one.

    Beside the states it holds the random numbers to come (of torch, and of the order of the molecules), and what has
    been measured. Plain data and tensors only: it is read with ``weights_only=True``.

    Args:
        path: The file.
        of: What tells this training from others, as plain data; a file of another one is refused.
        run: What has been measured; :meth:`load` fills it.
        parts: All that has a state.
        order: Draws the order of the molecules.
    """

    def __init__(
        self, path: Path, of: Mapping[str, Any], run: Run, parts: Sequence[Stateful], order: torch.Generator
    ) -> None:
        self.path, self.of, self.run, self.parts, self.order = path, dict(of), run, parts, order

    def save(self) -> None:
        """Writes the state after an epoch."""
        test = self.run.test
        state = {
            "of": self.of,
            "run": {name: getattr(self.run, name) for name in _HISTORY},
            "test": None if test is None else {"values": dict(test), "about": vars(test)},
            "parts": [part.state_dict() for part in self.parts],
            "random": [torch.get_rng_state(), self.order.get_state(), torch.cuda.get_rng_state_all()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def load(self) -> None:
        """Sets everything to what it was when the file was written; does nothing where there is none.

        Raises:
            CheckpointError: The file is none of these, or of another training; the message says what differs.
        """
        if not self.path.is_file():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            of = state["of"]
        except Exception as error:  # whatever zip, pickle or a key raise
            raise CheckpointError(f"{self.path}: expected a checkpoint, got {type(error).__name__}: {error}") from error
        wrong = [f"{key} {want!r}, got {of.get(key)!r}" for key, want in self.of.items() if of.get(key) != want]
        if wrong:
            raise CheckpointError(f"{self.path}: expected a checkpoint of the same training, with {'; '.join(wrong)}.")
        for part, its in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its)
        for name in _HISTORY:
            setattr(self.run, name, state["run"][name])
        if state["test"] is not None:
            self.run.test = MetricResults()
            self.run.test.update(state["test"]["values"])
            vars(self.run.test).update(state["test"]["about"])
        torch.set_rng_state(state["random"][0])
        self.order.set_state(state["random"][1])
        if state["random"][2]:
            torch.cuda.set_rng_state_all(state["random"][2])


def fingerprint(molecules: Molecules) -> str:
    """The set and its tasks in brief, with a checksum of atoms, labels and split."""
    checksum = 0
    for tensor in (molecules.x, molecules.edge_index, molecules.y, molecules.part):
        checksum = zlib.crc32(tensor.cpu().numpy().tobytes(), checksum)
    names = zlib.crc32("\n".join(molecules.task_names).encode())
    return f"{molecules.name}, {len(molecules)} molecules, {len(molecules.task_names)} tasks, {names:08x}{checksum:08x}"
