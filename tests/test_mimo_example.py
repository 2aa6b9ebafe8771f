"""The example of two graphs around one GNN: one pass for both, the choice of the epoch. Needs no data, bar one test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from demo_common import planetoid_root, write_planetoid
from torch import Tensor
from torch_geometric.data import Data

pytest.importorskip("sklearn", reason="the example needs the extra [demo]")

import mimo
from common.data import read_planetoid

FEATURES, CLASSES = {"Cora": 90, "CiteSeer": 140}, {"Cora": 5, "CiteSeer": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planetoid")
    for name, features in FEATURES.items():
        write_planetoid(folder, name, features, CLASSES[name])
    return folder


@pytest.fixture
def graphs(root: Path) -> dict[str, Data]:
    return {name: read_planetoid(root, name) for name in FEATURES}


def test_shapes_of_the_two_tasks(graphs: dict[str, Data]) -> None:
    for name, data in graphs.items():
        assert data.x.shape == (660, FEATURES[name])
        assert [int(data[mask].sum()) for mask in ("train_mask", "val_mask", "test_mask")] == [40, 500, 100]
        assert int(data.y.max()) + 1 == CLASSES[name]


def test_joint_pass_is_each_graph_by_itself(any_backend: str, graphs: dict[str, Data]) -> None:
    """Outputs and losses of both graphs together are those of plain layers on each graph alone."""
    graphs = {name: data.clone() for name, data in graphs.items()}
    for data in graphs.values():
        data.x = data.x.double()
    model = mimo.build(graphs).double().eval()
    out = model(graphs)
    assert {name: tuple(o.shape) for name, o in out.items()} == {"Cora": (660, 5), "CiteSeer": (660, 3)}
    encoders, heads = model.encoders.to_modules(), model.heads.to_modules()
    for name, data in graphs.items():
        alone = heads[name](model.trunk(encoders[name](data.x), data.edge_index))
        torch.testing.assert_close(out[name], alone, rtol=1e-10, atol=1e-12)
    losses = model.loss(graphs, mask="train_mask")
    for name, data in graphs.items():
        expected = torch.nn.functional.cross_entropy(out[name][data.train_mask], data.y[data.train_mask])
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_step_is_one_pass(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, bool]] = []
    original = mimo.Trunk.forward

    def forward(self: mimo.Trunk, x: Tensor, edge_index: Tensor) -> Tensor:
        rows.append((len(x), self.training))
        return original(self, x, edge_index)

    monkeypatch.setattr(mimo.Trunk, "forward", forward)
    mimo.main(["--root", str(root), "--epochs", "2"])
    assert rows == [(1320, True), (1320, False)] * 2


def test_the_epoch_is_chosen_by_validation(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = mimo.main(["--root", str(root), "--epochs", "12"])
    printed = capsys.readouterr().out
    found = re.findall(r"^epoch +(\d+): Cora loss .* validation (.*); CiteSeer .* validation (.*)$", printed, re.M)
    assert len(found) == 12
    sums = {int(epoch): round(1000 * float(a)) + round(1000 * float(b)) for epoch, a, b in found}
    best = max(sums, key=lambda epoch: sums[epoch])  # the first of equal ones
    assert f"at epoch {best}, " in printed
    # Trained until then, the model of the last epoch is the one chosen.
    capsys.readouterr()
    assert mimo.main(["--root", str(root), "--epochs", str(best)]) == test
    for name, value in test.items():
        assert re.search(rf"^  {name} +{value:.3f}$", printed, re.M)


def test_main_learns_both_and_the_seed_decides(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    printed = []
    for seed in ("0", "0", "1"):
        test = mimo.main(["--root", str(root), "--epochs", "20", "--seed", seed])
        assert test["Cora"] > 0.6 and test["CiteSeer"] > 0.6
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before, "the root is only read"


def test_bad_options(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_planetoid(tmp_path, "Cora", 90, 5)
    for options, message in (
        (["--root", str(tmp_path)], "CiteSeer/raw/ind.citeseer.graph  (missing)"),
        (["--root", str(root), "--epochs", "0"], "--epochs must be at least 1, got 0"),
        ([], "required: --root"),
    ):
        with pytest.raises(SystemExit) as stop:
            mimo.main(options)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_real_data() -> None:
    root = planetoid_root()
    if not (root / "CiteSeer/raw/ind.citeseer.x").is_file():
        pytest.skip(f"no CiteSeer below {root}")
    test = mimo.main(["--root", str(root), "--epochs", "30"])
    assert test["Cora"] > 0.75 and test["CiteSeer"] > 0.62
