"""MultiTaskModel.loss: labels of the data, masks, levels, one graph per task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_common import TRUNKS, WIDTHS, batch, graph, mimo, several, trained
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN, global_mean_pool

import torch_mtl_pyg as mtl

TASKS: dict[str, Any] = {
    "a": mtl.Task(3, loss="cross_entropy", label_smoothing=0.1),
    "b.x": mtl.Task(1, loss="mse", weight=0.5),
    "c": mtl.Task(2, loss="bce", pos_weight=2.0),
}


def labels(n: int) -> dict[str, Tensor]:
    return {
        "a": torch.randint(0, 3, (n,)),
        "b.x": torch.randn(n, dtype=torch.float64),
        "c": torch.rand(n, 2, dtype=torch.float64).round(),
    }


def expected_loss(name: str, out: Tensor, y: Tensor) -> Tensor:
    if name == "a":
        return F.cross_entropy(out, y, label_smoothing=0.1)
    if name == "b.x":
        return F.mse_loss(out[:, 0], y)
    weight = torch.full((2,), 2.0, dtype=torch.float64)
    return F.binary_cross_entropy_with_logits(out, y, pos_weight=weight)


def one_trunk(tasks: dict[str, Any], **options: Any) -> mtl.MultiTaskModel:
    model = mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, tasks), **options)
    trained(model)
    return model


def check(losses: mtl.TaskLosses, expected: dict[str, Tensor], model: mtl.MultiTaskModel) -> None:
    """Values, the total, and the gradients of all parameters."""
    assert losses.names == tuple(model.heads.tasks)
    for name in losses.names:
        torch.testing.assert_close(losses[name], expected.get(name, torch.zeros((), dtype=torch.float64)))
    total = sum(model.heads.tasks[name].weight * value for name, value in expected.items())
    torch.testing.assert_close(losses.total, total)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(losses.total, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            zero.expand_as(b) if a is None and b is not None else a,
            zero.expand_as(a) if b is None and a is not None else b,
            rtol=1e-9,
            atol=1e-11,
        )


def test_one_graph_for_all_tasks(any_backend: str) -> None:
    model = one_trunk(TASKS)
    data, y = graph(12, 5, 40), labels(12)
    data.y = y
    out = model(data)
    expected = {name: expected_loss(name, out[name], y[name]) for name in TASKS}
    check(model.loss(data), expected, model)
    check(model.loss(Data(x=data.x, edge_index=data.edge_index), y), expected, model)
    losses = model.loss(data, gramian=True)
    h = model.trunk(data.x, data.edge_index)
    torch.testing.assert_close(losses.gramian, model.heads.loss(h, y, gramian=True).gramian)
    check(model.loss(data, task="c"), {"c": expected["c"]}, model)
    check(model.loss(data, y["b.x"], task=1), {"b.x": expected["b.x"]}, model)


def test_masks(any_backend: str) -> None:
    tasks = {**TASKS, "own": mtl.Task(1, loss=lambda out, y: (out[:, 0] - y).abs())}
    model = one_trunk(tasks)
    data, y = graph(12, 5, 40), labels(12)
    data.y = {**y, "own": torch.randn(12, dtype=torch.float64)}
    data.train_mask = torch.rand(12) < 0.5
    mask = data.train_mask
    out = model(data)
    expected = {name: expected_loss(name, out[name][mask], y[name][mask]) for name in TASKS}
    expected["own"] = (out["own"][mask, 0] - data.y["own"][mask]).abs().mean()
    for given in ("train_mask", mask, dict.fromkeys(tasks, "train_mask"), dict.fromkeys(tasks, mask)):
        losses = model.loss(data, mask=given)
        check(losses, expected, model)
        count = int(mask.sum())
        assert losses.count.tolist() == [count, count, 2 * count, count]
    some = model.loss(data, mask={"a": ~mask})
    torch.testing.assert_close(some["a"], expected_loss("a", out["a"][~mask], y["a"][~mask]))
    torch.testing.assert_close(some["c"], expected_loss("c", out["c"], y["c"]))
    torch.testing.assert_close(model.loss(data, mask="train_mask", task="a")["a"], expected["a"])
    assert model.loss(data, mask=torch.zeros(12, dtype=torch.bool)).total == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_masked_labels_of_every_dtype(dtype: torch.dtype) -> None:
    tasks = {"k": mtl.Task(2, loss="cross_entropy", ignore_index=-1000), "b": mtl.Task(1, loss="bce")}
    model = one_trunk(tasks)
    data = graph(12, 5, 40)
    y, mask = torch.randint(0, 2, (12, 2)), torch.arange(12) < 7
    out = model(data)
    expected = {
        "k": F.cross_entropy(out["k"][:7], y[:7, 0]),
        "b": F.binary_cross_entropy_with_logits(out["b"][:7, 0], y[:7, 1].double()),
    }
    check(model.loss(data, y.to(dtype), mask=mask), expected, model)
    check(model.loss(data, {"k": y[:, 0].to(dtype), "b": y[:, 1].to(dtype)}, mask=mask), expected, model)
    matrix = Data(x=data.x, edge_index=data.edge_index, y=y.to(dtype), m=mask)
    check(model.loss(matrix, mask="m"), expected, model)
    check(model.loss(matrix, mask="m", task="b"), {"b": expected["b"]}, model)
    if dtype != torch.bool:
        idx = torch.arange(12) % 2
        own = torch.where(idx == 0, y[:, 0], y[:, 1]).to(dtype)
        first, second = (mask & (idx == i) for i in (0, 1))
        routed = {
            "k": F.cross_entropy(out["k"][first], y[first, 0]),
            "b": F.binary_cross_entropy_with_logits(out["b"][second, 0], y[second, 1].double()),
        }
        check(model.loss(data, own, mask=mask, task=idx), routed, model)


def test_graphs_with_a_matrix_of_labels(any_backend: str) -> None:
    """As MoleculeNet has them: y is [1, T] for a molecule, with NaN."""
    tasks = {f"assay{i}": mtl.Task(1, loss="bce") for i in range(3)}
    model = one_trunk(tasks)
    y = torch.tensor([[0.0, 1.0, torch.nan], [1.0, torch.nan, torch.nan], [1.0, 0.0, torch.nan]])
    data = batch(5, y=y)
    out = model(data)
    expected = {
        "assay0": F.binary_cross_entropy_with_logits(out["assay0"][:, 0], y[:, 0].double()),
        "assay1": F.binary_cross_entropy_with_logits(out["assay1"][::2, 0], y[::2, 1].double()),
    }
    check(model.loss(data), {**expected, "assay2": torch.zeros((), dtype=torch.float64)}, model)
    idx = torch.tensor([0, 0, 1])
    routed = model.loss(data, torch.tensor([0.0, 1.0, 0.0]), task=idx)
    assert routed.count.tolist() == [2, 1, 0]
    single = one_trunk({"only": mtl.Task(1, loss="mse")})
    one = batch(5, y=torch.randn(3, dtype=torch.float64))
    check(single.loss(one), {"only": F.mse_loss(single(one)["only"][:, 0], one.y)}, single)


LEVELS: dict[str, Any] = {
    "g": mtl.Task(2, loss="cross_entropy", level="graph"),
    "n": mtl.Task(1, loss="mse", level="node"),
    "e": mtl.Task(1, loss="bce", level="edge", weight=2.0),
    "n2": mtl.Task(3, loss="cross_entropy", level="node"),
    "none": mtl.Task(1, level="graph"),
}


def test_levels_together(any_backend: str) -> None:
    model = one_trunk(LEVELS)
    data = batch(5)
    data.edge_label_index, data.edge_label = torch.randint(0, 11, (2, 6)), torch.rand(6).round()
    y = {
        "g": torch.randint(0, 2, (3,)),
        "n": torch.randn(11, dtype=torch.float64),
        "n2": torch.randint(0, 3, (11,)),
    }
    data.y = y
    out = model(data)
    expected = {
        "g": F.cross_entropy(out["g"], y["g"]),
        "n": F.mse_loss(out["n"][:, 0], y["n"]),
        "e": F.binary_cross_entropy_with_logits(out["e"][:, 0], data.edge_label.double()),
        "n2": F.cross_entropy(out["n2"], y["n2"]),
    }
    check(model.loss(data), expected, model)
    check(model.loss(data, {**y, "e": data.edge_label}), expected, model)
    assert model.loss(data).count.tolist() == [3, 11, 6, 11, 0]
    for name in expected:
        check(model.loss(data, task=name), {name: expected[name]}, model)
    mask = torch.arange(11) < 6
    losses = model.loss(data, mask={"n": mask, "n2": mask})
    torch.testing.assert_close(losses["n"], F.mse_loss(out["n"][:6, 0], y["n"][:6]))
    torch.testing.assert_close(losses["e"], expected["e"])
    with pytest.raises(
        ValueError, match="gramian: expected False, since tasks have the levels graph and node and edge"
    ):
        model.loss(data, gramian=True)
    with pytest.raises(ValueError, match=r"mask.*: expected shape \[3\]"):
        model.loss(data, mask=mask)


@pytest.mark.parametrize("own", [False, True])
def test_heads_with_hidden_layers(any_backend: str, own: bool) -> None:
    """Levels, and one graph per task; also with a callable among the fused losses of a level."""
    tasks = {
        **LEVELS,
        "n": mtl.Task(1, loss=lambda out, y: (out[:, 0] - y).square(), level="node") if own else LEVELS["n"],
    }
    heads = mtl.MultiTaskHeads(8, tasks, hidden_channels=[6, 5], act="tanh")
    model = mtl.MultiTaskModel(GCN(5, 8, 2), heads)
    trained(model)
    data = batch(5)
    data.edge_label_index, data.edge_label = torch.randint(0, 11, (2, 6)), torch.rand(6).round()
    data.y = {
        "g": torch.randint(0, 2, (3,)),
        "n": torch.randn(11, dtype=torch.float64),
        "n2": torch.randint(0, 3, (11,)),
    }
    modules = heads.to_modules()
    h = model.trunk(data.x, data.edge_index)
    ends = h[data.edge_label_index[0]] * h[data.edge_label_index[1]]
    pooled = global_mean_pool(h, data.batch)
    embedding = {"g": pooled, "n": h, "e": ends, "n2": h, "none": pooled}
    out = model(data)
    for name in tasks:
        torch.testing.assert_close(out[name], modules[name](embedding[name]))
        torch.testing.assert_close(model(data, task=name), out[name])
    expected = {
        "g": F.cross_entropy(out["g"], data.y["g"]),
        "n": F.mse_loss(out["n"][:, 0], data.y["n"]),
        "e": F.binary_cross_entropy_with_logits(out["e"][:, 0], data.edge_label.double()),
        "n2": F.cross_entropy(out["n2"], data.y["n2"]),
    }
    check(model.loss(data), expected, model)
    joint = {"n": graph(7, 5, 9, y=torch.randn(7).double()), "n2": graph(4, 5, 9, y=torch.randint(0, 3, (4,)))}
    outputs = model(joint)
    for name, one in joint.items():
        torch.testing.assert_close(outputs[name], modules[name](model.trunk(one.x, one.edge_index)))
    losses = {
        "n": F.mse_loss(outputs["n"][:, 0], joint["n"].y),
        "n2": F.cross_entropy(outputs["n2"], joint["n2"].y),
    }
    check(model.loss(joint), losses, model)


def test_dropout_in_the_heads() -> None:
    heads = mtl.MultiTaskHeads(8, LEVELS, hidden_channels=16, dropout=0.5)
    model = mtl.MultiTaskModel(GCN(5, 8, 2), heads).double()
    data = graph(9, 5, 20, edge_label_index=torch.randint(0, 9, (2, 5)))
    model.train()
    assert not torch.equal(model(data)["n2"], model(data)["n2"])
    model.eval()
    assert torch.equal(model(data)["n2"], model(data)["n2"])


def test_labels_of_nodes_and_of_edges() -> None:
    """As PyG's RandomLinkSplit leaves them: y for nodes, edge_label for edges."""
    tasks = {name: LEVELS[name] for name in ("n2", "e")}
    model = one_trunk(tasks)
    data = graph(9, 5, 20)
    data.y = torch.randint(0, 3, (9,))
    data.edge_label_index, data.edge_label = torch.randint(0, 9, (2, 5)), torch.rand(5).round()
    out = model(data)
    expected = {
        "n2": F.cross_entropy(out["n2"], data.y),
        "e": F.binary_cross_entropy_with_logits(out["e"][:, 0], data.edge_label.double()),
    }
    check(model.loss(data), expected, model)
    edges = one_trunk({"e": LEVELS["e"]})
    assert edges.loss(data).count.tolist() == [5]


# ---- One graph per task.


def labelled() -> dict[str, Data]:
    data = several()
    for name, one in data.items():
        n = one.x.shape[0]
        one.y = labels(n)[name]
        one.train_mask = torch.arange(n) % 2 == 0
    return data


def test_one_graph_per_task(any_backend: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    data = labelled()
    out = model(data)
    # The graph of c has no nodes: its loss is 0.
    expected = {name: expected_loss(name, out[name], data[name].y) for name in ("a", "b.x")}
    losses = model.loss(data, gramian=True)
    check(losses, expected, model)
    assert losses.count.tolist() == [11, 4, 0]
    off_diagonal = losses.gramian - losses.gramian.diag().diag()
    assert torch.equal(off_diagonal, torch.zeros(3, 3, dtype=torch.float64))
    for t, name in enumerate(TASKS):
        alone = model.loss(data[name], task=name, gramian=True).gramian[t, t]
        torch.testing.assert_close(losses.gramian[t, t], alone)
    y = {name: one.y for name, one in data.items()}
    for one in data.values():
        del one.y
    check(model.loss(data, y), expected, model)
    check(model.loss(data, {**y, "a": None}), {"b.x": expected["b.x"]}, model)
    part = {name: data[name] for name in ("b.x",)}
    check(model.loss(part, y), {"b.x": expected["b.x"]}, model)


def test_masks_of_each_graph(any_backend: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    data = labelled()
    out = model(data)
    expected = {name: expected_loss(name, out[name][::2], data[name].y[::2]) for name in ("a", "b.x")}
    check(model.loss(data, mask="train_mask"), expected, model)
    check(model.loss(data, mask={name: one.train_mask for name, one in data.items()}), expected, model)
    some = model.loss(data, mask={"a": "train_mask"})
    torch.testing.assert_close(some["a"], expected["a"])
    torch.testing.assert_close(some["b.x"], expected_loss("b.x", out["b.x"], data["b.x"].y))


def test_one_graph_per_task_of_several_levels(any_backend: str) -> None:
    tasks = {
        "a": mtl.Task(3, loss="cross_entropy"),
        "b.x": mtl.Task(1, loss="bce", level="edge"),
        "c": mtl.Task(2, loss="bce"),
    }
    model = mimo(TRUNKS["gcn"](6, 8), tasks)
    data = {"a": graph(8, 5, 20), "b.x": graph(6, 7, 9), "c": batch(3, y=torch.rand(3, 2).round())}
    data["a"].y = torch.randint(0, 3, (8,))
    data["b.x"].edge_label_index, data["b.x"].edge_label = torch.randint(0, 6, (2, 4)), torch.rand(4).round()
    out = model(data)
    bce = F.binary_cross_entropy_with_logits
    expected = {
        "a": F.cross_entropy(out["a"], data["a"].y),
        "b.x": bce(out["b.x"][:, 0], data["b.x"].edge_label.double()),
        "c": bce(out["c"], data["c"].y.double()),
    }
    check(model.loss(data), expected, model)
    with pytest.raises(ValueError, match="gramian: expected False"):
        model.loss(data, gramian=True)


def test_a_loss_of_ones_own_gets_its_labels_as_they_are(any_backend: str) -> None:
    seen = []

    def own(out: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return (out - y).square()

    tasks = {**TASKS, "a": mtl.Task(3, loss=own)}
    model = mimo(TRUNKS["gine"](6, 8), tasks)
    data = labelled()
    data["a"].y = torch.randint(0, 9, (11, 3))
    out = model(data)
    expected = {
        "a": (out["a"] - data["a"].y).square().mean(),
        "b.x": expected_loss("b.x", out["b.x"], data["b.x"].y),
    }
    check(model.loss(data), expected, model)
    assert torch.equal(seen[0], data["a"].y) and seen[0].dtype == torch.int64
    assert model.loss(data, gramian=True).gramian[0, 0] > 0


def test_one_graph_with_features_per_task(any_backend: str) -> None:
    model = mimo(TRUNKS["gcn"](6, 8), {"a": TASKS["a"], "b.x": TASKS["b.x"], "c": mtl.Task(1, loss="bce")})
    x = {name: torch.randn(9, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    y = {"a": torch.randint(0, 3, (9,)), "b.x": torch.randn(9), "c": torch.rand(9).round()}
    data = Data(x=x, edge_index=torch.randint(0, 9, (2, 20)), y=y, m=torch.arange(9) < 5, num_nodes=9)
    out = model(data)
    expected = {
        "a": expected_loss("a", out["a"][:5], y["a"][:5]),
        "b.x": F.mse_loss(out["b.x"][:5, 0], y["b.x"][:5].double()),
        "c": F.binary_cross_entropy_with_logits(out["c"][:5, 0], y["c"][:5].double()),
    }
    check(model.loss(data, mask="m"), expected, model)
    check(model.loss(data, mask=data.m), expected, model)
    data.y = torch.stack([y["a"].float(), y["b.x"], y["c"]], dim=1)
    check(model.loss(data, mask="m"), expected, model)
    check(model.loss(data, data.y, mask="m"), expected, model)


def test_float32_and_a_step(any_backend: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS).float().train()
    data = {name: Batch.from_data_list([one]).apply(_single) for name, one in labelled().items()}
    for one in data.values():
        del one.batch, one.ptr
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        losses = model.loss({name: Data.from_dict(one.to_dict()) for name, one in data.items()})
        losses.total.backward()
        optimizer.step()
        values.append(losses.total.item())
    assert values[-1] < 0.7 * values[0]


def _single(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float64 else value


def test_pooling_is_inside_the_gradients_of_graph_tasks(any_backend: str) -> None:
    model = one_trunk({"a": mtl.Task(2, loss="cross_entropy")})
    data = batch(5, y=torch.tensor([0, 1, 1]))
    h = model.trunk(data.x, data.edge_index)
    expected = F.cross_entropy(model.heads(global_mean_pool(h, data.batch), task="a"), data.y)
    check(model.loss(data), {"a": expected}, model)
