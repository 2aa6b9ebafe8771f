"""Trains a GINE model on Tox21: 12 binary tasks on 7,831 molecules, with 17 % of the labels missing.

The loss of all tasks is computed from the embedding in one pass, ``heads.loss(x, y)``, on the label matrix as it is:
a missing label is NaN. ``--balancing`` weights the tasks by a method of TorchJD in place of the plain sum, and several
methods, or ``--compare``, are run over the same seeds and compared with the sum. ``--single-task`` adds 12 models with
one task each.

A test metric is the one at the epoch with the best mean validation AUROC (of a single-task model: its task's).
examples/README.md says how the settings were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import molecule_study
from common.molecule_study import METHODS, MoleculeSet
from common.molecule_training import Settings

__all__ = ["METHODS", "main"]

TOX21 = MoleculeSet("tox21", "Tox21", Settings(epochs=20, batch_size=128, hidden=96, layers=3, lr=3e-3, device="cpu"))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program and returns what it saves as ``metrics.json``."""
    return molecule_study.main(TOX21, argv)


if __name__ == "__main__":
    main()
