"""The example of a GCN with several tasks: one layer in place of a GCNConv per task, numbers and files as promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from demo_common import planetoid_root
from torch_geometric.nn import GCNConv

pytest.importorskip("sklearn", reason="the example needs the extra [demo]")

import cora_tasks
from common.data import digits
from common.training import total_loss


def test_the_last_layer_is_a_gcn_conv_per_task() -> None:
    """With the same weights, every single-task model gives the task's output of the multi-task one."""
    graph = cora_tasks.as_in_pyg(digits(seed=0))
    model = cora_tasks.multi_task(graph, graph.tasks).eval()
    out = model(graph.data.x, graph.data.edge_index)
    assert {name: o.shape[1] for name, o in out.items()} == {"digit": 10, "hole": 1, "ink": 1}
    for name, task in graph.tasks.items():
        single = cora_tasks.single_task(graph, {name: task}).eval()
        assert type(single.model.conv2) is GCNConv
        single.model.conv1.load_state_dict(model.conv1.state_dict())
        single.model.conv2.load_state_dict(model.conv2.to_modules()[name].state_dict())
        torch.testing.assert_close(single(graph.data.x, digits(seed=0).data.edge_index)[name], out[name])
    total_loss(out, graph.tasks, {n: t.y for n, t in graph.tasks.items()}, graph.data.train_mask).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_main_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = cora_tasks.main(["--out", str(tmp_path), "--epochs", "30", "--runs", "1", "--no-progress"])
    printed = capsys.readouterr().out
    assert "digits: 1,797 nodes" in printed and "single-task" in printed and "multi-task" in printed
    for name in ("digit", "hole", "ink"):
        task = summary["tasks"][name]
        assert f"{task['multi-task'][0]:.3f}" in printed and f"{task['single-task'][0]:.3f}" in printed
    assert summary["tasks"]["digit"]["multi-task"][0] > 0.5
    # The first layer once, not three times.
    assert summary["models"]["multi-task"]["parameters"] == 32 * 16 + 16 + 12 * 16 + 12
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_main_cora(tmp_path: Path) -> None:
    options = ["--root", str(planetoid_root()), "--out", str(tmp_path), "--epochs", "20", "--runs", "1"]
    summary = cora_tasks.main([*options, "--no-progress"])
    assert summary["settings"]["dataset"] == "cora"
    assert summary["tasks"]["subject"]["multi-task"][0] > 0.6


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--root", str(tmp_path)], "(missing)"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            cora_tasks.main(options)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
