"""A model's ways of being called give one result: all tasks, one of them, and graphs by task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_common import graph, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN

import torch_mtl_pyg as mtl


def model_of(trunk: nn.Module | None = None, **tasks: Any) -> mtl.MultiTaskModel:
    model = mtl.MultiTaskModel(trunk or GCN(5, 8, 2), mtl.MultiTaskHeads(8, tasks))
    trained(model)
    return model


def in_every_way(model: mtl.MultiTaskModel, data: Data, name: str) -> list[Tensor]:
    return [model.loss(data)[name], model.loss(data, task=name)[name], model.loss({name: data})[name]]


# ---- Labels.


def test_an_edge_task_takes_its_own_labels_before_edge_label() -> None:
    edge = mtl.Task(1, loss="mse", level="edge")
    model = model_of(bond=edge, kind=edge)
    data = graph(6, 5, 12, edge_label_index=torch.randint(0, 6, (2, 5)))
    data.edge_label = torch.full((5,), 100.0)
    data.y = {"bond": torch.zeros(5), "kind": torch.ones(5)}
    outputs = model(data)
    for name, own in data.y.items():
        for loss in in_every_way(model, data, name):
            torch.testing.assert_close(loss, F.mse_loss(outputs[name][:, 0], own.double()))
    data.y = {"bond": torch.zeros(5)}  # edge_label is that of the one that has no entry
    for loss in in_every_way(model, data, "kind"):
        torch.testing.assert_close(loss, F.mse_loss(outputs["kind"][:, 0], data.edge_label.double()))
    for loss in in_every_way(model, data, "bond"):
        torch.testing.assert_close(loss, F.mse_loss(outputs["bond"][:, 0], torch.zeros(5).double()))
    data.y = {}
    with pytest.raises(ValueError, match="y: expected labels of the task 'bond', got none"):
        model.loss(data, task="bond")  # of two that lack them


def absolute(out: Tensor, y: Tensor) -> Tensor:
    return (out[:, 0] - y).abs().mean()


@pytest.mark.parametrize("loss", ["l1", absolute])
def test_a_task_takes_its_column_of_a_matrix(loss: Any) -> None:
    edge = mtl.Task(1, loss="mse", level="edge")
    model = model_of(a=mtl.Task(1, loss="mse"), b=mtl.Task(1, loss=loss), e=edge)
    data = graph(6, 5, 12, edge_label_index=torch.randint(0, 6, (2, 4)), edge_label=torch.zeros(4))
    data.y = torch.stack([torch.full((6,), 50.0), torch.zeros(6)], 1).double()
    expected = absolute(model(data)["b"], data.y[:, 1])
    alone = model.loss(data, task="b")
    assert alone.count.tolist() == [0, 6, 0]
    for value in (alone["b"], model.loss(data)["b"], model.loss(data, data.y[:, 1], task="b")["b"]):
        torch.testing.assert_close(value, expected)


def test_labels_of_one_task_alone_are_all_its_own() -> None:
    """As in data sets with one task each: no matrix of all tasks."""
    model = model_of(a=mtl.Task(2, loss="mse"), b=mtl.Task(1, loss="mse"))
    data = graph(6, 5, 12, y=torch.randn(6, 2).double())
    torch.testing.assert_close(model.loss(data, task="a")["a"], F.mse_loss(model(data)["a"], data.y))
    data.y = torch.randn(6).double()
    torch.testing.assert_close(model.loss(data, task="b")["b"], F.mse_loss(model(data)["b"][:, 0], data.y))


def test_labels_of_a_task_without_a_loss_are_refused_at_every_level() -> None:
    model = model_of(a=mtl.Task(1, loss="mse", level="node"), e=mtl.Task(1, level="edge"), n=mtl.Task(1, level="node"))
    data = graph(5, 5, 9, edge_label_index=torch.zeros(2, 3, dtype=torch.int64))
    for name in ("e", "n"):
        message = rf"y\['{name}'\]: expected no labels, since the task has no loss, got some"
        for one in (data, {"a": data, name: data}):
            with pytest.raises(ValueError, match=message):
                model.loss(one, {"a": torch.zeros(5), name: torch.zeros(77)})
    assert model.loss(data, {"a": torch.zeros(5), "e": None, "n": None}).count.tolist() == [5, 0, 0]


# ---- Graphs of several tasks.


@pytest.mark.parametrize(("numbers", "got"), [([0, 0, 0, 1, 2], 2), ([-1, 0, 0, 1, 1], -1)])
@pytest.mark.parametrize("first", [True, False])
def test_a_node_cannot_be_of_another_tasks_graph(numbers: list[int], got: int, first: bool) -> None:
    model = model_of(a=1, b=1)
    parts = {name: Batch.from_data_list([graph(3, 5, 6), graph(2, 5, 4)]) for name in ("a", "b")}
    name = "a" if first else "b"
    parts[name].batch = torch.tensor(numbers)
    with pytest.raises(ValueError, match=rf"data\['{name}'\].batch: expected numbers of graphs in \[0, 2\), got {got}"):
        model(parts)


class OnData(nn.Module):
    """Reads fields that Data has no name for, and the sizes of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 8)
        self.seen: dict[str, Any] = {}

    def forward(self, data: Data) -> Tensor:
        self.seen = {name: getattr(data, name, None) for name in ("ptr", "num_graphs", "batch")}
        h: Tensor = self.lin(data.x)
        return h + data.charge[:, None] if "charge" in data else h


def test_a_trunk_on_data_sees_all_fields() -> None:
    trunk = OnData()
    model = model_of(trunk, a=1, b=1)
    parts = {name: graph(n, 5, 9, charge=torch.randn(n).double(), y=torch.zeros(n)) for name, n in (("a", 6), ("b", 4))}
    parts["a"].train_mask, parts["a"].name, parts["b"].y = torch.ones(6).bool(), "a", None
    out = model(parts)
    for name, part in parts.items():
        torch.testing.assert_close(out[name], model(part, task=name))
    del parts["b"].charge
    with pytest.raises(ValueError, match=r"data\['b'\].charge: expected it, as data\['a'\] has it, got none"):
        model(parts)
    parts["a"].charge = parts["b"].charge = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"data\['a'\].charge: expected at least one dimension"):
        model(parts)


class OnPointers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 8)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, ptr: Tensor) -> Tensor:
        self.seen = ptr
        return torch.stack([part.sum(0) for part in self.lin(x).tensor_split(ptr[1:-1])])


@pytest.mark.parametrize("second", ["batch", "graph"])
def test_pointers_count_on_from_graph_to_graph(second: str) -> None:
    parts = {"a": Batch.from_data_list([graph(3, 5, 6), graph(2, 5, 4)])}
    parts["b"] = Batch.from_data_list([graph(4, 5, 6), graph(1, 5, 4)]) if second == "batch" else graph(5, 5, 10)
    graphs = [part for one in parts.values() for part in (one.to_data_list() if isinstance(one, Batch) else [one])]
    whole = Batch.from_data_list(graphs)
    trunk, task = OnPointers(), mtl.Task(1, level="graph")
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(8, {"a": task, "b": task}), pool=None).double()
    out = model(parts)
    assert trunk.seen is not None and torch.equal(trunk.seen, whole.ptr)
    torch.testing.assert_close(out["a"], model(parts["a"], task="a"))
    on_data = OnData()
    model_of(on_data, a=1, b=1)(parts)
    assert torch.equal(on_data.seen["ptr"], whole.ptr) and torch.equal(on_data.seen["batch"], whole.batch)
    assert on_data.seen["num_graphs"] == whole.num_graphs


def test_a_task_without_an_input_module_is_named() -> None:
    heads = mtl.MultiTaskHeads(8, {"a": mtl.Task(1, loss="mse")})
    model = mtl.MultiTaskModel(GCN(6, 8, 2), heads, mtl.MultiTaskEncoders({"a": 5}, 6)).double()
    model.heads.add_task("c", mtl.Task(1, loss="mse"))
    model.double()
    data = {name: graph(4, 5, 8, y=torch.zeros(4)) for name in ("a", "c")}
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=r"data: expected tasks that encoders has an input module for.*got 'c'"):
            call(data)
    assert list(model({"a": data["a"]})) == ["a"]


# ---- Parameters drawn anew.


def test_reset_reaches_every_layer() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor, batch: Tensor | None, size: int) -> Tensor:
            return self.lin(x).sum(0, keepdim=True)

    trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ModuleDict({"a": nn.Linear(8, 8)})["a"])
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(8, {"a": 2}), pool=Pool())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.reset_parameters()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
