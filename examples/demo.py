"""Trains one multi-task GNN for three related tasks and compares it with three single-task GNNs of the same size.

``digits`` (default, needs no network): the 1,797 handwritten digits that ship with scikit-learn. A node is an image and
sees its left half only; edges join images with similar left halves. Tasks: the digit (of the whole image), whether the
ink encloses background (a property of the whole image's shape, not of the digit), and the ink in the right half. None
of them is a function of the node's own input, since the right half is hidden from both inputs and edges.

``cora`` (needs the raw files, ``--root``): papers with their words and citations. Tasks: the subject, whether a paper
lies on a triangle of citations, and its log-degree; the last two are properties of the graph, absent from the words.

How far a node's own features go is shown, not claimed: the column "own features" is the best of five regularised linear
models on them. All models train for the same number of epochs, and every test metric is taken at the epoch with that
task's lowest validation loss, for the multi-task model as for the single-task ones. So the multi-task numbers of
different tasks may stem from different epochs of the one run. All models share learning rate, weight decay and epochs;
examples/README.md says how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data import cora, digits
from common.study import parsed, parser, seeds_of, study


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it saves as ``metrics.json``."""
    p = parser("Multi-task against single-task GNNs on real data.", Path("demo_output"))
    p.add_argument("--dataset", choices=("digits", "cora"), default="digits")
    p.add_argument("--root", type=Path, help="folder that holds Cora/raw/ind.cora.* (only read; cora only)")
    args = parsed(p, argv)
    if args.dataset == "cora" and args.root is None:
        p.error("--dataset cora needs --root, the folder that holds Cora/raw/ind.cora.*")
    if args.dataset == "digits" and args.root is not None:
        p.error("--root is for --dataset cora; digits ships with scikit-learn")
    try:
        graphs = [cora(args.root)] * args.runs if args.root else [digits(seed) for seed in seeds_of(args)]
    except ValueError as error:
        p.error(str(error))
    return study(graphs, args)


if __name__ == "__main__":
    main()
