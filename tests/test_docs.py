"""Every Python snippet of README.md, CONTRIBUTING.md and docs/ runs, in order, each page in one namespace."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        for match in SNIPPET.finditer(text):
            line = text[: match.start()].count("\n") + 2
            code = compile("\n" * (line - 1) + match.group(1), str(page), "exec")
            exec(code, namespace)


def test_there_are_snippets() -> None:
    counts = {page.name: len(SNIPPET.findall(page.read_text())) for page in PAGES}
    assert counts["README.md"] >= 3, counts


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "csrc" / "README.md", ROOT / "examples" / "README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
