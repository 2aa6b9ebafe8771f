"""Trains a GINE model on ToxCast: 617 binary tasks on 8,576 molecules, with 71 % of the labels missing.

All 617 heads, losses and gradients are one call, ``heads.loss(x, y)``, whatever labels a molecule has. Options and
training are those of tox21.py, without models of one task each, which would be 617.

A test metric is the one at the epoch with the best mean validation AUROC, over the tasks that have both classes there.
examples/README.md says how the settings were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import molecule_study
from common.molecule_study import MoleculeSet
from common.molecule_training import Settings

TOXCAST = MoleculeSet(
    "toxcast",
    "ToxCast",
    # A look at the cosines is a matrix of 617 x 617: one in each epoch.
    Settings(epochs=20, batch_size=128, hidden=96, layers=3, lr=3e-3, device="cpu", cosines_every=1_000_000),
    methods=("none", "uw"),
    single_task=False,
)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the program and returns what it saves as ``metrics.json``."""
    return molecule_study.main(TOXCAST, argv)


if __name__ == "__main__":
    main()
