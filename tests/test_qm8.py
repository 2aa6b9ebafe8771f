"""The example on QM8: standardised labels, errors in both units, single-task models. Needs no data, bar one test."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from molecules_common import (
    molecules_root,
    options,
    stop_after,
    without_drawing,
    without_times,
    write_molecules,
)

import qm8  # isort: skip
from common.comparison import comparison_table, comparison_verdict
from common.gine import GINE, MoleculeModel
from common.molecule_kinds import KINDS
from common.molecule_training import train
from common.molecules import Molecules, load_molecules

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
TASKS = ("E1", "E2", "f1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small qm8.npz of 3 tasks of different sizes; a few labels of the last are missing."""
    rng = np.random.default_rng(2)
    y = rng.normal([0.2, 5.0, 100.0], [0.04, 1.0, 30.0], (120, 3))
    y[::7, 2] = np.nan
    folder = tmp_path_factory.mktemp("molecules")
    write_molecules(folder, "qm8", TASKS, y)
    return folder


@pytest.fixture
def molecules(root: Path) -> Molecules:
    return load_molecules(root, "qm8", "random")


def test_labels_are_standardised_by_those_of_training(molecules: Molecules) -> None:
    y, out = molecules.y.double().numpy(), molecules.standardised()
    assert out.scale is not None and out.scale.dtype == torch.float64
    std = np.nanstd(y[:60], axis=0, ddof=1)
    np.testing.assert_allclose(out.scale.numpy(), std, rtol=1e-12)
    np.testing.assert_allclose(out.y.numpy(), (y - np.nanmean(y[:60], axis=0)) / std, atol=1e-6)
    # Labels outside training change nothing.
    other = replace(molecules, y=torch.where(molecules.part[:, None] == 0, molecules.y, 7.0)).standardised()
    assert torch.equal(other.y[:60].nan_to_num(9), out.y[:60].nan_to_num(9))
    one = out.only("f1")
    assert one.scale is not None and one.scale.tolist() == [out.scale[2].item()]


@pytest.mark.parametrize("labels", [3.0, float("nan")])
def test_labels_that_cannot_be_standardised(labels: float, molecules: Molecules) -> None:
    y = molecules.y.clone()
    y[:60, 1] = labels
    with pytest.raises(ValueError, match=r"qm8: expected two different training labels of 'E2', got fewer\."):
        replace(molecules, y=y).standardised()


def test_main(root: Path, tmp_path: Path, molecules: Molecules, capsys: Capture) -> None:
    summary = qm8.main(options(root, tmp_path))
    printed = capsys.readouterr().out
    row = summary["methods"]["none"]
    run, scale = row["runs"][0], molecules.standardised().scale
    assert run["best_epoch"] == int(np.argmin(run["validation_MAE/std"])) + 1
    assert row["MAE/std"][0] == pytest.approx(np.mean([row["tasks"][task][0] for task in TASKS]))
    assert scale is not None
    for task, unit in zip(TASKS, scale.tolist(), strict=True):
        error = row["tasks"][task][0]
        line = next(line.split() for line in printed.splitlines() if line.startswith(f"{task} "))
        assert line[2:5] == [f"{unit:.4f}", f"{error * unit:.4f}", f"{error:.3f}"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    for figure in ("conflicts", "conflicts_over_time", "losses"):
        assert (tmp_path / f"{figure}_none.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "tasks.csv").open() as file:
        assert {r["task"]: float(r["MAE"]) for r in csv.DictReader(file)} == {t: row["tasks"][t][0] for t in TASKS}


def test_errors_are_those_of_the_saved_model(
    root: Path, tmp_path: Path, molecules: Molecules, monkeypatch: Patch
) -> None:
    """After one epoch the best model lies in the checkpoint; its errors in NumPy, in the units of the file."""
    without_drawing(monkeypatch)
    summary = qm8.main(options(root, tmp_path, "--epochs", "1"))
    settings = summary["settings"]
    state = torch.load(tmp_path / "checkpoints/none_seed0.pt", weights_only=True)["parts"][0]
    trunk = GINE(molecules.atom_dims, molecules.bond_dims, settings["hidden"], settings["layers"])
    model = MoleculeModel(trunk, settings["hidden"], KINDS["regression"].tasks(TASKS))
    model.load_state_dict(state)
    out = model.eval()(molecules.batch(torch.arange(90, 120)))
    y = molecules.y.double().numpy()
    for i, task in enumerate(TASKS):
        mean, std = np.nanmean(y[:60, i]), np.nanstd(y[:60, i], ddof=1)
        predicted = out[task].detach().double().numpy()[:, 0] * std + mean
        error = np.nanmean(np.abs(predicted - y[90:, i]))
        assert summary["methods"]["none"]["tasks"][task][0] == pytest.approx(error / std, rel=1e-5)


def test_single_task_models_are_compared_and_less_is_better(
    root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    without_drawing(monkeypatch)
    summary = qm8.main(options(root, tmp_path, "--single-task", "--runs", "3", "--epochs", "1"))
    methods, printed = summary["methods"], capsys.readouterr().out
    assert list(methods) == ["none", "single-task"] and summary["verdict"] in printed
    difference = np.array(methods["single-task"]["MAE/std"]) - methods["none"]["MAE/std"]
    assert summary["differences"]["single-task"]["mean"] == pytest.approx(difference.mean())
    with (tmp_path / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["task"]) for r in rows] == [
        (method, seed, task) for method in methods for seed in "012" for task in TASKS
    ]
    values = {"none": [0.5, 0.6, 0.7], "less": [0.4, 0.51, 0.6], "more": [0.6, 0.71, 0.8]}
    table = {name: {"MAE/std": v, "conflicts": [], "seconds": [1.0]} for name, v in values.items()}
    text = comparison_verdict(table, "none", "MAE/std", higher=False)
    assert "Mean test MAE/std" in text and "better: less (-0.0967)" in text and "worse: more (+0.1033)" in text
    assert "mean test MAE/std" in comparison_table(table, "none", "MAE/std")


def test_main_resumes_single_task_models_too(root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    without_drawing(monkeypatch)
    args = options(root, tmp_path / "out", "--single-task")
    whole = qm8.main(options(root, tmp_path / "whole", "--single-task"))
    stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        qm8.main(args)
    qm8.main(args)  # writes all checkpoints
    (tmp_path / "out/checkpoints/only E2_seed0.pt").unlink()
    assert without_times(qm8.main([*args, "--resume"])) == without_times(whole)


def test_no_such_set_to_download(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        qm8.main(options(tmp_path, tmp_path / "out"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "qm8/qm8.npz") in message and "no such set" in message
    assert not (tmp_path / "out").exists()


def test_real_data() -> None:
    found = load_molecules(molecules_root("qm8"), "qm8", "random")
    assert (len(found), found.x.shape, found.edge_index.shape) == (21786, (169339, 9), (2, 352356))
    assert found.task_names[:4] == ("E1-CC2", "E2-CC2", "f1-CC2", "f2-CC2") and len(found.task_names) == 12
    assert not found.y.isnan().any()
    run = train(found.standardised(), "none", 0, replace(qm8.QM8.settings, epochs=1))
    assert run.score < 0.5
