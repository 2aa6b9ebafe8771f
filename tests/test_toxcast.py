"""The example on ToxCast: many tasks in a table, checkpoints, autocast and compile. Needs no data, bar one test."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from molecules_common import (
    REPOSITORY,
    molecules_root,
    options,
    stop_after,
    without_drawing,
    without_times,
    write_molecules,
)

import toxcast  # isort: skip
from common import molecule_training
from common.gine import GINE, MoleculeModel
from common.molecule_checkpoint import CheckpointError
from common.molecule_kinds import KINDS
from common.molecule_tables import many_table
from common.molecule_training import Run, Settings, train
from common.molecules import Molecules, load_molecules

from torch_mtl_pyg.metrics import MetricResults

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
TASKS = tuple(f"assay_{i}" for i in range(40))
SMALL = Settings(epochs=4, batch_size=16, hidden=8, layers=2, lr=1e-2, device="cpu", dropout=0.5, weight_decay=0.1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small toxcast.npz of 40 tasks, 70 % of the labels missing; one task has no positive in test."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (120, 40)).astype(np.float32)
    y[rng.random(y.shape) < 0.7] = np.nan
    y[[60, 61, 90, 91]] = [[0], [1], [0], [1]]  # both classes of each task in validation and in test
    y[90:, 0] = 0
    folder = tmp_path_factory.mktemp("molecules")
    write_molecules(folder, "toxcast", TASKS, y)
    return folder


@pytest.fixture
def molecules(root: Path) -> Molecules:
    return load_molecules(root, "toxcast", "random")


def test_main(root: Path, tmp_path: Path, capsys: Capture) -> None:
    summary = toxcast.main(options(root, tmp_path))
    printed = capsys.readouterr().out
    missing = np.isnan(np.load(root / "toxcast/toxcast.npz")["y"]).mean()
    assert "39 of 40" in printed and f"{missing:.1%} of the labels missing" in printed
    row = summary["methods"]["none"]
    known = {task: values[0] for task, values in row["tasks"].items() if values}
    assert len(known) == 39 and row["tasks"]["assay_0"] == []
    assert row["AUROC"][0] == pytest.approx(np.mean(list(known.values())))
    for q, name in ((0, "0%"), (0.25, "25%"), (0.5, "50%"), (1, "100%")):
        line = next(line for line in printed.splitlines() if line.startswith(name + " "))
        assert line.split()[-1] == f"{np.quantile(list(known.values()), q):.3f}"
    for end in (max, min):
        assert end(known, key=lambda task: known[task]) in printed
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    for figure in ("conflicts", "conflicts_over_time", "losses"):
        assert (tmp_path / f"{figure}_none.png").read_bytes().startswith(b"\x89PNG")


def test_csv_holds_every_task_method_and_seed(root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    without_drawing(monkeypatch)
    summary = toxcast.main(options(root, tmp_path, "--balancing", "none", "uw", "--runs", "2", "--epochs", "1"))
    with (tmp_path / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 40
    assert [r["AUROC"] for r in rows if r["task"] == "assay_0"] == [""] * 4
    y = load_molecules(root, "toxcast", "random").y[90:]
    for row in rows:
        labels = y[:, TASKS.index(row["task"])]
        labels = labels[~labels.isnan()]
        assert int(row["test_labels"]) == len(labels)
        assert float(row["positives"]) == pytest.approx(float(labels.mean()), abs=1e-6)
        if row["task"] != "assay_0":
            found = summary["methods"][row["method"]]["tasks"][row["task"]]
            assert float(row["AUROC"]) == found[int(row["seed"])]


@pytest.mark.parametrize(("method", "epoch"), [("none", 1), ("none", 3), ("none", 4), ("uw", 2), ("pcgrad", 2)])
def test_a_resumed_training_is_the_uninterrupted_one(
    method: str, epoch: int, molecules: Molecules, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Random numbers (dropout, order, PCGrad), learned weights (UW) and the schedule go on where they were."""
    whole = train(molecules, method, 0, SMALL)
    file = tmp_path / "none.pt"
    stop_after(epoch, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(molecules, method, 0, SMALL, checkpoint=file)
    torch.rand(7)  # other programs draw too
    seen: list[int] = []
    again = train(molecules, method, 0, SMALL, lambda run: seen.append(len(run.total)), file, resume=True)
    assert seen == list(range(epoch + 1, 5))
    for name in ("names", "parameters", "total", "val", "best_epoch", "test", "steps", "score", "conflicts"):
        assert getattr(again, name) == getattr(whole, name), name
    assert again.test is not None and whole.test is not None and again.test.to_dict() == whole.test.to_dict()
    for name in ("losses", "cosines"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)
    assert len(again.seconds) == 4


def test_main_resumes_after_a_kill(root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """In another process, which dies without cleaning up, in the second of two seeds."""
    without_drawing(monkeypatch)
    args = options(root, tmp_path / "out", "--runs", "2")
    code = (
        "import os, sys, toxcast\nfrom common.molecule_training import Checkpoint\nsave = Checkpoint.save\n"
        "def dying(self):\n    save(self)\n    self.run.seed == 1 and os._exit(9)\n"
        "Checkpoint.save = dying\ntoxcast.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=REPOSITORY / "examples", capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    resumed = toxcast.main([*args, "--resume"])
    printed = capsys.readouterr().out
    assert printed.count("going on from checkpoint") == 2
    whole = toxcast.main(options(root, tmp_path / "whole", "--runs", "2"))
    assert without_times(resumed) == without_times(whole)


def test_resume_without_a_checkpoint_says_so_and_starts(
    root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    without_drawing(monkeypatch)
    toxcast.main(options(root, tmp_path, "--resume"))
    assert f"no checkpoint {tmp_path / 'checkpoints/none_seed0.pt'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "3"], "expected a checkpoint of the same training, with epochs 3, got 2"),
        (["--split", "scaffold"], "data 'toxcast, 120 molecules, 40 tasks, "),
        (["--amp", "--hidden", "9"], "with hidden 9, got 8; amp True, got False"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    more: list[str], message: str, root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    without_drawing(monkeypatch)
    toxcast.main(options(root, tmp_path))
    with pytest.raises(SystemExit) as stop:
        toxcast.main(options(root, tmp_path, "--resume", *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_broken_checkpoint_is_refused_and_a_failed_save_leaves_the_last(
    molecules: Molecules, tmp_path: Path, monkeypatch: Patch
) -> None:
    file = tmp_path / "run.pt"
    train(molecules, "none", 0, replace(SMALL, epochs=1), checkpoint=file)
    before = file.read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space left"):
            train(molecules, "none", 0, replace(SMALL, epochs=1), checkpoint=file)
    assert file.read_bytes() == before
    file.write_bytes(before[:100])
    with pytest.raises(CheckpointError, match=r"run\.pt: expected a checkpoint, got"):
        train(molecules, "none", 0, replace(SMALL, epochs=1), checkpoint=file, resume=True)


def test_amp_runs_the_heads_in_bfloat16(molecules: Molecules, monkeypatch: Patch) -> None:
    settings = replace(SMALL, dropout=0.0, hidden=32)
    seen: set[torch.dtype] = set()

    def embed(self: MoleculeModel, batch: object, original: object = MoleculeModel.embed) -> torch.Tensor:
        seen.add(torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype)
        return original(self, batch)  # type: ignore[operator, no-any-return]

    plain = train(molecules, "none", 0, settings)
    monkeypatch.setattr(MoleculeModel, "embed", embed)
    amp = train(molecules, "none", 0, replace(settings, amp=True))
    assert seen == {torch.bfloat16}
    assert amp.total != plain.total
    np.testing.assert_allclose(amp.total, plain.total, rtol=0.02)
    assert all(np.isfinite(amp.val))


def test_compile_is_of_the_whole_trunk_and_gives_the_same(molecules: Molecules, monkeypatch: Patch) -> None:
    """With dynamo's graphs run as they are, which takes seconds where inductor takes a minute."""
    plain = train(molecules, "none", 0, replace(SMALL, epochs=1))
    asked: list[dict[str, object]] = []
    original = torch.nn.Module.compile

    def compiled(self: torch.nn.Module, **how: object) -> None:
        asked.append(how)
        assert isinstance(self, GINE)
        original(self, **how, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    run = train(molecules, "none", 0, replace(SMALL, epochs=1, compile=True))
    assert asked == [{"dynamic": True, "fullgraph": True}]
    np.testing.assert_allclose(run.total, plain.total, rtol=1e-5)


def test_weight_decay_spares_learned_weights(molecules: Molecules, monkeypatch: Patch) -> None:
    groups: list[list[dict[str, float]]] = []
    step = molecule_training.balanced_step

    def watched(balancer: object, losses: object, optimizer: torch.optim.Optimizer) -> object:
        groups.append(optimizer.param_groups)
        return step(balancer, losses, optimizer)  # type: ignore[arg-type]

    monkeypatch.setattr(molecule_training, "balanced_step", watched)
    for method, decays in (("none", [0.1]), ("uw", [0.1, 0.0])):
        train(molecules, method, 0, replace(SMALL, epochs=1))
        assert [group["weight_decay"] for group in groups[-1]] == decays


def test_many_table_takes_the_mean_over_seeds_and_knows_what_is_better() -> None:
    names = tuple(f"t{i:02d}" for i in range(31))
    for kind, best in (("binary", "t30"), ("regression", "t00")):
        run = Run(seed=0, names=names, parameters=0, kind=KINDS[kind])
        run.test = MetricResults()
        run.test.labels = dict.fromkeys(names, 50)
        scores = {"none": {name: [0.01 * i, 0.03 * i] for i, name in enumerate(names)}}
        lines = many_table(scores, run).splitlines()
        assert [line.split() for line in lines if line.startswith("50%")] == [["50%", "0.300"]]
        assert next(line for line in lines if line.startswith("best")).split()[1] == best


def test_bad_options(root: Path, tmp_path: Path, capsys: Capture) -> None:
    for more, message in (
        (["--single-task"], "unrecognized arguments: --single-task"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--device", "toaster"], "toaster"),
    ):
        with pytest.raises(SystemExit) as stop:
            toxcast.main(options(root, tmp_path / "out", *more))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_real_data() -> None:
    tox = load_molecules(molecules_root("toxcast"), "toxcast", "random")
    assert (len(tox), tox.x.shape, tox.edge_index.shape) == (8576, (161088, 9), (2, 330356))
    assert len(tox.task_names) == 617
    assert float(tox.y.isnan().float().mean()) == pytest.approx(0.7102, abs=1e-4)
    run = train(tox, "none", 0, replace(toxcast.TOXCAST.settings, epochs=1))
    assert run.test is not None and sum("AUROC" in values for values in run.test.values()) == 602
    assert run.score > 0.55
