"""What the tests of the examples on nodes share: examples/ on the path, and where Cora lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples"))


def planetoid_root() -> Path:
    """Folder that holds Cora/raw, or skips the test with the reason."""
    given = os.environ.get("TORCH_MTL_PYG_DATA")
    root = Path(given) / "planetoid" if given else REPOSITORY.parent / "shared/data/planetoid"
    if not (root / "Cora/raw/ind.cora.x").is_file():
        pytest.skip(f"no Cora below {root}; set TORCH_MTL_PYG_DATA to the folder that holds planetoid/Cora/raw")
    return root
