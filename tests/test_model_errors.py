"""MultiTaskModel: what does not fit, and what the messages say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_common import TRUNKS, batch, graph, mimo, several, trained
from torch import Tensor, nn
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GCN, SchNet

import torch_mtl_pyg as mtl

TASKS: dict[str, Any] = {
    "a": mtl.Task(3, loss="cross_entropy"),
    "b.x": mtl.Task(1, loss="mse"),
    "c": mtl.Task(2, loss="bce"),
}


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what


class Hypergraph(nn.Module):
    def forward(self, pos: Tensor, edge_index: Tensor) -> Tensor:
        return pos


def heads(**tasks: Any) -> mtl.MultiTaskHeads:
    return mtl.MultiTaskHeads(8, tasks or TASKS)


def schnet() -> SchNet:
    return SchNet(hidden_channels=4, num_filters=4, num_interactions=1, num_gaussians=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: (3, heads()), TypeError, "trunk: expected a torch.nn.Module, got int"),
        (lambda: (Anything(), heads()), TypeError, "trunk: expected a forward with named arguments"),
        (lambda: (GCN(5, 8, 2), nn.Linear(8, 3)), TypeError, "heads: expected MultiTaskHeads, got Linear"),
        (lambda: (GCN(5, 8, 2), heads(), nn.Linear(8, 3)), TypeError, "encoders: expected MultiTaskEncoders or None"),
        (
            lambda: (GCN(5, 8, 2), heads(), mtl.MultiTaskEncoders({"a": 3}, 5)),
            ValueError,
            r"encoders: expected the tasks \['a', 'b.x', 'c'\], got \['a'\]",
        ),
        (
            lambda: (Hypergraph(), heads(a=1), mtl.MultiTaskEncoders({"a": 3}, 5)),
            ValueError,
            "trunk: expected a forward that takes x, since there are encoders",
        ),
        (lambda: (GCN(5, 8, 2), heads(), None, "middle"), ValueError, "pool: expected the name of one.*got 'middle'"),
        (lambda: (GCN(5, 8, 2), heads(), None, "lstm"), ValueError, "pool: .*takes no arguments, got 'lstm'"),
        (lambda: (GCN(5, 8, 2), heads(), None, 3), TypeError, "pool: expected the name.*got int"),
        (lambda: (GCN(5, 8, 2), heads(), None, "mean", "dot"), ValueError, "edge: expected one of mul.*got 'dot'"),
        (lambda: (GCN(5, 8, 2), heads(), None, "mean", 3), TypeError, "edge: expected a string or a callable"),
        (
            lambda: (GCN(5, 8, 2), heads(a=mtl.Task(1, level="graph"), b=mtl.Task(1, level="node")), None, None),
            ValueError,
            "pool: expected a way from nodes to graphs",
        ),
    ],
)
def test_construction(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskModel(*arguments())


def plain(**tasks: Any) -> mtl.MultiTaskModel:
    model = mtl.MultiTaskModel(GCN(5, 8, 2), heads(**tasks))
    trained(model)
    return model


ONE: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("no data", lambda: torch.ones(3), None, TypeError, "data: expected a Data, a Batch or a dict.*got Tensor"),
    ("heterogeneous", lambda: HeteroData(), None, TypeError, "data: expected a Data.*got HeteroData"),
    (
        "no x",
        lambda: Data(edge_index=torch.zeros(2, 0).long()),
        None,
        ValueError,
        "data.x: expected it, since the forw",
    ),
    ("no edges", lambda: Data(x=graph(3, 5, 2).x), None, ValueError, "data.edge_index: expected it, since the forward"),
    ("unknown task", lambda: graph(3, 5, 2), "d", ValueError, "task: expected one of 'a', 'b.x', 'c', got 'd'"),
    ("index of task", lambda: graph(3, 5, 2), 3, IndexError, r"task: expected an index in \[0, 3\), got 3"),
    ("kind of task", lambda: graph(3, 5, 2), 1.0, TypeError, "task: expected an int, got float"),
    ("routes", lambda: graph(3, 5, 2), torch.tensor([0, 1]), ValueError, r"task: expected shape \[3\]"),
    ("route", lambda: graph(3, 5, 2), torch.tensor([0, 1, 3]), IndexError, r"\[0, 3\), got 3 in row 2"),
]


@pytest.mark.parametrize(("data", "task", "error", "message"), [o[1:] for o in ONE], ids=[o[0] for o in ONE])
def test_one_graph(data: Any, task: Any, error: type[Exception], message: str) -> None:
    model = plain()
    with pytest.raises(error, match=message):
        model(data(), task=task)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, TypeError, r"data.edge_label_index: expected an int64 tensor \[2, M\], the ends of edges, got NoneType"),
        (torch.zeros(2, 3), TypeError, "got torch.float32"),
        (torch.zeros(3, 2).long(), ValueError, r"expected shape \[2, M\], got \[3, 2\]"),
        (torch.tensor([[0, 1], [2, 4]]), IndexError, r"every end in \[0, 4\), got 4 at edge 1"),
        (torch.tensor([[-1, 1], [2, 3]]), IndexError, r"every end in \[0, 4\), got -1 at edge 0"),
    ],
)
def test_ends_of_edges(index: Any, error: type[Exception], message: str) -> None:
    model = plain(e=mtl.Task(1, level="edge"))
    data = graph(4, 5, 6)
    if index is not None:
        data.edge_label_index = index
    with pytest.raises(error, match=message):
        model(data)
    model = mtl.MultiTaskModel(GCN(5, 8, 2), heads(e=mtl.Task(1, level="edge"), n=mtl.Task(1))).double()
    with pytest.raises(error, match=message.replace("data.", r"data\['e'\].")):
        model({"n": graph(9, 5, 3), "e": data})


def test_what_trunks_return() -> None:
    for what, error, message in (
        ((torch.ones(2, 8), 3), TypeError, r"trunk: expected it to return a tensor \[N, D\], got tuple"),
        (torch.ones(8), ValueError, r"trunk: expected it to return a tensor \[N, D\], got shape \[8\]"),
        (torch.ones(3, 7), ValueError, r"x: expected shape \[N, 8\], got \[3, 7\]"),
    ):
        with pytest.raises(error, match=message):
            mtl.MultiTaskModel(Returns(what), heads())(Data(x=torch.ones(2, 8)))
    two = {"a": Data(x=torch.ones(2, 8)), "c": Data(x=torch.ones(2, 8))}
    with pytest.raises(ValueError, match=r"trunk: expected one row for each of 4 nodes, got shape \[3, 8\]"):
        mtl.MultiTaskModel(Returns(torch.ones(3, 8)), heads())(two)
    graphs = mtl.MultiTaskModel(Returns(torch.ones(2, 8)), heads(a=mtl.Task(1, level="graph")), pool=None)
    with pytest.raises(ValueError, match=r"trunk: expected one row for each of 3 graphs, got shape \[2, 8\]"):
        graphs(batch(8))


def test_what_pools_return() -> None:
    model = mtl.MultiTaskModel(GCN(5, 8, 2), heads(), pool=lambda x, batch, size: x[:1]).double()
    with pytest.raises(ValueError, match=r"pool: expected one row for each of 3 graphs, got shape \[1, 8\]"):
        model(batch(5))
    for wrong in (-1, 3):
        data = batch(5)
        data.batch = data.batch.index_fill(0, torch.tensor(0), wrong)
        with pytest.raises(ValueError, match=rf"data.batch: expected numbers of graphs in \[0, 3\), got {wrong}"):
            mtl.MultiTaskModel(GCN(5, 8, 2), heads(a=mtl.Task(1, level="graph"))).double()(data)
    data = batch(5)
    data.batch = data.batch.double()
    with pytest.raises(TypeError, match=r"data.batch: expected an int64 tensor, got torch.float64"):
        plain()(data)
    data = batch(5)
    data.batch = data.batch[1:]
    with pytest.raises(ValueError, match=r"data.batch: expected shape \[11\], one per node, got \[10\]"):
        plain()(data)
    data = batch(5)
    del data.batch
    with pytest.raises(ValueError, match=r"data.batch: expected it, since there are 3 graphs, got none"):
        plain()(data)


def test_encoders_need_features_per_task() -> None:
    model = mimo(TRUNKS["gcn"](6, 8), TASKS)
    message = "data.x: expected a dict from task to features, since the model has encoders"
    for task in (None, torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=message):
            model(graph(4, 5, 6), task=task)
    with pytest.raises(ValueError, match=r"x: expected shape \[N, 7\], got \[4, 5\]"):
        model(graph(4, 5, 6), task="b.x")
    dicts = Data(x={"a": graph(4, 5, 6).x}, edge_index=graph(4, 5, 6).edge_index)
    with pytest.raises(ValueError, match=r"data.x: expected features of the task 'c', got those of \['a'\]"):
        model(dicts, task="c")
    dicts.x = {}
    with pytest.raises(ValueError, match=r"data.x: expected the features of at least one task"):
        model(dicts)


def changed(name: str, **fields: Any) -> Any:
    """The graphs of several tasks with some fields of one exchanged; None: without."""

    def make() -> dict[str, Data]:
        data = several()
        for field, value in fields.items():
            if value is None:
                del data[name][field]
            else:
                data[name][field] = value
        return data

    return make


INT = torch.int64
SEVERAL: list[tuple[str, Any, type[Exception], str]] = [
    ("empty", lambda: {}, ValueError, "data: expected the graph of at least one task"),
    ("unknown", lambda: {**several(), "d": graph(1, 1, 1)}, ValueError, "data: expected one of 'a', .*got 'd'"),
    ("index", lambda: {0: graph(1, 5, 1)}, TypeError, "data: expected names of tasks, got 0"),
    ("no graph", lambda: {**several(), "a": None}, TypeError, r"data\['a'\]: expected a Data or Batch, got NoneType"),
    ("no x", changed("a", x=None), ValueError, r"data\['a'\].x: expected node features, got none"),
    ("x a list", changed("a", x=[1]), ValueError, r"data\['a'\].x: expected node features, got list"),
    (
        "width",
        changed("a", x=torch.ones(11, 4).double()),
        ValueError,
        r"x\['a'\]: expected shape \[N, 5\], got \[11, 4",
    ),
    ("dtype", changed("a", x=torch.ones(11, 5)), TypeError, "expected the dtype of"),
    ("field", changed("b.x", edge_attr=None), ValueError, r"data\['b.x'\].edge_attr: expected it, as data\['a'\] has"),
    (
        "edge_index",
        changed("a", edge_index=None),
        ValueError,
        r"data\['a'\].edge_index: expected it, as data\['b.x'\] has",
    ),
    (
        "shape",
        changed("c", edge_attr=torch.ones(0, 3).double()),
        ValueError,
        r"data\['c'\].edge_attr: expected shape \[\*, 2\], as data\['a'\] has, got \[0, 3\]",
    ),
    (
        "dtypes",
        changed("c", edge_attr=torch.ones(0, 2)),
        TypeError,
        r"data\['c'\].edge_attr: expected dtype torch.float64",
    ),
    (
        "no tensor",
        changed("c", edge_attr=[1.0]),
        TypeError,
        r"data\['c'\].edge_attr: expected a dense tensor, got list",
    ),
    (
        "sparse",
        changed("c", edge_index=torch.eye(2).to_sparse()),
        TypeError,
        r"data\['c'\].edge_index: expected a dense tensor, got torch.sparse_coo",
    ),
    (
        "node",
        changed("a", edge_index=torch.full((2, 30), 11)),
        IndexError,
        r"data\['a'\].edge_index: expected nodes in \[0, 11\), got 11 at edge 0",
    ),
    ("negative", changed("a", edge_index=torch.full((2, 30), -1)), IndexError, "got -1 at edge 0"),
    (
        "no nodes",
        changed("b.x", edge_index=torch.zeros(2, 1, dtype=INT), x=torch.ones(0, 7).double()),
        IndexError,
        r"data\['b.x'\].edge_index: expected nodes in \[0, 0\), got 0 at edge 0",
    ),
    (
        "rows of edges",
        lambda: {n: changed(n, edge_index=torch.zeros(3, 0, dtype=INT))()[n] for n in several()},
        ValueError,
        r"data\['a'\].edge_index: expected an int64 tensor \[2, E\], got torch.int64 of shape \[3, 0\]",
    ),
    (
        "batch",
        changed("a", batch=torch.zeros(4, dtype=INT)),
        ValueError,
        r"data\['a'\].batch: expected shape \[11\], one per node, got \[4\]",
    ),
]


@pytest.mark.parametrize(("data", "error", "message"), [s[1:] for s in SEVERAL], ids=[s[0] for s in SEVERAL])
def test_one_graph_per_task(data: Any, error: type[Exception], message: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    with pytest.raises(error, match=message):
        model(data())


def test_widths_without_encoders() -> None:
    with pytest.raises(
        ValueError, match=r"data\['b.x'\].x: expected shape \[\*, 5\], as data\['a'\] has, got \[4, 7\]"
    ):
        plain()({"a": graph(3, 5, 2), "b.x": graph(4, 7, 2)})


def test_number_of_nodes_that_nothing_tells() -> None:
    class OnIndex(nn.Module):
        def forward(self, edge_index: Tensor) -> Tensor:
            return torch.zeros(1, 8)

    model = mtl.MultiTaskModel(OnIndex(), heads())
    empty = torch.zeros(2, 0, dtype=INT)
    with pytest.raises(ValueError, match=r"data\['a'\].num_nodes: expected it, since nothing else tells"):
        model({"a": Data(edge_index=empty)})
    assert model({"a": Data(edge_index=empty, num_nodes=1)})["a"].shape == (1, 3)


def test_no_task_beside_data_per_task() -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    for task in ("a", torch.zeros(15, dtype=INT)):
        with pytest.raises(ValueError, match="task: expected None, since the data is given by task"):
            model(several(), task=task)
        with pytest.raises(ValueError, match="task: expected None, since the data is given by task"):
            model.loss(several(), task=task)


def test_levels_do_not_mix_in_a_routed_call() -> None:
    model = plain(a=mtl.Task(1, loss="mse", level="node"), b=mtl.Task(1, loss="mse", level="graph"))
    for call in (model, model.loss):
        with pytest.raises(ValueError, match="task: expected a name, since tasks have the levels node and graph"):
            call(graph(3, 5, 2), task=torch.zeros(3, dtype=INT))


def with_labels(**fields: Any) -> Data:
    data = graph(4, 5, 6)
    for field, value in fields.items():
        data[field] = value
    return data


Y = {"a": torch.zeros(4, dtype=INT), "b.x": torch.zeros(4), "c": torch.zeros(4, 2)}
LOSS: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("none", {}, {}, ValueError, "y: expected labels of the tasks 'a', 'b.x', 'c', got none; nor has data a y"),
    ("a list", {"y": [1]}, {}, TypeError, "data.y: expected a dict from task to labels or a tensor, got list"),
    ("given list", {}, {"y": [1]}, TypeError, "y: expected a dict from task to labels or a tensor, got list"),
    ("unknown", {"y": {**Y, "d": Y["a"]}}, {}, ValueError, "y: expected one of 'a', .*, got 'd'"),
    ("missing", {"y": {"a": Y["a"]}}, {}, ValueError, "y: expected labels of the task 'b.x'"),
    ("rows", {"y": {**Y, "a": Y["a"][:3]}}, {}, ValueError, r"y\['a'\]: expected shape \[4\]"),
    ("value", {"y": {**Y, "a": Y["a"] + 3}}, {}, IndexError, r"y\['a'\]: expected classes in \[0, 3\)"),
    ("no mask", {"y": Y}, {"mask": "train_mask"}, ValueError, "data.train_mask: expected a mask, got none"),
    (
        "mask of numbers",
        {"y": Y, "m": torch.ones(4)},
        {"mask": "m"},
        TypeError,
        "data.m: expected a bool tensor .*float32",
    ),
    (
        "mask a list",
        {"y": Y},
        {"mask": [True]},
        TypeError,
        "mask: expected a bool tensor or the name of a field, got list",
    ),
    ("rows of mask", {"y": Y}, {"mask": torch.ones(3).bool()}, ValueError, r"mask.*: expected shape \[4\].*got \[3\]"),
    ("masks", {"y": Y}, {"mask": {"d": "m"}}, ValueError, "mask: expected one of 'a', .*got 'd'"),
    ("gramian", {"y": Y}, {"gramian": 1}, TypeError, "gramian: expected a bool, got int"),
    ("task", {"y": Y}, {"task": "d"}, ValueError, "task: expected one of 'a', .*got 'd'"),
    ("labels of a task", {}, {"task": "a"}, ValueError, "y: expected labels of the task 'a', got none"),
    ("labels of routes", {}, {"task": Y["a"]}, ValueError, "y: expected labels, one per row, got none"),
    ("dict of routes", {"y": Y}, {"task": Y["a"]}, TypeError, r"y: expected a tensor \[N\], one label per row"),
    ("masks of routes", {"y": Y["a"]}, {"task": Y["a"], "mask": {}}, TypeError, "since task is a tensor, got a dict"),
]


@pytest.mark.parametrize(("fields", "options", "error", "message"), [o[1:] for o in LOSS], ids=[o[0] for o in LOSS])
def test_losses_of_one_graph(fields: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain().loss(with_labels(**fields), **options)


def test_losses_need_a_loss() -> None:
    with pytest.raises(ValueError, match="loss: expected at least one task with a loss"):
        plain(a=3).loss(graph(3, 5, 2))
    model = plain(a=mtl.Task(1, loss="mse"), b=1)
    with pytest.raises(ValueError, match="data: expected graphs of at least one task with a loss"):
        model.loss({"b": graph(3, 5, 2)})


def test_levels_take_a_dict_of_labels() -> None:
    model = plain(a=mtl.Task(1, loss="mse", level="node"), b=mtl.Task(1, loss="mse", level="graph"))
    with pytest.raises(ValueError, match="y: expected a dict from task to labels, since tasks have the levels node"):
        model.loss(graph(3, 5, 2), torch.zeros(3, 2))


JOINT: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("none", None, {}, ValueError, r"data\['a'\].y: expected labels, got none"),
    ("a list", [1], {}, TypeError, r"data\['a'\].y: expected a tensor, got list"),
    ("a dict", {"c": torch.zeros(11)}, {}, ValueError, r"data\['a'\].y: expected labels of the task 'a', got none"),
    ("rows", torch.zeros(10, dtype=INT), {}, ValueError, r"y\['a'\]: expected shape \[11\]"),
    ("row of its own", torch.arange(11), {}, IndexError, r"y\['a'\]: expected classes in \[0, 3\).*got 3 in row 3"),
    (
        "mask",
        torch.zeros(11, dtype=INT),
        {"mask": torch.ones(15).bool()},
        TypeError,
        "mask: expected the name of a field",
    ),
    ("no mask", torch.zeros(11, dtype=INT), {"mask": "m"}, ValueError, r"data\['a'\].m: expected a mask, got none"),
    ("masks", torch.zeros(11, dtype=INT), {"mask": {"d": "m"}}, ValueError, "mask: expected one of 'a', .*got 'd'"),
    (
        "rows of mask",
        torch.zeros(11, dtype=INT),
        {"mask": {"a": torch.ones(3).bool()}},
        ValueError,
        r"mask\['a'\]: expected shape \[11\]",
    ),
    (
        "given tensor",
        torch.zeros(11, dtype=INT),
        {"y": torch.zeros(15)},
        TypeError,
        "y: expected a dict from task to lab",
    ),
    ("given less", None, {"y": {"b.x": torch.zeros(4)}}, ValueError, "y: expected labels of the task 'a' .None if"),
    ("given unknown", None, {"y": {"d": torch.zeros(4)}}, ValueError, "y: expected one of 'a', .*got 'd'"),
]


@pytest.mark.parametrize(("y", "options", "error", "message"), [o[1:] for o in JOINT], ids=[o[0] for o in JOINT])
def test_losses_of_one_graph_per_task(y: Any, options: Any, error: type[Exception], message: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    data = several()
    data["b.x"].y, data["c"].y = torch.zeros(4), torch.zeros(0, 2)
    if y is not None:
        data["a"].y = y
    with pytest.raises(error, match=message):
        model.loss(data, **options)
