"""What the tests of the examples on molecules share: a small set of the real ones' format, where those lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples"))

for package, extra in (("sklearn", "demo"), ("torchjd", "balancing"), ("torchmetrics", "metrics")):
    pytest.importorskip(package, reason=f"the example needs the extra [{extra}]")

from common import molecule_report, molecule_training  # noqa: E402

ATOMS, BONDS, COUNT = (6, 3), (4, 2), 120


def write_molecules(folder: Path, name: str, names: Sequence[str], y: np.ndarray | None = None) -> None:
    """Writes a small ``name/name.npz``: 120 chains of 1 to 6 atoms; 60 for training, 30 and 30.

    Args:
        folder: Where to.
        name: Name of the set.
        names: Names of the tasks.
        y: Labels ``[120, T]``; by default binary ones, 17 % of them missing.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, COUNT)
    chains = [np.stack([np.arange(n - 1), np.arange(1, n)]) for n in sizes]
    edges = [np.concatenate([c, c[::-1]], axis=1) for c in chains]
    edge_ptr = np.concatenate([[0], np.cumsum([e.shape[1] for e in edges])])
    x = np.stack([rng.integers(0, n, sizes.sum()) for n in ATOMS], axis=1)
    if y is None:
        y = rng.integers(0, 2, (COUNT, len(names))).astype(np.float32)
        y[rng.random(y.shape) < 0.17] = np.nan
    part = np.repeat([0, 1, 2], [60, 30, 30]).astype(np.int8)
    (folder / name).mkdir()
    np.savez(
        folder / name / f"{name}.npz",
        x=x.astype(np.int16),
        edge_index=np.concatenate(edges, axis=1).astype(np.int32),
        edge_attr=np.stack([rng.integers(0, n, edge_ptr[-1]) for n in BONDS], axis=1).astype(np.int16),
        node_ptr=np.concatenate([[0], np.cumsum(sizes)]),
        edge_ptr=edge_ptr,
        y=y.astype(np.float32),
        task_names=np.array(names),
        split_random=part,
        split_scaffold=part[::-1].copy(),
        atom_feature_dims=np.array(ATOMS, np.int16),
        bond_feature_dims=np.array(BONDS, np.int16),
    )


def options(root: Path, out: Path, *more: str) -> list[str]:
    """A command line for a small model."""
    small = ["--epochs", "2", "--hidden", "8", "--batch-size", "16", "--no-progress"]
    return ["--root", str(root), "--out", str(out), *small, *more]


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all else here, and are drawn where they are looked at."""
    for figure in ("conflict_heatmap", "conflicts_over_time", "loss_curves"):
        monkeypatch.setattr(molecule_report, figure, lambda *args, path, **options: path.write_bytes(b"\x89PNG"))


def stop_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training is stopped after its checkpoint of this epoch is written."""
    save = molecule_training.Checkpoint.save

    def stopping(self: molecule_training.Checkpoint) -> None:
        save(self)
        if len(self.run.total) == epoch:
            monkeypatch.setattr(molecule_training.Checkpoint, "save", save)
            raise KeyboardInterrupt

    monkeypatch.setattr(molecule_training.Checkpoint, "save", stopping)


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary without what differs from run to run."""
    methods = {m: {key: v for key, v in row.items() if key != "seconds"} for m, row in summary["methods"].items()}
    return {**summary, "methods": methods}


def molecules_root(name: str) -> Path:
    """Folder of the real sets that holds ``name``, or skips the test with the reason."""
    given = os.environ.get("TORCH_MTL_PYG_DATA")
    folder = Path(given) / "molecules" if given else REPOSITORY.parent / "shared/data/molecules"
    if not (folder / name / f"{name}.npz").is_file():
        pytest.skip(f"no {name}/{name}.npz below {folder}; set TORCH_MTL_PYG_DATA to the folder of molecules/{name}")
    return folder
