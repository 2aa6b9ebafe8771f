"""The example of several classifiers on one GNN: who trains what, losses, numbers. Needs no data, bar one test."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from demo_common import planetoid_root, write_planetoid

pytest.importorskip("sklearn", reason="the example needs the extra [demo]")

import shared_representation as example

import torch_mtl_pyg as mtl

TASKS = ("subject", "triangle", "links")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planetoid")
    write_planetoid(folder, "Cora", features=140, classes=7)
    return folder


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of ``model.loss`` got and gave, and the embedding it saw."""
    calls: list[dict[str, Any]] = []
    original: Callable[..., mtl.TaskLosses] = mtl.MultiTaskModel.loss

    def loss(self: mtl.MultiTaskModel, data: Any, y: torch.Tensor, **how: Any) -> mtl.TaskLosses:
        state = torch.get_rng_state()  # dropout draws the same numbers twice
        with torch.no_grad():
            h = self.trunk(data.x, data.edge_index).double()
        torch.set_rng_state(state)
        heads = [p.detach().double().clone() for p in (self.heads.weight, self.heads.bias)]
        found = original(self, data, y, **how)
        calls.append({"data": data, "y": y, "h": h, "heads": heads, "losses": found, **how})
        return found

    monkeypatch.setattr(mtl.MultiTaskModel, "loss", loss)
    return calls


def test_labels_are_those_of_the_graph(root: Path) -> None:
    data, y, tasks = example.load(root)
    assert tuple(tasks) == TASKS and [t.out_channels for t in tasks.values()] == [7, 2, 3]
    assert y.shape == (3, 660) and torch.equal(y[0], data.y)
    neighbours = [set(data.edge_index[0][data.edge_index[1] == i].tolist()) - {i} for i in range(60)]
    for i in range(60):
        linked = data.edge_index[1].eq(i).sum().item()
        assert y[2, i] == (0 if linked <= 2 else 1 if linked <= 4 else 2)
        both = (set(data.edge_index[0][data.edge_index[1] == j].tolist()) & neighbours[i] for j in neighbours[i])
        assert y[1, i] == any(others - {i, j} for others, j in zip(both, neighbours[i], strict=True))
    assert all(len(labels.unique()) > 1 for labels in y)


def test_rows_take_turns_and_the_losses_are_those_of_their_own_head(
    any_backend: str, root: Path, watched: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--root", str(root), "--epochs", "3"])
    printed = capsys.readouterr().out
    _, y, _ = example.load(root)
    rows = torch.arange(660)
    served = torch.stack([call["task"] for call in watched])
    assert torch.equal(served.sort(0).values, torch.tensor([[0], [1], [2]]).expand(3, 660))
    for epoch, call in enumerate(watched, start=1):
        assert call["mask"] == "train_mask" and torch.equal(call["y"], y[call["task"], rows])
        weight, bias = call["heads"]
        line = next(line for line in printed.splitlines() if line.startswith(f"epoch {epoch:3d}:"))
        ends = [0, 7, 9, 12]
        for t, name in enumerate(TASKS):
            mine = (call["task"] == t) & call["data"].train_mask
            own = slice(ends[t], ends[t + 1])
            expected = F.cross_entropy(call["h"][mine] @ weight[own].T + bias[own], y[t][mine])
            assert call["losses"][name].item() == pytest.approx(expected.item(), rel=1e-5)
            assert f"{name} {expected:.4f}"[:-1] in line
        total = call["losses"]["subject"] + 0.1 * (call["losses"]["triangle"] + call["losses"]["links"])
        assert call["losses"].total.item() == pytest.approx(total.item(), rel=1e-5)


def test_main_learns_and_the_same_seed_gives_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [example.main(["--root", str(root), "--epochs", "100", "--seed", seed]) for seed in ("0", "0", "1")]
    printed = capsys.readouterr().out
    assert runs[0] == runs[1] != runs[2]
    assert tuple(runs[0]) == TASKS
    assert runs[0]["subject"] > 0.6
    assert len(re.findall(r"^epoch ", printed, re.MULTILINE)) == 300
    data, y, _ = example.load(root)
    for name, labels in zip(TASKS, y, strict=True):
        guess = labels[data.test_mask].bincount().max().item() / 100
        assert re.search(rf"^  {name} +{runs[0][name]:.3f}  {guess:.3f}$", printed, re.MULTILINE)


def test_bad_options(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--root", str(tmp_path)], "ind.cora.allx  (missing)"),
        (["--root", str(root), "--epochs", "0"], "--epochs must be at least 1, got 0"),
        ([], "required: --root"),
    ):
        with pytest.raises(SystemExit) as stop:
            example.main(options)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_real_data() -> None:
    accuracy = example.main(["--root", str(planetoid_root()), "--epochs", "100"])
    assert accuracy["subject"] > 0.65
