"""What the tests of the examples on nodes share: examples/ on the path, where Cora lies, a small one of its format."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sparse = pytest.importorskip("scipy.sparse", reason="the examples on nodes need the extra [demo]")

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples"))


def planetoid_root() -> Path:
    """Folder that holds Cora/raw, or skips the test with the reason."""
    given = os.environ.get("TORCH_MTL_PYG_DATA")
    root = Path(given) / "planetoid" if given else REPOSITORY.parent / "shared/data/planetoid"
    if not (root / "Cora/raw/ind.cora.x").is_file():
        pytest.skip(f"no Cora below {root}; set TORCH_MTL_PYG_DATA to the folder that holds planetoid/Cora/raw")
    return root


def write_planetoid(root: Path, name: str, features: int, classes: int) -> None:
    """Writes a small ``name/raw/ind.name.*`` as Planetoid has them: 660 nodes, 40 for training, 500, and 100 for test.

    Words and links tell the class: half of a node's words are those of its class, and most links join equal classes.
    """
    rng = np.random.default_rng(features)
    nodes, train, test = 660, 40, 100
    label = rng.integers(0, classes, nodes)
    own = np.arange(features) % classes == label[:, None]
    x = sparse.csr_matrix((rng.random((nodes, features)) < np.where(own, 0.2, 0.05)).astype(np.float32))
    y = np.eye(classes, dtype=np.int32)[label]
    graph: dict[int, list[int]] = {i: [] for i in range(nodes)}
    for i in range(nodes):
        alike = np.flatnonzero(label == label[i])
        for j in [*rng.choice(alike, 2).tolist(), int(rng.integers(nodes))]:
            graph[i].append(j)
            graph[j].append(i)
    index = rng.permutation(np.arange(nodes - test, nodes))
    rows = {"": np.arange(train), "t": index, "all": np.arange(nodes - test)}
    parts: dict[str, Any] = {"graph": graph}
    for part, own_rows in rows.items():
        parts |= {f"{part}x": x[own_rows], f"{part}y": y[own_rows]}
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, value in parts.items():
        (folder / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value))
    (folder / f"ind.{name.lower()}.test.index").write_text("\n".join(map(str, index)) + "\n")
