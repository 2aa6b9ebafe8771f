"""The demo: its data leaks nothing, its numbers are better than chance, its files and errors are as promised."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_common import planetoid_root

pytest.importorskip("sklearn", reason="the demo needs the extra [demo]")

import demo
from common import data as demo_data
from common.baselines import own_features
from common.report import mean_std, verdict
from common.tasks import KINDS, NodeTask, standardise
from common.training import total_loss, train
from sklearn.datasets import load_digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def graph() -> demo_data.MultiTaskGraph:
    """Digits with the split of seed 0."""
    return demo_data.digits(seed=0)


def test_inputs_and_edges_do_not_see_the_right_half() -> None:
    images = load_digits().images
    altered = images.copy()
    altered[:, :, 4:] = np.random.default_rng(0).permuted(16 - images[:, :, 4:], axis=0)
    for original, other in zip(demo_data.left_half_graph(images), demo_data.left_half_graph(altered), strict=True):
        assert torch.equal(original, other)
    # The same check must notice the left half, otherwise it proves nothing.
    altered[0, 3, 3] += 1
    assert not torch.equal(demo_data.left_half_graph(images)[0], demo_data.left_half_graph(altered)[0])


def test_targets_need_more_than_the_left_half() -> None:
    """The ink target changes with the right half alone; the hole too."""
    ring = np.zeros((8, 8))
    ring[2:6, 2:6] = 16
    ring[3:5, 3:5] = 0
    assert demo_data.has_hole(ring)
    opened = ring.copy()
    opened[3:5, 5] = 0
    assert not demo_data.has_hole(opened)
    # A diagonal gap is closed for 4-connected background.
    corner = ring.copy()
    corner[2, 2] = 0
    assert demo_data.has_hole(corner)


def test_graph_is_undirected_without_loops_and_has_k_neighbours(graph: demo_data.MultiTaskGraph) -> None:
    edge_index = graph.data.edge_index
    n = graph.data.num_nodes
    assert n == 1797
    adjacency = torch.zeros(n, n, dtype=torch.bool)
    adjacency[edge_index[0], edge_index[1]] = True
    assert torch.equal(adjacency, adjacency.T)
    assert not adjacency.diagonal().any()
    assert int(adjacency.sum()) == edge_index.size(1)
    assert adjacency.sum(dim=1).min() >= 8


def test_split_is_stratified_disjoint_and_fixed_by_the_seed(graph: demo_data.MultiTaskGraph) -> None:
    masks = [graph.data.train_mask, graph.data.val_mask, graph.data.test_mask]
    assert [int(m.sum()) for m in masks] == [179, 359, 1259]
    assert torch.equal(torch.stack(masks).sum(dim=0), torch.ones(1797, dtype=torch.long))
    counts = torch.bincount(graph.tasks["digit"].y[masks[0]], minlength=10)
    assert counts.min() >= 17
    assert counts.max() <= 19
    assert torch.equal(demo_data.digits(seed=0).data.train_mask, masks[0])
    assert not torch.equal(demo_data.digits(seed=1).data.train_mask, masks[0])


def test_standardise_uses_training_nodes_only() -> None:
    values = torch.tensor([1.0, 3.0, 100.0])
    out = standardise(values, torch.tensor([True, True, False]))
    std = 2**0.5
    assert torch.allclose(out, torch.tensor([-1 / std, 1 / std, 98 / std]))


def test_loss_sees_training_nodes_only_and_weights_the_tasks() -> None:
    y = torch.tensor([0.0, 2.0, 5.0])
    tasks = {"a": NodeTask("regression", y, 1.0, ""), "b": NodeTask("binary", torch.tensor([1.0, 0, 1]), 0.5, "")}
    mask = torch.tensor([True, True, False])
    out = {"a": torch.tensor([[1.0], [0.0], [7.0]]), "b": torch.zeros(3, 1)}
    labels = {name: task.y for name, task in tasks.items()}
    # mean((1, 4)) + 0.5 * log 2
    assert total_loss(out, tasks, labels, mask).item() == pytest.approx(2.5 + 0.5 * float(np.log(2)))


def test_metrics_known_values() -> None:
    y = torch.tensor([0, 1, 2])
    assert KINDS["multi-class"].metric(torch.eye(3)[[0, 1, 1]], y) == pytest.approx(2 / 3)
    assert KINDS["binary"].metric(torch.tensor([[0.1], [0.9], [0.2]]), torch.tensor([0.0, 1.0, 1.0])) == 1.0
    assert KINDS["regression"].metric(torch.ones(3, 1), torch.tensor([0.0, 1.0, 2.0])) == pytest.approx(0.0)


def test_same_seed_same_result_and_other_seed_another(graph: demo_data.MultiTaskGraph) -> None:
    names = list(graph.tasks)
    first, again, other = (train(graph, names, seed, 6, CPU) for seed in (0, 0, 1))
    assert first.epochs == [5, 6]
    assert (first.val, first.test, first.best_epoch) == (again.val, again.test, again.best_epoch)
    assert first.val != other.val


def test_own_features_are_informative_but_not_enough(graph: demo_data.MultiTaskGraph) -> None:
    scores = own_features(graph)
    assert 0.6 < scores["digit"] < 0.9
    assert 0.7 < scores["hole"] < 0.9
    assert 0.1 < scores["ink"] < 0.5


def test_mean_std_and_verdict() -> None:
    assert mean_std([0.5]) == "0.500"
    assert mean_std([0.1, 0.3], "+") == "+0.200 +- 0.141"
    tasks = {
        "up": {"difference": [0.10, 0.11, 0.12]},
        "down": {"difference": [-0.10, -0.11, -0.12]},
        "even": {"difference": [-0.1, 0.1, 0.02]},
        # Two standard errors above zero, yet within the t-interval of three values.
        "unsure": {"difference": [0.01, 0.04, 0.07]},
    }
    text = verdict(tasks)
    assert "better: up" in text
    assert "worse: down" in text
    assert "no clear difference: even, unsure" in text
    assert "cannot tell" in verdict({"up": {"difference": [0.1, 0.2]}})


def test_main_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = demo.main(["--out", str(tmp_path), "--epochs", "30", "--runs", "1", "--no-progress"])
    printed = capsys.readouterr().out
    for word in ("task", "own features", "single-task", "multi-task", "difference", "AUROC", "accuracy", "R2"):
        assert word in printed
    for name in ("digit", "hole", "ink"):
        task = summary["tasks"][name]
        assert f"{task['multi-task'][0]:.3f}" in printed
        assert task["difference"][0] == pytest.approx(task["multi-task"][0] - task["single-task"][0])
        for column in ("single-task", "multi-task"):
            assert task["chance"] + 0.1 < task[column][0] < 1
    assert summary["tasks"]["digit"]["multi-task"][0] > 0.6
    assert summary["models"]["multi-task"]["parameters"] < sum(
        m["parameters"] for name, m in summary["models"].items() if name != "multi-task"
    )
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_main_cora(tmp_path: Path) -> None:
    root = planetoid_root()
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    options = ["--dataset", "cora", "--root", str(root), "--out", str(tmp_path), "--epochs", "40", "--runs", "1"]
    summary = demo.main([*options, "--no-progress"])
    assert summary["tasks"]["subject"]["multi-task"][0] > 0.7
    assert summary["tasks"]["degree"]["multi-task"][0] > 0.1
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before, "the root is only read"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "cora"], "needs --root"),
        (["--root", "somewhere"], "--root is for --dataset cora"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--runs", "-1"], "--runs must be at least 1, got -1"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_root_lists_the_files_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Cora/raw").mkdir(parents=True)
    (tmp_path / "Cora/raw/ind.cora.x").touch()
    with pytest.raises(SystemExit):
        demo.main(["--dataset", "cora", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    for name in demo_data.planetoid_files("Cora"):
        assert str(tmp_path / name) in message
    assert message.count("(missing)") == 7
    assert not (tmp_path / "out").exists()
