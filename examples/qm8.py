"""Trains a GINE model on QM8: 12 regressions on 21,786 molecules, from their graphs alone.

Tasks: energies ``E1``, ``E2`` of the first two electronic transitions and their oscillator strengths ``f1``, ``f2``, by
three methods of quantum chemistry. Labels are standardised by mean and standard deviation of the training molecules,
and the loss is the mean absolute error of these. Options and training are those of tox21.py; ``--single-task`` adds 12
models of one task each.

A test metric is the one at the epoch with the lowest mean validation error (of a single-task model: its task's).
examples/README.md says how the settings were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import molecule_study
from common.molecule_study import MoleculeSet
from common.molecule_training import Settings

QM8 = MoleculeSet(
    "qm8",
    "QM8",
    Settings(epochs=20, batch_size=128, hidden=96, layers=3, lr=3e-3, device="cpu", kind="regression"),
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program and returns what it saves as ``metrics.json``."""
    return molecule_study.main(QM8, argv)


if __name__ == "__main__":
    main()
