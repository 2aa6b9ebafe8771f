"""MultiTaskConv as a MessagePassing layer: hooks, aggregations, explanations, and the models PyG builds from layers."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from conv_common import TASKS, graph
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import GCNConv, HeteroConv, MessagePassing, SAGEConv, Sequential, aggr, to_hetero
from torch_geometric.utils import trim_to_layer

import torch_mtl_pyg as mtl

N, F = 17, 6


def conv(*args: Any, **kwargs: Any) -> mtl.MultiTaskConv:
    return mtl.MultiTaskConv(*args, **kwargs).double()


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- PyG's way, over the messages.


@pytest.mark.parametrize("reduce", ("mean", "sum", "max", "min", "gcn"))
@pytest.mark.parametrize("weighted", (True, False))
def test_both_ways_give_the_same(any_backend: str, reduce: str, weighted: bool) -> None:
    layer = conv(F, TASKS, normalize="gcn") if reduce == "gcn" else conv(F, TASKS, aggr=reduce)
    x, weight = features(N, F), torch.rand(graph().shape[1], dtype=torch.float64) if weighted else None
    x.requires_grad_()
    calls: list[int] = []
    outputs = []
    for fuse in (True, False):
        layer.fuse = fuse
        original = layer.aggr_module.forward
        layer.aggr_module.forward = lambda *a, original=original, **k: (calls.append(1), original(*a, **k))[1]
        out = layer.packed(x, graph(), weight)
        layer.aggr_module.forward = original
        outputs.append((out, *torch.autograd.grad(out.sin().sum(), (x, *layer.parameters()))))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == (2 if weighted and reduce in ("max", "min") else 1)


AGGREGATIONS: dict[str, Any] = {
    "median": "median",
    "std": "std",
    "mul": "mul",
    "softmax": lambda: aggr.SoftmaxAggregation(t=0.5),
    "learnt softmax": lambda: aggr.SoftmaxAggregation(learn=True),
    "powermean": lambda: aggr.PowerMeanAggregation(p=1.0),
    "module": lambda: aggr.MeanAggregation(),
    "list": ["mean", "max", "std"],
    "multi": lambda: aggr.MultiAggregation(["sum", "max"], mode="sum"),
    "lstm": "lstm",
}


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_any_aggregation_of_pyg(any_backend: str, name: str) -> None:
    made = AGGREGATIONS[name]
    edge_index = graph()
    edge_index = edge_index[:, torch.argsort(edge_index[1], stable=True)]
    layer = conv(F, TASKS, aggr=made() if callable(made) else made)
    x = features(N, F).abs().requires_grad_()
    out = layer(x, edge_index)
    for task, single in layer.to_modules().items():
        assert type(single) is SAGEConv
        torch.testing.assert_close(out[task], single(x, edge_index))
    sum(o.sum() for o in out.values()).backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_lists_widen_the_weights() -> None:
    layer = mtl.MultiTaskConv(F, TASKS, aggr=["mean", "max", "std"])
    assert layer.weight.shape == (10, 3 * F) and layer.weight_root.shape == (10, F)
    lazy = mtl.MultiTaskConv(-1, TASKS, aggr=["mean", "max", "std"])
    assert lazy(torch.randn(N, F), graph())["toxic"].shape == (N, 1)
    assert lazy.weight.shape == (10, 3 * F)


class Shifted(mtl.MultiTaskConv):
    def message(self, x_i: Tensor, x_j: Tensor, edge_weight: Tensor | None) -> Tensor:
        return x_j - x_i if edge_weight is None else edge_weight.view(-1, 1) * (x_j - x_i)


class Doubled(Shifted):
    def update(self, inputs: Tensor) -> Tensor:
        return 2 * inputs


class Mixin:
    def aggregate(self, inputs: Tensor, index: Tensor, dim_size: int) -> Tensor:
        return inputs.new_zeros(dim_size, inputs.shape[1]).index_add(0, index, 3 * inputs)


class Mixed(Mixin, mtl.MultiTaskConv):
    pass


class Plain(mtl.MultiTaskConv):
    """Overrides nothing: stays fused."""


def test_subclasses_are_asked(any_backend: str) -> None:
    e, x = graph(), features(N, F)
    plain = conv(F, TASKS, aggr="sum", root_weight=False, bias=False)
    made = {}
    for kind in (Shifted, Doubled, Mixed, Plain):
        made[kind] = kind(F, TASKS, aggr="sum", root_weight=False, bias=False).double()
        made[kind].load_state_dict(plain.state_dict())
    shifted = torch.zeros_like(x).index_add(0, e[1], x[e[0]] - x[e[1]]) @ plain.weight.t()
    torch.testing.assert_close(made[Shifted].packed(x, e), shifted)
    torch.testing.assert_close(made[Doubled].packed(x, e), 2 * shifted)
    torch.testing.assert_close(made[Mixed].packed(x, e), 3 * plain.packed(x, e))
    assert [kind._plain for kind in (Shifted, Doubled, Mixed, Plain)] == [False, False, False, True]
    targets = features(N, F)
    torch.testing.assert_close(
        made[Shifted].packed((x, targets), e),
        torch.zeros_like(x).index_add(0, e[1], x[e[0]] - targets[e[1]]) @ plain.weight.t(),
    )
    own = conv(F, TASKS, aggr="sum", root_weight=False, bias=False)
    own.message = lambda x_j, edge_weight: 5 * x_j
    own.load_state_dict(plain.state_dict())
    torch.testing.assert_close(own.packed(x, e), 5 * plain.packed(x, e))


HOOKS = ("propagate_forward", "propagate_forward_pre", "message_forward", "message_forward_pre")
HOOKS += ("aggregate_forward", "aggregate_forward_pre")


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called(any_backend: str, kind: str) -> None:
    layer = conv(F, TASKS, aggr="sum", root_weight=False, bias=False)
    x = features(N, F)
    expected = layer.packed(x, graph())
    seen = []

    def hook(module: nn.Module, inputs: Any, output: Any = None) -> Any:
        seen.append(inputs)
        return None if output is None else 2 * output

    handle = getattr(layer, f"register_{kind}_hook")(hook)
    with_hook = layer.packed(x, graph())
    assert len(seen) == 1
    torch.testing.assert_close(with_hook, expected if kind.endswith("pre") else 2 * expected)
    handle.remove()
    torch.testing.assert_close(layer.packed(x, graph()), expected)
    assert len(seen) == 1


def test_decomposed_layers(any_backend: str) -> None:
    layer = conv(F, TASKS)
    x = features(N, F)
    expected = layer.packed(x, graph())
    layer.decomposed_layers = 3
    for fuse in (True, False):
        layer.fuse = fuse
        torch.testing.assert_close(layer.packed(x, graph()), expected)
    made = mtl.MultiTaskConv(F, TASKS, decomposed_layers=2)
    assert made.decomposed_layers == 2


@pytest.mark.parametrize("kind", ("sage", "gcn", "weighted", "max", "per task"))
def test_explained_by_edge_masks(any_backend: str, kind: str) -> None:
    layer = (
        conv(F, TASKS, normalize="gcn") if kind == "gcn" else conv(F, TASKS, aggr="max" if kind == "max" else "mean")
    )
    e = graph()
    e = e[:, e[0] != e[1]] if kind == "gcn" else e
    x = features(N, 3, F) if kind == "per task" else features(N, F)
    weight = torch.rand(e.shape[1], dtype=torch.float64) if kind == "weighted" else None
    expected = layer.packed(x, e, weight)
    mask = torch.ones(e.shape[1], dtype=torch.float64, requires_grad=True)
    set_masks(layer, mask, e, apply_sigmoid=False)
    masked = layer.packed(x, e, weight)
    torch.testing.assert_close(masked, expected)
    (gradient,) = torch.autograd.grad(masked.square().sum(), mask)
    assert gradient.abs().sum() > 0
    some = torch.rand(e.shape[1], dtype=torch.float64)
    set_masks(layer, some, e, apply_sigmoid=False)
    out = layer.packed(x, e, weight)
    for t, (task, single) in enumerate(layer.to_modules().items()):
        if weight is None:
            set_masks(single, some, e, apply_sigmoid=False)
            own = x[:, t].contiguous() if kind == "per task" else x
            torch.testing.assert_close(out[:, layer.slices[task]], single(own, e))
    clear_masks(layer)
    torch.testing.assert_close(layer.packed(x, e, weight), expected)


class Net(nn.Module):
    def __init__(self, task: str | None = None) -> None:
        super().__init__()
        self.first = SAGEConv(F, 8)
        self.second = mtl.MultiTaskConv(8, TASKS, return_packed=True)
        self.task = task

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out = self.second(self.first(x, edge_index).relu(), edge_index)
        return out if self.task is None else self.second.split(out)[self.task]


@pytest.mark.parametrize("task", ("subject", None))
def test_gnn_explainer(any_backend: str, task: str | None) -> None:
    model, x = Net(task), torch.randn(N, F)
    before = model(x, graph())
    explainer = Explainer(
        model,
        GNNExplainer(epochs=3),
        explanation_type="model",
        edge_mask_type="object",
        node_mask_type="attributes",
        model_config={"mode": "regression", "task_level": "node", "return_type": "raw"},
    )
    explanation = explainer(x, graph(), index=1)
    assert explanation.edge_mask.shape == (graph().shape[1],) and explanation.edge_mask.max() > 0
    torch.testing.assert_close(model(x, graph()), before)


# ---- Models of PyG.


def test_sequential(any_backend: str) -> None:
    towers = Sequential(
        "x, edge_index",
        [
            (GCNConv(F, 8), "x, edge_index -> x"),
            nn.ReLU(inplace=True),
            (mtl.MultiTaskConv(8, {"a": 4, "b": 4}), "x, edge_index -> x"),
            (mtl.MultiTaskConv({"a": 4, "b": 4}, {"a": 1, "b": 2}), "x, edge_index -> out"),
        ],
    )
    out = towers(torch.randn(N, F), EdgeIndex(graph(), sparse_size=(N, N)))
    assert {name: tuple(o.shape) for name, o in out.items()} == {"a": (N, 1), "b": (N, 2)}
    sum(o.square().mean() for o in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in towers.parameters())
    packed = Sequential(
        "x, edge_index",
        [
            (mtl.MultiTaskConv(F, {"a": 4, "b": 3}, return_packed=True), "x, edge_index -> x"),
            nn.ReLU(inplace=True),
            (mtl.MultiTaskConv({"a": 4, "b": 3}, {"a": 1, "b": 2}), "x, edge_index -> out"),
        ],
    )
    assert packed(torch.randn(N, F), graph())["b"].shape == (N, 2)


def hetero() -> HeteroData:
    data = HeteroData()
    data["paper"].x, data["author"].x = features(N, F), features(9, 4)
    data["author", "writes", "paper"].edge_index = torch.randint(0, 9, (2, 30))
    data["paper", "written", "author"].edge_index = torch.randint(0, 9, (2, 30))
    data["paper", "cites", "paper"].edge_index = graph()
    return data


@pytest.mark.parametrize("how", ("sum", "mean", "cat", "max"))
def test_hetero_conv(any_backend: str, how: str) -> None:
    data = hetero()
    layer = HeteroConv(
        {edge_type: mtl.MultiTaskConv((-1, -1), TASKS, return_packed=True) for edge_type in data.edge_types}, aggr=how
    ).double()
    out = layer(data.x_dict, data.edge_index_dict)
    width = 20 if how == "cat" else 10
    assert out["paper"].shape == (N, width) and out["author"].shape == (9, 10)
    singles = HeteroConv({t: SAGEConv((-1, -1), 7) for t in data.edge_types}, aggr="sum").double()
    singles(data.x_dict, data.edge_index_dict)
    for edge_type in data.edge_types:
        single = layer.convs[edge_type].to_modules()["subject"]
        singles.convs[edge_type].load_state_dict(single.state_dict())
    if how == "sum":
        torch.testing.assert_close(out["paper"][:, :7], singles(data.x_dict, data.edge_index_dict)["paper"])


def test_gcn_refuses_two_kinds_of_nodes() -> None:
    with pytest.raises(ValueError, match="'add_self_loops' attribute set to 'True'"):
        HeteroConv({("a", "to", "b"): mtl.MultiTaskConv(F, TASKS, normalize="gcn"), ("b", "to", "a"): SAGEConv(F, 2)})


def test_to_hetero(any_backend: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = mtl.MultiTaskConv((-1, -1), {"a": 4, "b": 4}, return_packed=True)
            self.second = mtl.MultiTaskConv((-1, -1), TASKS, return_packed=True)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.second(self.first(x, edge_index).relu(), edge_index)

    data = hetero()
    model = to_hetero(Model(), data.metadata(), aggr="sum").double()
    with torch.no_grad():
        model(data.x_dict, data.edge_index_dict)
    out = model(data.x_dict, data.edge_index_dict)
    assert out["paper"].shape == (N, 10) and out["author"].shape == (9, 10)
    sum(o.square().mean() for o in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sampled_subgraphs(any_backend: str) -> None:
    """Seeds first, and each hop's nodes and edges behind those before: what a NeighborLoader gives."""
    layers = [conv(F, {"a": 4, "b": 2}, return_packed=True), conv(6, TASKS, return_packed=True)]
    x = features(6, F)
    edge_index = torch.tensor([[1, 2, 3, 4, 5, 5], [0, 0, 1, 1, 2, 2]])
    whole, trimmed, edges = x, x, edge_index
    for i, layer in enumerate(layers):
        whole = layer(whole, edge_index)
        trimmed, edges, _ = trim_to_layer(i, [1, 2, 3], [2, 4], trimmed, edges)
        trimmed = layer(trimmed, edges)
    torch.testing.assert_close(trimmed[:1], whole[:1])
    # An EdgeIndex that was narrowed is another one.
    kept = EdgeIndex(edge_index, sparse_size=(6, 6))
    layers[0](x, kept)
    trimmed, edges, _ = trim_to_layer(1, [1, 2, 3], [2, 4], layers[0](x, kept), kept)
    torch.testing.assert_close(layers[1](trimmed, edges)[:1], whole[:1])


@pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("pyg_lib", "torch_sparse")),
    reason="NeighborLoader samples with pyg-lib or torch-sparse, and none is installed",
)
@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without a 'pyg-lib' installation:UserWarning")
def test_neighbor_loader(any_backend: str) -> None:
    """Mini-batches of two layers, as SAGEConv computes them; pyg-lib's tell what each layer still needs."""
    data = Data(x=features(N, F), edge_index=graph())
    singles = [SAGEConv(F, 6).double(), SAGEConv(6, 3).double()]
    layers = [mtl.MultiTaskConv.from_modules({"a": single}) for single in singles]
    for batch in NeighborLoader(data, [3, 3], batch_size=4):
        got, expected, edges = batch.x, batch.x, batch.edge_index
        own = edges
        for i, (layer, single) in enumerate(zip(layers, singles, strict=True)):
            if "num_sampled_nodes" in batch:
                sampled = (batch.num_sampled_nodes, batch.num_sampled_edges)
                expected, own, _ = trim_to_layer(i, *sampled, expected, own)
                got, edges, _ = trim_to_layer(i, *sampled, got, edges)
            got, expected = layer(got, edges)["a"], single(expected, own)
        torch.testing.assert_close(got[: batch.batch_size], expected[: batch.batch_size])


def test_it_is_a_message_passing_layer() -> None:
    layer = mtl.MultiTaskConv(F, TASKS, flow="target_to_source")
    assert isinstance(layer, MessagePassing) and layer.flow == "target_to_source"


def test_compiles_with_pyg_layers(any_backend: str) -> None:
    torch._dynamo.reset()
    model, x = Net(), torch.randn(N, F)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, graph()), model(x, graph()))
        smaller = graph(9, 20)
        torch.testing.assert_close(compiled(x[:9], smaller), model(x[:9], smaller))


@pytest.mark.parametrize("kind", ("median", "weighted max", "hooks"))
def test_the_way_over_messages_compiles(any_backend: str, kind: str) -> None:
    torch._dynamo.reset()
    layer = conv(F, TASKS, aggr="median" if kind == "median" else "max")
    weight = torch.rand(graph().shape[1], dtype=torch.float64) if kind == "weighted max" else None
    x = features(N, F)
    if kind == "hooks":  # as in PyG, a compiled layer has none
        layer.register_message_forward_hook(lambda module, inputs, output: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer.packed, backend="aot_eager")
        torch.testing.assert_close(compiled(x, graph(), weight), layer.packed(x, graph(), weight))


# ---- In programs.


@pytest.mark.parametrize("kind", ("tensor", "EdgeIndex", "per task", "gcn", "weighted", "bipartite"))
def test_compiles_to_one_graph(any_backend: str, kind: str) -> None:
    torch._dynamo.reset()
    layer = conv(F, TASKS, **({"normalize": "gcn"} if kind == "gcn" else {}))
    edge_index: Any = EdgeIndex(graph(), sparse_size=(N, N)) if kind == "EdgeIndex" else graph()
    x = features(N, 3, F) if kind == "per task" else features(N, F)
    weight = torch.rand(graph().shape[1], dtype=torch.float64) if kind in ("weighted", "gcn") else None

    def run(x: Tensor, edge_index: Any, weight: Tensor | None) -> Tensor:
        given_as: Any = (x, x[:N]) if kind == "bipartite" else x
        return sum(o.sin().sum() for o in layer(given_as, edge_index, weight).values())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        x.requires_grad_()
        gradients = torch.autograd.grad(compiled(x, edge_index, weight), (x, *layer.parameters()))
    for a, b in zip(gradients, torch.autograd.grad(run(x, edge_index, weight), (x, *layer.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(any_backend: str) -> None:
    for options in ({"aggr": "mean"}, {"aggr": "max"}, {"normalize": "gcn"}, {"aggr": "median"}):
        layer = mtl.MultiTaskConv(F, TASKS, **options)
        x, weight = torch.randn(N, F), torch.rand(graph().shape[1])
        weighted = options.get("aggr") != "max"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x, graph(), weight if weighted else None)
            again = layer(x.bfloat16(), graph(), weight if weighted else None)
        assert all(o.dtype == torch.bfloat16 for o in (*out.values(), *again.values()))
        sum(o.float().sum() for o in out.values()).backward()
        assert layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(
            out["subject"].float(), layer(x, graph(), weight if weighted else None)["subject"], rtol=0.05, atol=0.05
        )


def test_batched_gradients_and_checkpoints(any_backend: str) -> None:
    layer = conv(F, TASKS)
    x = features(N, F).requires_grad_()
    losses = torch.stack([o.square().mean() for o in layer(x, graph()).values()])
    inputs = (x, *layer.parameters())
    eye = torch.eye(3, dtype=torch.float64)
    batched = torch.autograd.grad(losses, inputs, eye, is_grads_batched=True, retain_graph=True)
    for t in range(3):
        for all_of, one in zip(batched, torch.autograd.grad(losses[t], inputs, retain_graph=True), strict=True):
            torch.testing.assert_close(all_of[t], one)
    out = torch.utils.checkpoint.checkpoint(lambda x: layer(x, graph())["toxic"], x, use_reentrant=False)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(layer(x, graph())["toxic"].sum(), x)[0]
    )


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c.lin_l.register_forward_hook(lambda m, i, o: o * 2),
            ValueError,
            r"modules\['a'\].lin_l: .*without hooks",
        ),
        (
            lambda c: c.lin_r.register_forward_pre_hook(lambda m, i: i),
            ValueError,
            r"modules\['a'\].lin_r: .*without hooks",
        ),
        (lambda c: setattr(c, "lin_l", DoubledLinear(6, 3)), TypeError, r"modules\['a'\].lin_l: .*got DoubledLinear"),
        (lambda c: setattr(c, "lin_l", nn.Sequential(nn.Linear(6, 3))), TypeError, r"lin_l: .*got Sequential"),
        (lambda c: nn.utils.parametrizations.weight_norm(c.lin_l), TypeError, r"lin_l: .*got Parametrized"),
    ],
)
def test_layers_within_that_compute_something_else(change: Any, error: type[Exception], message: str) -> None:
    layer = SAGEConv(6, 3)
    change(layer)
    with pytest.raises(error, match=message):
        mtl.MultiTaskConv.from_modules({"a": layer})
