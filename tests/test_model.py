"""MultiTaskModel: outputs, of one graph and of one graph per task."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from model_common import TRUNKS, WIDTHS, batch, graph, mimo, several, trained
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN, GCNConv, SchNet, Sequential, SoftmaxAggregation, global_add_pool, global_mean_pool
from torch_geometric.utils import remove_self_loops

import torch_mtl_pyg as mtl

TASKS: dict[str, Any] = {"a": 3, "b.x": 1, "c": 2}


def by_hand(model: mtl.MultiTaskModel, name: str, data: Data) -> Tensor:
    """One task through plain linear layers and the trunk."""
    x = model.encoders.to_modules()[name](data.x) if model.encoders is not None else data.x
    if "data" in model.inputs.names or model.inputs.whole:
        data = data.clone()
        data.x = x
        h = model.trunk(data)
    elif model.inputs.features != "x":
        h = model.trunk(x)
    else:
        options = {"edge_attr": data.edge_attr} if "edge_attr" in model.inputs.names else {}
        h = model.trunk(x, data.edge_index, **options)
    out: Tensor = model.heads.to_modules()[name](h)
    return out


@pytest.mark.parametrize("name", [n for n in TRUNKS if n != "graph norm"])
def test_a_union_equals_one_pass_of_the_trunk_per_task(any_backend: str, name: str) -> None:
    model = mimo(TRUNKS[name](6, 8), TASKS)
    data = several()
    if name == "gat":  # without edge_dim, PyG's GAT refuses edge features
        data = several(edge_attr=False)
    out = model(data)
    assert list(out) == list(TASKS)
    expected = {key: by_hand(model, key, data[key]) for key in data}
    for key in data:
        assert out[key].shape == (data[key].x.shape[0], TASKS[key])
        torch.testing.assert_close(out[key], expected[key], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(data[key], task=key), expected[key], rtol=1e-12, atol=1e-12)
    parameters = [p for p in model.trunk.parameters() if p.requires_grad]
    ours = torch.autograd.grad(sum(o.sin().sum() for o in out.values()), parameters)
    theirs = torch.autograd.grad(sum(o.sin().sum() for o in expected.values()), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_input_modules(any_backend: str) -> None:
    model = mimo(TRUNKS["gcn"](6, 8), TASKS)
    data = several()
    sum(o.sin().sum() for o in model(data).values()).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for name, one in data.items():
        model(one, task=name).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_normalisation_per_graph_sees_the_graphs_of_a_union() -> None:
    model = mimo(TRUNKS["graph norm"](6, 8), TASKS)
    data = {"a": graph(9, 5, 20), "b.x": graph(4, 7, 3), "c": batch(3)}
    out = model(data)
    for name, one in data.items():
        torch.testing.assert_close(out[name], model(one, task=name), rtol=1e-12, atol=1e-12)


def test_without_encoders(any_backend: str) -> None:
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, TASKS)))
    data = {"c": graph(6, 5, 12), "a": graph(3, 5, 4)}
    out = model(data)
    assert list(out) == ["a", "c"], "tasks may be left out"
    for name, one in data.items():
        torch.testing.assert_close(out[name], by_hand(model, name, one))


def test_batches_of_graphs_per_task(any_backend: str) -> None:
    """Pooled where the data is a batch; one graph and batches in one call."""
    tasks = {"a": 3, "b.x": mtl.Task(1, level="graph"), "c": 2}
    model = mimo(TRUNKS["gcn"](6, 8), tasks, pool="max")
    data = {"b.x": graph(5, 7, 9), "a": batch(5, (4, 0, 6, 0)), "c": graph(3, 3, 4)}
    out = model(data)
    assert [tuple(o.shape) for o in out.values()] == [(4, 3), (1, 1), (3, 2)]
    for name, one in data.items():
        torch.testing.assert_close(out[name], model(one, task=name), rtol=1e-12, atol=1e-12)


def test_pooling_behind_a_trunk_that_takes_no_batch() -> None:
    model = mimo(TRUNKS["mlp"](6, 8), TASKS)
    data = {"a": batch(5), "c": batch(3, (2, 5))}
    for name, out in model(data).items():
        h = model.trunk(model.encoders(data[name].x, task=name))
        expected = model.heads(global_mean_pool(h, data[name].batch), task=name)
        torch.testing.assert_close(out, expected)


def test_one_graph_with_features_per_task(any_backend: str) -> None:
    model = mimo(TRUNKS["gine"](6, 8), TASKS)
    index, attr = torch.randint(0, 9, (2, 20)), torch.randn(20, 2, dtype=torch.float64)
    x = {name: torch.randn(9, width, dtype=torch.float64) for name, width in WIDTHS.items()}
    data = Data(x=x, edge_index=index, edge_attr=attr, num_nodes=9)
    out = model(data)
    for name in TASKS:
        expected = by_hand(model, name, Data(x=x[name], edge_index=index, edge_attr=attr))
        torch.testing.assert_close(out[name], expected)
        torch.testing.assert_close(model(data, task=name), expected)
    assert list(model(Data(x={"c": x["c"]}, edge_index=index, edge_attr=attr))) == ["c"]
    collated = Batch.from_data_list([data, data])
    assert model(collated)["a"].shape == (2, 3), "a batch is pooled"


# ---- One graph for all tasks.


def test_one_graph_for_all_tasks(any_backend: str) -> None:
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, TASKS)))
    data = graph(12, 5, 40)
    out = model(data)
    h = model.trunk(data.x, data.edge_index)
    for name, expected in model.heads(h).items():
        torch.testing.assert_close(out[name], expected)
    torch.testing.assert_close(model(data, task="b.x"), out["b.x"])
    torch.testing.assert_close(model(data, 2), out["c"])
    idx = torch.randint(0, 3, (12,))
    torch.testing.assert_close(model(data, idx), model.heads(h, task=idx))


@pytest.mark.parametrize("edge", ["mul", "add", "mean", lambda a, b: (a - b).abs()])
def test_levels_in_one_model(any_backend: str, edge: Any) -> None:
    tasks = {
        "g": mtl.Task(2, level="graph"),
        "n": mtl.Task(3, level="node"),
        "e": mtl.Task(1, level="edge"),
        "default": 4,
        "n2": mtl.Task(1, level="node"),
    }
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, tasks), edge=edge))
    data = batch(5)
    data.edge_label_index = torch.randint(0, 11, (2, 6))
    h = model.trunk(data.x, data.edge_index)
    linears = model.heads.to_modules()
    pooled = global_mean_pool(h, data.batch)
    a, b = h[data.edge_label_index[0]], h[data.edge_label_index[1]]
    ways = {"mul": a * b, "add": a + b, "mean": (a + b) / 2}
    ends = ways[edge] if isinstance(edge, str) else (a - b).abs()
    expected = {
        "g": linears["g"](pooled),
        "n": linears["n"](h),
        "e": linears["e"](ends),
        "default": linears["default"](pooled),
        "n2": linears["n2"](h),
    }
    out = model(data)
    assert list(out) == list(tasks)
    for name in tasks:
        torch.testing.assert_close(out[name], expected[name])
        torch.testing.assert_close(model(data, task=name), expected[name])
    ours = torch.autograd.grad(sum(o.sin().sum() for o in out.values()), model.heads.weight, retain_graph=True)
    theirs = torch.autograd.grad(
        sum(o.sin().sum() for o in expected.values()), [linears[name].weight for name in tasks], retain_graph=True
    )
    torch.testing.assert_close(ours[0], torch.cat(theirs))
    single = Data(x=data.x, edge_index=data.edge_index, edge_label_index=data.edge_label_index)
    shapes = {name: o.shape[0] for name, o in model(single).items()}
    assert shapes == {"g": 1, "n": 11, "e": 6, "default": 11, "n2": 11}


@pytest.mark.parametrize(
    "pool", ["mean", "sum", "add", "max", "softmax", SoftmaxAggregation(learn=True), global_add_pool]
)
def test_pools(pool: Any) -> None:
    heads = mtl.MultiTaskHeads(8, {"a": 3})
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), heads, pool=pool))
    data = batch(5)
    h = model.trunk(data.x, data.edge_index)
    ways: dict[str, Any] = {
        "mean": lambda rows: rows.mean(0),
        "max": lambda rows: rows.amax(0),
        "softmax": lambda rows: (rows.softmax(0) * rows).sum(0),
    }
    way = ways.get("softmax" if isinstance(pool, nn.Module) else pool, lambda rows: rows.sum(0))
    expected = torch.stack([way(rows) for rows in h.split([4, 1, 6])])
    torch.testing.assert_close(model(data)["a"], heads(expected)["a"])
    last = Batch.from_data_list([graph(3, 5, 4), graph(0, 5, 0)])
    assert model(last)["a"].shape == (2, 3), "graphs without nodes count"
    assert torch.equal(model(last)["a"][1], heads.bias)


class NoEdges(nn.Module):
    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(2, 0, dtype=torch.int64), pos.new_zeros(0)


def test_without_pool_the_rows_are_those_of_the_trunk() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schnet = SchNet(hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=4)
    schnet.lin2 = nn.Linear(4, 8)
    schnet.interaction_graph = NoEdges()  # PyG's needs torch_cluster
    tasks = {"a": mtl.Task(2, level="graph"), "b": mtl.Task(1, level="graph")}
    model = mtl.MultiTaskModel(schnet, mtl.MultiTaskHeads(8, tasks), pool=None)
    molecules = [Data(z=torch.randint(1, 9, (n,)), pos=torch.randn(n, 3)) for n in (3, 5)]
    data = Batch.from_data_list(molecules)
    out = model(data)
    assert out["a"].shape == (2, 2)
    torch.testing.assert_close(model(molecules[0])["b"], out["b"][:1])
    joint = model({"b": data, "a": molecules[1]})
    torch.testing.assert_close(joint["b"], out["b"])
    torch.testing.assert_close(joint["a"], out["a"][1:])


# ---- What the trunk gets.


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        pos: Tensor | None = None,
        own: Tensor | None = None,
        *,
        batch_size: int = 0,
    ) -> Tensor:
        self.seen = {"edge_index": edge_index, "pos": pos, "own": own, "batch_size": batch_size}
        return x


def test_the_trunk_gets_what_it_takes_and_there_is() -> None:
    trunk = Recording()
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(4, {"a": 1}))
    index, x = torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 4)
    model(Data(x=x, edge_index=index, own=x, edge_attr=x))
    assert trunk.seen["own"] is x and trunk.seen["pos"] is None and trunk.seen["batch_size"] == 0
    model(Data(x=x, edge_index=index, pos=x))
    assert trunk.seen["pos"] is x and trunk.seen["own"] is None


def test_fields_of_ones_own_are_put_together_as_pyg_says() -> None:
    trunk = Recording()
    model = mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(4, {"a": 1, "b": 1}))
    parts = {
        name: Data(x=torch.randn(n, 4), edge_index=torch.randint(0, n, (2, 3)), own=torch.randn(n, 2))
        for name, n in (("a", 2), ("b", 5))
    }
    model(parts)
    expected = Batch.from_data_list(list(parts.values()))
    assert torch.equal(trunk.seen["own"], expected.own)
    assert torch.equal(trunk.seen["edge_index"], expected.edge_index)


def test_a_sequential_of_pyg() -> None:
    trunk = Sequential("x, edge_index", [(GCNConv(5, 8), "x, edge_index -> x"), nn.ReLU()])
    model = trained(mtl.MultiTaskModel(trunk, mtl.MultiTaskHeads(8, TASKS)))
    data = graph(6, 5, 10)
    torch.testing.assert_close(model(data)["a"], model.heads(trunk(data.x, data.edge_index), task="a"))
    pooling = Sequential(
        "x, edge_index, batch",
        [(GCNConv(5, 8), "x, edge_index -> x"), (global_mean_pool, "x, batch -> x")],
    )
    model = trained(mtl.MultiTaskModel(pooling, mtl.MultiTaskHeads(8, {"a": mtl.Task(2, level="graph")}), pool=None))
    assert model(batch(5))["a"].shape == (3, 2) and model(data)["a"].shape == (1, 2)


def test_sparse_adjacency_in_the_place_of_edge_index() -> None:
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, TASKS)))
    data = graph(6, 5, 10)
    data.edge_index = remove_self_loops(torch.unique(data.edge_index, dim=1))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta
        size = (6, 6)
        ones = torch.ones(data.edge_index.shape[1], dtype=torch.float64)
        adj_t = torch.sparse_coo_tensor(data.edge_index.flip(0), ones, size).to_sparse_csr()
        torch.testing.assert_close(model(Data(x=data.x, adj_t=adj_t))["a"], model(data)["a"])


def test_sampled_neighbourhoods() -> None:
    """The batch_size of PyG's samplers is the number of seeds, not that of graphs."""
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2, norm="graph_norm"), mtl.MultiTaskHeads(8, TASKS)))
    data = graph(30, 5, 90)
    expected = model(data)
    data.batch_size, data.input_id = 10, torch.arange(10)
    for name, out in model(data).items():
        assert torch.equal(out, expected[name])


# ---- As a module.


def test_copies_saves_and_resets() -> None:
    model = mimo(TRUNKS["gin"](6, 8), TASKS, edge="mean")
    data = several()
    out = model(data)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name, value in other(data).items():
            assert torch.equal(value, out[name])
    fresh = mimo(TRUNKS["gin"](6, 8), TASKS)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(data)["a"], out["a"])
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    fresh.reset_parameters()
    same = [name for name, p in fresh.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in same if name.startswith(("heads.", "encoders.weights", "trunk.convs.0.nn.lins"))]


def test_compiles(any_backend: str) -> None:
    torch._dynamo.reset()
    model = trained(mtl.MultiTaskModel(GCN(5, 8, 2), mtl.MultiTaskHeads(8, TASKS)))
    data = graph(12, 5, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing PyG
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(data)["a"], model(data)["a"])
        inner = mtl.MultiTaskModel(torch.compile(model.trunk, backend="aot_eager"), model.heads)
        torch.testing.assert_close(inner(data)["a"], model(data)["a"])
