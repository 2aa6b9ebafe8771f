"""multi_task: which layer is exchanged, and that all else stays."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from model_common import batch, graph, trained
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import global_mean_pool

import torch_mtl_pyg as mtl

TASKS: dict[str, Any] = {"a": mtl.Task(3, loss="cross_entropy"), "b": 1}


class Classifier(nn.Module):
    """As PyG's examples are written."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 4)
        self.conv1 = pyg.GCNConv(5, 8)
        self.norm = pyg.BatchNorm(8)
        self.conv2 = pyg.GCNConv(8, 8)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.conv1(x, edge_index)).relu(), p=0.5, training=self.training)
        out: Tensor = self.lin(self.conv2(x, edge_index))
        return out


class EndsInConv(Classifier):
    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, edge_index).relu(), edge_index, edge_weight)
        return out


class OfGraphs(Classifier):
    """Pools, then a linear layer."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        x = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        out: Tensor = self.lin(pyg.global_mean_pool(x, batch))
        return out


class Readout(OfGraphs):
    """A linear layer, then pools."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = pyg.SumAggregation()

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        out: Tensor = self.readout(self.lin(self.conv1(x, edge_index).relu()), batch)
        return out


class OnData(Classifier):
    def forward(self, data: Data) -> Tensor:
        out: Tensor = self.lin(self.conv1(data.x, data.edge_index).relu())
        return out


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gnn = pyg.GraphSAGE(5, 8, 2)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.head(self.gnn(x, edge_index))
        return out


class OfGraphsToo(Classifier):
    """The same, with the pool imported by its name."""

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        out: Tensor = self.lin(global_mean_pool(self.conv1(x, edge_index).relu(), batch))
        return out


def of_pyg(*behind: Any) -> pyg.Sequential:
    return pyg.Sequential(
        "x, edge_index, batch",
        [(pyg.GCNConv(5, 8), "x, edge_index -> x"), nn.ReLU(), (nn.Linear(8, 4), "x -> x"), *behind],
    )


MODELS: dict[str, tuple[Any, str]] = {
    "gcn": (lambda: pyg.GCN(5, 8, 3, out_channels=4), "convs.2"),
    "gat": (lambda: pyg.GAT(5, 8, 2, out_channels=4, heads=2), "convs.1"),
    "gin": (lambda: pyg.GIN(5, 8, 2, out_channels=4, norm="batch_norm"), "convs.1"),
    "sage": (lambda: pyg.GraphSAGE(5, 8, 2, out_channels=4), "convs.1"),
    "jk": (lambda: pyg.GCN(5, 8, 2, out_channels=4, jk="cat"), "lin"),
    "custom": (Classifier, "lin"),
    "conv": (EndsInConv, "conv2"),
    "data": (OnData, "lin"),
    "nested": (Nested, "head.2"),
    "sequential": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), pyg.Linear(8, 4)), "2"),
    "mlp": (lambda: pyg.MLP([5, 8, 4]), "lins.1"),
    "mlp without norm": (lambda: nn.Sequential(pyg.MLP([5, 8, 4], norm=None)), "0.lins.1"),
    "graphs": (OfGraphs, "lin"),
    "graphs too": (OfGraphsToo, "lin"),
    "readout": (Readout, "lin"),
    "sequential of pyg": (of_pyg, "module_2"),
    "sequential of graphs": (lambda: of_pyg((pyg.global_max_pool, "x, batch -> x")), "module_2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_trunk_is_the_model_up_to_its_last_layer(name: str) -> None:
    make, layer = MODELS[name]
    model = trained(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = mtl.multi_task(model, TASKS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "a copy"
    data = batch(5) if name in ("graphs", "graphs too", "readout", "sequential of graphs") else graph(9, 5, 20)
    taken: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    inputs = mtl.MultiTaskModel(model, mtl.MultiTaskHeads(4, {"a": 1})).inputs
    inputs.call(model, data, None, None)
    h = taken[0]
    if name == "readout":
        h = pyg.global_add_pool(h, data.batch)
    if name == "sequential of graphs":
        h = pyg.global_max_pool(h, data.batch)
    torch.testing.assert_close(converted.inputs.call(converted.trunk, data, None, None), h)
    assert converted.heads.in_channels == taken[0].shape[1]
    torch.testing.assert_close(converted(data)["a"], converted.heads(h, task="a"))
    kept = {key for key in before if not key.startswith(f"{layer}.")}
    state = converted.trunk.state_dict()
    assert set(state) == kept and all(torch.equal(state[key], before[key]) for key in kept)
    assert not converted.training
    assert {p.dtype for p in converted.parameters()} == {torch.float64}


def test_models_that_pool_predict_for_graphs() -> None:
    for name in ("graphs", "graphs too", "readout", "sequential of graphs"):
        converted = mtl.multi_task(MODELS[name][0]().double(), {**TASKS, "c": mtl.Task(2, level="graph")})
        assert converted.pool is None
        assert {task.level for task in converted.heads.tasks.values()} == {"graph"}
        data = {"a": batch(5, (2, 6)), "c": graph(3, 5, 4)}
        out = converted(data)
        assert out["a"].shape == (2, 3) and out["c"].shape == (1, 2)
        data["a"].y = torch.tensor([0, 2])
        assert converted.loss({"a": data["a"]}).count.tolist() == [2, 0, 0]
    converted = mtl.multi_task(Classifier(), TASKS)
    assert isinstance(converted.pool, pyg.MeanAggregation)
    assert {task.level for task in converted.heads.tasks.values()} == {None}
    assert isinstance(mtl.multi_task(Classifier(), TASKS, pool="max").pool, pyg.MaxAggregation)


def test_without_out_channels_heads_go_behind() -> None:
    model = pyg.GIN(5, 8, 2).double()
    converted = mtl.multi_task(model, TASKS)
    data = graph(9, 5, 20)
    torch.testing.assert_close(converted(data)["b"], converted.heads(model(data.x, data.edge_index), task="b"))
    assert converted.trunk is not model


def test_named_layers() -> None:
    jk = pyg.GCN(5, 8, 2, jk="cat")
    with pytest.raises(ValueError, match="give final='lin' to exchange its last linear layer, or final='' to keep it"):
        mtl.multi_task(jk, TASKS)
    assert mtl.multi_task(jk, TASKS, final="lin").heads.in_channels == 16
    behind = mtl.multi_task(jk, TASKS, final="")
    assert behind.heads.in_channels == 8 and set(behind.trunk.state_dict()) == set(jk.state_dict())
    gin = pyg.GIN(5, 8, 2, out_channels=4).double()
    converted = mtl.multi_task(gin, TASKS, final="convs.1.nn.lins.1")
    assert isinstance(converted.trunk.convs[1], pyg.GINConv), "the last hop stays"
    assert converted(graph(9, 5, 20))["a"].shape == (9, 3)

    class Squeezed(Classifier):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return super().forward(x, edge_index).log_softmax(1)

    with pytest.raises(ValueError, match=r'what the model returns comes from log_softmax; name it: final="lin"'):
        mtl.multi_task(Squeezed(), TASKS)
    named = mtl.multi_task(Squeezed().double(), TASKS, final="lin")
    h = named.trunk(graph(9, 5, 20).x, graph(9, 5, 20).edge_index)
    torch.testing.assert_close(h.exp().sum(1), torch.ones(9, dtype=torch.float64)), "as it says"


def test_schnet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schnet = pyg.SchNet(hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=4, readout="mean")

    class AllPairs(nn.Module):  # PyG's needs torch_cluster
        def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
            index = ((batch.unsqueeze(0) == batch.unsqueeze(1)) & ~torch.eye(len(batch)).bool()).nonzero().t()
            return index, (pos[index[0]] - pos[index[1]]).norm(dim=1)

    schnet.interaction_graph = AllPairs()
    molecules = [Data(z=torch.randint(1, 9, (n,)), pos=torch.randn(n, 3), y=torch.randn(1)) for n in (3, 5)]
    data = Batch.from_data_list(molecules)
    converted = mtl.multi_task(schnet, {"energy": mtl.Task(1, loss="mse"), "gap": mtl.Task(1, loss="l1")})
    assert converted.heads.in_channels == 4 and converted.heads.tasks["gap"].level == "graph"
    # A linear layer on the mean of embeddings is the mean of linear layers.
    with torch.no_grad():
        converted.heads.weight.copy_(schnet.lin2.weight.expand(2, -1))
        converted.heads.bias.copy_(schnet.lin2.bias.expand(2))
    torch.testing.assert_close(converted(data)["gap"], schnet(data.z, data.pos, data.batch))
    assert converted.loss(data, torch.randn(2, 2)).count.tolist() == [2, 2]
    assert converted.loss({"energy": data, "gap": molecules[0]}).count.tolist() == [2, 1]
    schnet.dipole = True
    with pytest.raises(ValueError, match=r"does more behind its last layer \(dipole\)"):
        mtl.multi_task(schnet, TASKS)


def test_dimenet() -> None:
    model = pyg.DimeNetPlusPlus(16, 1, 2, 8, 8, 12, 3, 4)
    converted = mtl.multi_task(model, TASKS)
    assert converted.heads.in_channels == 12 and converted.pool is None
    lost = {f"output_blocks.{i}.lin.weight" for i in range(3)}
    assert set(model.state_dict()) - set(converted.trunk.state_dict()) == lost


class Twice(Classifier):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.lin(F.pad(self.lin(self.conv1(x, edge_index)), (0, 4)))
        return out


class Branches(Classifier):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.conv1(x, edge_index)
        if x.sum() > 0:
            x = x.relu()
        out: Tensor = self.lin(x)
        return out


class Sums(Classifier):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.lin(self.conv1(x, edge_index)) + 1
        return out


class NormLast(Classifier):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv1(x, edge_index))
        return out


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GINConv(nn.Linear(5, 4))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv(x, edge_index)
        return out


# Used twice in one model.
RELU, SQUARE = nn.ReLU(), nn.Linear(5, 5)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: 3, {}, TypeError, "model: expected a torch.nn.Module, got int"),
        (Classifier, {"final": 3}, TypeError, "final: expected the name of a module or None, got int"),
        (Classifier, {"final": "lin2"}, ValueError, "final: expected the name of a module of the model, got 'lin2'"),
        (Classifier, {"final": "norm"}, ValueError, "final: expected a linear layer or a convolution, got BatchNorm"),
        (Classifier, {"final": ""}, ValueError, "expected a model with an attribute out_channels"),
        (Classifier, {"colour": 3}, TypeError, "colour"),
        (Classifier, {"pool": "middle"}, ValueError, "pool: expected the name of one of PyG's aggregations"),
        (Twice, {}, ValueError, "the model calls lin more than once; name it"),
        (Branches, {}, ValueError, "the model cannot be traced .*; name it"),
        (Sums, {}, ValueError, "what the model returns comes from add; name it"),
        (NormLast, {}, ValueError, "comes from|model.norm"),
        (Gated, {}, ValueError, "the number of features that conv takes is not known"),
        (lambda: pyg.GCN(5, 8, 1, out_channels=4), {}, ValueError, "the model has one layer"),
        (lambda: nn.Linear(5, 4), {}, ValueError, "the model has one layer, so that nothing would be left"),
        (lambda: pyg.GCNConv(5, 4), {}, ValueError, "the model has one layer, so that nothing would be left"),
        (lambda: nn.Sequential(RELU, nn.Linear(5, 4), RELU), {}, ValueError, "model.2 ends in ReLU|calls 2 more than"),
        (
            lambda: nn.Sequential(nn.ReLU(), SQUARE, nn.ReLU(), SQUARE),
            {},
            ValueError,
            "the model calls 3 more than once",
        ),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU()), {}, ValueError, "model.1 ends in ReLU, which is no linear"),
        (lambda: nn.Sequential(), {}, ValueError, "the model is empty"),
        (lambda: pyg.MLP([5, 8, 4], plain_last=False), {}, ValueError, "the model ends in an activation"),
        (lambda: of_pyg((torch.relu, "x -> x")), {}, ValueError, "the model ends in a function, relu"),
        (
            lambda: nn.Sequential(pyg.Linear(-1, 4)),
            {},
            ValueError,
            "model.0: expected an initialised layer, got a lazy",
        ),
    ],
)
def test_what_cannot_be_told(make: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.multi_task(make(), TASKS, **options)


def test_options_of_the_heads() -> None:
    converted = mtl.multi_task(Classifier().double(), TASKS, hidden_channels=6, act="tanh", bias=False, edge="add")
    assert converted.heads.hidden_channels == (6,) and converted.heads.bias is None
    assert converted(graph(9, 5, 20))["a"].shape == (9, 3)
    assert converted.edge is torch.add


@pytest.mark.parametrize(
    "model",
    [
        pyg.SchNet(hidden_channels=8, num_filters=8, num_interactions=1),
        pyg.DimeNet(8, 1, 1, 2, 3, 2),
    ],
    ids=["SchNet", "DimeNet"],
)
def test_converted_models_are_drawn_anew(model: torch.nn.Module) -> None:
    converted = mtl.multi_task(model, {"gap": 1})
    before = {name: p.detach().clone() for name, p in converted.trunk.named_parameters()}
    converted.reset_parameters()
    changed = [name for name, p in converted.trunk.named_parameters() if not torch.equal(p, before[name])]
    assert any("embedding" in name or "emb" in name for name in changed)


def test_converted_models_train_and_copy() -> None:
    converted = mtl.multi_task(pyg.GCN(5, 8, 2, out_channels=4), TASKS)
    assert converted.training
    data = graph(9, 5, 20).apply(lambda t: t.float() if t.is_floating_point() else t)
    data.y = {"a": torch.randint(0, 3, (9,))}
    converted.loss(data).total.backward()
    assert all(p.grad is not None for p in converted.trunk.parameters())
    converted.reset_parameters()
    assert copy.deepcopy(converted)(data)["a"].shape == (9, 3)
