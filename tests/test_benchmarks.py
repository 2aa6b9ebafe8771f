"""The benchmarks of heads run, and their peers agree with float64. No figure is tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_fused

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(("name", "cases"), (("mlp", 2), ("routed", 2), ("small", 2)))
def test_quick_run(name: str, cases: int, tmp_path: Path) -> None:
    require_fused()
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"bench_{name}.py"), "--quick", "--json", str(figures)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "best/ours" in done.stdout
    result = json.loads(figures.read_text())
    assert len(result["results"]) == cases and result["settings"]["isa"]
    assert all(one["ms"] for one in result["results"])
