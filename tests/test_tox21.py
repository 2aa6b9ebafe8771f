"""The example on Tox21: its batches are PyG's, its files and comparison as promised. Needs no data, bar one test."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from molecules_common import COUNT, molecules_root, options, without_drawing, write_molecules

import tox21  # isort: skip
from common import molecules as data
from common.comparison import comparison_table, comparison_verdict, interval
from common.gine import CategorySum
from common.molecule_training import Run, Settings, train
from torch_geometric.data import Batch, Data

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
SMALL = Settings(epochs=2, batch_size=16, hidden=8, layers=2, lr=1e-3, device="cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small tox21.npz of 12 tasks."""
    folder = tmp_path_factory.mktemp("molecules")
    write_molecules(folder, "tox21", data.TASKS["tox21"])
    return folder


@pytest.fixture
def molecules(root: Path) -> data.Molecules:
    return data.load_molecules(root, "tox21", "random")


def as_list(molecules: data.Molecules) -> list[Data]:
    """The molecules as PyG has them: one ``Data`` each."""
    atoms, bonds = molecules.node_ptr.diff().tolist(), molecules.edge_ptr.diff().tolist()
    x, edge_attr = molecules.x.split(atoms), molecules.edge_attr.split(bonds)
    edges = molecules.edge_index.split(bonds, dim=1)
    return [Data(x[i], edges[i], edge_attr[i], y=molecules.y[i : i + 1]) for i in range(len(molecules))]


def test_batch_is_that_of_pyg(molecules: data.Molecules) -> None:
    single = as_list(molecules)
    index = torch.tensor([3, 119, 0, 0, 57])
    ours, theirs = molecules.batch(index), Batch.from_data_list([single[i] for i in index.tolist()])
    for key in ("x", "edge_index", "edge_attr", "batch", "ptr"):
        assert torch.equal(ours[key], theirs[key]), key
    assert torch.equal(ours.y.nan_to_num(-1), theirs.y.nan_to_num(-1)) and ours.num_graphs == 5


def test_batches_cover_all_molecules_in_an_order_fixed_by_the_seed(molecules: data.Molecules) -> None:
    index = molecules.indices("train")
    assert [b.num_graphs for b in molecules.batches(index, 25)] == [25, 25, 10]

    def order(seed: int) -> torch.Tensor:
        marked = replace(molecules, y=torch.arange(COUNT)[:, None])
        shuffle = torch.Generator().manual_seed(seed)
        return torch.cat([b.y[:, 0] for b in marked.batches(index, 25, shuffle)])

    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    assert torch.equal(order(0).sort().values, index)
    # A lone molecule at the end is left out of training, and of nothing else.
    generator = torch.Generator().manual_seed(0)
    assert [b.num_graphs for b in molecules.batches(index[:33], 16, generator)] == [16, 16]
    assert [b.num_graphs for b in molecules.batches(index[:33], 16)] == [16, 16, 1]


def test_moleculenet_is_packed_as_the_npz_is(molecules: data.Molecules) -> None:
    packed = data.from_moleculenet(as_list(molecules), "tox21", "random")
    for field in ("x", "edge_index", "edge_attr", "node_ptr", "edge_ptr"):
        assert torch.equal(getattr(packed, field), getattr(molecules, field)), field
    assert packed.task_names == molecules.task_names
    assert torch.bincount(packed.part).tolist() == [96, 12, 12] and torch.equal(packed.part, data.random_split(COUNT))


def test_scaffold_split_keeps_groups_together_largest_first(monkeypatch: Patch) -> None:
    """With the first letter for a scaffold, so that it runs without rdkit."""
    name = ""
    for part in ("rdkit", ".Chem", ".Scaffolds", ".MurckoScaffold"):
        name += part
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].MurckoScaffoldSmiles = lambda smiles, includeChirality: smiles[0]  # type: ignore[attr-defined]
    smiles = ["D", *["A", "B"] * 6, *["C", "A"] * 3, "A"]
    # Of 20, training has room for 16: A (10) and B (6). Validation has room for 2: not for C (3), but for D.
    assert dict(zip(smiles, data.scaffold_split(smiles).tolist(), strict=True)) == {"A": 0, "B": 0, "C": 2, "D": 1}
    assert torch.bincount(data.scaffold_split(smiles)).tolist() == [16, 1, 3]


def test_category_sum() -> None:
    encoder = CategorySum((3, 4), 5)
    table = encoder.bag.weight
    out = encoder(torch.tensor([[2, 0], [0, 3]]))
    assert torch.allclose(out, torch.stack([table[2] + table[3], table[0] + table[6]]))


@pytest.mark.parametrize("method", tox21.METHODS)
def test_main(method: str, root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    if method != "none":
        without_drawing(monkeypatch)
    summary = tox21.main(options(root, tmp_path, "--balancing", method))
    printed = capsys.readouterr().out
    assert list(summary["methods"]) == [method]
    row = summary["methods"][method]
    run = row["runs"][0]
    for epoch in (1, 2):
        assert f"epoch   {epoch}: total loss {run['total_loss'][epoch - 1]:.4f}" in printed
    assert run["best_epoch"] == int(np.argmax(run["validation_AUROC"])) + 1
    assert set(row["tasks"]) == set(data.TASKS["tox21"])
    assert row["AUROC"][0] == pytest.approx(np.mean([values[0] for values in row["tasks"].values()]))
    assert 0 <= row["conflicts"][0] <= 1
    assert f"{row['tasks']['NR-AhR'][0]:.3f}" in printed
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    for figure in ("conflicts", "conflicts_over_time", "losses"):
        assert (tmp_path / f"{figure}_{method}.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_result_and_other_seed_another(molecules: data.Molecules) -> None:
    first, again, other = (train(molecules, "pcgrad", seed, SMALL) for seed in (0, 0, 1))
    for run, same in ((again, True), (other, False)):
        assert ((run.total, run.val, run.auroc) == (first.total, first.val, first.auroc)) is same


def test_split_is_used(root: Path) -> None:
    counts = {}
    for split in data.SPLITS:
        part = data.load_molecules(root, "tox21", split)
        test = train(part, "none", 0, SMALL).test
        assert test is not None
        counts[split] = list(test.labels.values())
        assert counts[split] == (~part.y[part.indices("test")].isnan()).sum(0).tolist()
    assert counts["random"] != counts["scaffold"]


def test_comparison(root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    without_drawing(monkeypatch)
    more = ("--balancing", "uw", "--runs", "3", "--single-task", "--epochs", "1", "--batch-size", "60")
    summary = tox21.main(options(root, tmp_path, *more))
    printed = capsys.readouterr().out
    methods = summary["methods"]
    assert list(methods) == ["none", "uw", "single-task"]
    for name, found in summary["differences"].items():
        difference = np.array(methods[name]["AUROC"]) - methods["none"]["AUROC"]
        assert found["mean"] == pytest.approx(difference.mean())
        assert found["half_width_95"] == pytest.approx(4.302653 * difference.std(ddof=1) / 3**0.5)
        assert f"{found['mean']:+.4f}" in printed
    alone = methods["single-task"]
    assert alone["AUROC"][0] == pytest.approx(np.mean([values[0] for values in alone["tasks"].values()]))
    assert summary["verdict"] in printed
    assert summary["settings"]["seeds"] == [0, 1, 2]


def test_methods_start_from_the_same_weights_and_see_the_same_batches(molecules: data.Molecules) -> None:
    """So that the differences are paired: with a learning rate of almost 0, the losses are the same."""
    runs = [train(molecules, method, 3, replace(SMALL, lr=1e-12)) for method in tox21.METHODS]
    for run in runs[1:]:
        assert torch.allclose(run.losses[0], runs[0].losses[0], atol=1e-6)


def test_single_task_trains_on_labelled_molecules_only(molecules: data.Molecules) -> None:
    task = molecules.task_names[0]
    one = molecules.only(task)
    assert torch.equal(one.y[:, 0].nan_to_num(-1), molecules.y[:, 0].nan_to_num(-1))
    # Without the molecules that have no label of it, nothing changes.
    kept = one.part.clone()
    kept[one.y[:, 0].isnan() & (kept == 0)] = 3
    runs = [train(m, "none", 0, SMALL) for m in (one, replace(one, part=kept))]
    assert runs[0].total == runs[1].total


def test_conflicts() -> None:
    run = Run(seed=0, names=("a", "b", "c"), parameters=0)
    run.cosines = [torch.tensor([[1.0, -0.1, 0.3], [-0.1, 1, 0], [0.3, 0, 1]]), torch.eye(3)]
    assert run.conflicts == pytest.approx(1 / 6)
    # A pair of which one task has no labels in the batch does not count.
    run.cosines = [torch.tensor([[1.0, -0.1, 0.0], [-0.1, 1, 0], [0, 0, 0]])]
    assert run.conflicts == 1.0


def test_interval_and_verdict() -> None:
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5))
    values = {"none": [0.5, 0.6, 0.7], "up": [0.6, 0.71, 0.8], "down": [0.4, 0.49, 0.6], "even": [0.6, 0.5, 0.7]}
    rows = {name: {"AUROC": v, "conflicts": [0.25], "seconds": [1.5]} for name, v in values.items()}
    text = comparison_verdict(rows, "none")
    for words in ("better: up (+0.1033)", "worse: down (-0.1033)", "no clear difference: even (+0.0000)"):
        assert words in text
    table = comparison_table(rows, "none").splitlines()
    assert "0.600 +- 0.100" in table[2] and "25.0%" in table[2] and "1.50" in table[2] and "+0.1033" in table[3]
    one = {name: {**row, "AUROC": [0.5]} for name, row in rows.items()}
    assert "cannot tell" in comparison_verdict(one, "none")
    assert "needs 2 seeds" in comparison_table(one, "none")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--runs", "-1"], "--runs must be at least 1, got -1"),
        (["--split", "alphabet"], "invalid choice: 'alphabet'"),
        (["--balancing", "upgrade"], "got 'upgrade'"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_bad_options(more: list[str], message: str, root: Path, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        tox21.main(options(root, tmp_path / "out", *more))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_data_names_both_ways(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    class Offline:
        names = data.MoleculeNet.names

        def __init__(self, root: str, name: str) -> None:
            raise OSError("no network")

    monkeypatch.setattr(data, "MoleculeNet", Offline)
    with pytest.raises(SystemExit):
        tox21.main(options(tmp_path, tmp_path / "out"))
    message = capsys.readouterr().err
    for part in (str(tmp_path / "tox21/tox21.npz"), "MoleculeNet", "rdkit", "no network"):
        assert part in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no such set"):
        data.load_molecules(tmp_path, "qm8", "random")


def test_broken_npz_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tox21").mkdir()
    np.savez(tmp_path / "tox21/tox21.npz", x=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="none named edge_index, edge_attr"):
        data.load_molecules(tmp_path, "tox21", "random")


@pytest.mark.parametrize("split", data.SPLITS)
def test_real_data(split: str) -> None:
    tox = data.load_molecules(molecules_root("tox21"), "tox21", split)
    assert (len(tox), tox.x.shape, tox.edge_index.shape) == (7831, (145459, 9), (2, 302190))
    assert tox.task_names == data.TASKS["tox21"]
    assert [len(tox.indices(part)) for part in data.PARTS] == [6264, 783, 784]
    assert float(tox.y.isnan().float().mean()) == pytest.approx(0.1705, abs=1e-4)
    assert bool((tox.x.max(0).values < torch.tensor(tox.atom_dims)).all())
    assert bool((tox.edge_attr.max(0).values < torch.tensor(tox.bond_dims)).all())
    batch = tox.batch(torch.arange(len(tox)))
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
