"""MultiTaskConv: its parameters, exchange with single layers, saving, and bad input."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from conv_common import TASKS, adj_t, graph, without_duplicates
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv, GraphConv, SAGEConv

import torch_mtl_pyg as mtl

N, F = 17, 6
E = graph()


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


def test_parameters() -> None:
    assert shapes(mtl.MultiTaskConv(F, TASKS)) == {"weight": (10, F), "weight_root": (10, F), "bias": (10,)}
    assert shapes(mtl.MultiTaskConv((F, 4), TASKS, bias=False)) == {"weight": (10, F), "weight_root": (10, 4)}
    assert shapes(mtl.MultiTaskConv(F, TASKS, normalize="gcn")) == {"weight": (10, F), "bias": (10,)}
    assert shapes(mtl.MultiTaskConv({"b": 3, "a": 2}, {"a": 4, "b": 5}, root_weight=False)) == {
        "weight.0": (4, 2), "weight.1": (5, 3), "bias": (9,),
    }  # fmt: skip
    layer = mtl.MultiTaskConv(F, TASKS)
    assert dict(layer.slices) == {"subject": slice(0, 7), "toxic": slice(7, 8), "degree": slice(8, 10)}
    assert layer.in_channels == F and layer.out_channels == 10 and layer.tasks["degree"].loss == "mse"
    assert mtl.MultiTaskConv((F, 4), TASKS).in_channels == (F, 4)
    assert layer.aggr == "mean" and layer.root_weight
    packed = layer.packed(torch.randn(N, F), E)
    parts = layer.split(packed)
    assert all(torch.equal(parts[name], packed[:, rows]) for name, rows in layer.slices.items())
    assert mtl.MultiTaskConv(F, TASKS, return_packed=True)(torch.randn(N, F), E).shape == (N, 10)


def test_repr() -> None:
    assert repr(mtl.MultiTaskConv(F, TASKS)) == (
        "MultiTaskConv(6, out_channels={subject: 7, toxic: 1, degree: 2}, aggr=mean, root_weight=True, bias=True)"
    )
    assert repr(mtl.MultiTaskConv({"a": 3}, {"a": 2}, normalize="gcn", bias=False)) == (
        "MultiTaskConv({'a': 3}, out_channels={a: 2}, aggr=sum, root_weight=False, normalize=gcn, bias=False)"
    )


@pytest.mark.parametrize("options", ({}, {"normalize": "gcn"}, {"aggr": ["mean", "max"]}, {"aggr": "median"}), ids=str)
def test_copies_and_pickles(options: dict[str, Any]) -> None:
    layer = mtl.MultiTaskConv(F, TASKS, **options)
    x, e = torch.randn(N, F), EdgeIndex(E, sparse_size=(N, N))
    expected = layer.packed(x, e)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other.packed(x, e), expected) and repr(other) == repr(layer)
    assert layer.double().packed(x.double(), E).dtype == torch.float64


def test_state_dict_carries_the_names() -> None:
    layer = mtl.MultiTaskConv(F, {"a": 2, "b": 2})
    other = mtl.MultiTaskConv(F, {"a": 2, "b": 2})
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    swapped = mtl.MultiTaskConv(F, {"b": 2, "a": 2})
    with pytest.raises(
        RuntimeError, match=r"tasks: expected \[\('b', 2\), \('a', 2\)\] \(name, width\), got \[\('a', 2\)"
    ):
        swapped.load_state_dict(layer.state_dict())
    model, wrong = nn.Sequential(layer), nn.Sequential(swapped)
    with pytest.raises(RuntimeError, match=r"0\.tasks: expected"):
        wrong.load_state_dict(model.state_dict())
    per_task = mtl.MultiTaskConv({"a": 3, "b": 4}, {"a": 2, "b": 2})
    again = mtl.MultiTaskConv({"a": 3, "b": 4}, {"a": 2, "b": 2})
    again.load_state_dict(per_task.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), per_task.parameters(), strict=True))
    assert set(per_task.state_dict()) == {"weight.0", "weight.1", "weight_root.0", "weight_root.1", "bias"}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        mtl.MultiTaskConv(4, {"a": 2, "b": 2}).load_state_dict(layer.state_dict())


# ---- Sizes found at the first call.


@pytest.mark.parametrize("options", ({}, {"normalize": "gcn"}, {"bias": False}, {"aggr": ["mean", "sum"]}), ids=str)
def test_lazy(options: dict[str, Any]) -> None:
    lazy = mtl.MultiTaskConv(-1, TASKS, **options)
    assert isinstance(lazy.weight, UninitializedParameter) and lazy.in_channels == -1
    copied = copy.deepcopy(lazy)
    lazy.reset_parameters()
    x = torch.randn(N, F)
    torch.manual_seed(1)
    out = lazy.packed(x, E)
    assert lazy.in_channels == F and type(lazy.weight) is nn.Parameter
    torch.manual_seed(1)
    assert torch.equal(copied.packed(x, E), out)
    known = mtl.MultiTaskConv(F, TASKS, **options)
    known.load_state_dict(lazy.state_dict())
    torch.testing.assert_close(known.packed(x, E), out)
    assert lazy.weight.abs().max() > 0


def test_lazy_of_two_kinds() -> None:
    x = (torch.randn(N, F), torch.randn(N, 4))
    for given in (-1, (-1, -1), (F, -1), (-1, 4)):
        layer = mtl.MultiTaskConv(given, TASKS)
        assert layer((x[0], None), E, size=(N, N))["toxic"].shape == (N, 1)
        assert layer(x, E)["toxic"].shape == (N, 1)
        assert layer.in_channels == (F, 4) and layer.weight_root.shape == (10, 4)
        assert layer(x, E)["toxic"].shape == (N, 1)
    layer = mtl.MultiTaskConv(-1, TASKS)
    assert layer(torch.randn(N, 3, 5), E)["toxic"].shape == (N, 1) and layer.in_channels == 5
    with pytest.raises(ValueError, match=r"x\['toxic'\]: expected shape \[17, 5\], got \[17, 4\]"):
        mtl.MultiTaskConv(-1, TASKS)({"subject": x[0][:, :5], "toxic": x[1], "degree": x[1]}, E)


@pytest.mark.parametrize("aggr", ("mean", ["mean", "max"]))
def test_lazy_state(aggr: Any) -> None:
    known, lazy = mtl.MultiTaskConv(F, TASKS, aggr=aggr), mtl.MultiTaskConv(-1, TASKS, aggr=aggr)
    saved = mtl.MultiTaskConv(-1, TASKS, aggr=aggr).state_dict()
    assert isinstance(saved["weight"], UninitializedParameter)
    lazy.load_state_dict(known.state_dict())
    assert lazy.in_channels == F
    x = torch.randn(N, F)
    torch.testing.assert_close(lazy.packed(x, E), known.packed(x, E))
    known.load_state_dict(saved)
    assert isinstance(known.weight, UninitializedParameter) and known.in_channels == -1
    assert known.packed(torch.randn(N, 3), E).shape == (N, 10) and known.in_channels == 3
    with pytest.raises(ValueError, match="expected a layer whose parameters have a shape, got a lazy one"):
        mtl.MultiTaskConv(-1, TASKS).to_modules()


# ---- Single layers.


def made(kind: str) -> dict[str, Any]:
    return {
        "sage": lambda: {"a": SAGEConv(F, 3), "b": SAGEConv(F, 1)},
        "max": lambda: {"a": SAGEConv(F, 3, "max"), "b": SAGEConv(F, 1, "max")},
        "no root": lambda: {"a": SAGEConv(F, 3, root_weight=False), "b": SAGEConv(F, 1, root_weight=False)},
        "no bias": lambda: {"a": SAGEConv(F, 3, bias=False), "b": SAGEConv(F, 1, bias=False)},
        "bipartite": lambda: {"a": SAGEConv((F, F), 3), "b": SAGEConv((F, F), 1)},
        "backwards": lambda: {
            "a": SAGEConv(F, 3, flow="target_to_source"),
            "b": SAGEConv(F, 1, flow="target_to_source"),
        },
        "gcn": lambda: {"a": GCNConv(F, 3), "b": GCNConv(F, 1)},
        "gcn without bias": lambda: {"a": GCNConv(F, 3, bias=False), "b": GCNConv(F, 1, bias=False)},
        "was lazy": lambda: {"a": SAGEConv(-1, 3), "b": SAGEConv((-1, -1), 1)},
        "median": lambda: {"a": SAGEConv(F, 3, "median")},
    }[kind]()


KINDS = ("sage", "max", "no root", "no bias", "bipartite", "backwards", "gcn", "gcn without bias", "was lazy", "median")


@pytest.mark.parametrize("kind", KINDS)
def test_from_and_to_modules(kind: str) -> None:
    singles, x = made(kind), torch.randn(N, F)
    expected = {name: single(x, E) for name, single in singles.items()}
    state = torch.random.get_rng_state()
    layer = mtl.MultiTaskConv.from_modules(singles)
    back = layer.to_modules()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, single in singles.items():
        torch.testing.assert_close(layer(x, E)[name], expected[name])
        assert type(back[name]) is type(single)
        torch.testing.assert_close(back[name](x, E), expected[name])
        saved = back[name].state_dict()
        assert all(torch.equal(saved[key], value) for key, value in single.state_dict().items())
    again = mtl.MultiTaskConv.from_modules(nn.ModuleDict(back))
    assert repr(again) == repr(layer)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))


def test_modules_of_different_sizes_and_states() -> None:
    singles = {"a": SAGEConv(F, 3), "b": SAGEConv((4, 5), 1)}
    layer = mtl.MultiTaskConv.from_modules(singles)
    assert layer.in_channels == ({"a": F, "b": 4}, {"a": F, "b": 5})
    x = ({"a": torch.randn(N, F), "b": torch.randn(N, 4)}, {"a": torch.randn(N, F), "b": torch.randn(N, 5)})
    for name, single in singles.items():
        torch.testing.assert_close(layer(x, E)[name], single((x[0][name], x[1][name]), E))
    frozen = {name: single.eval().requires_grad_(False).double() for name, single in made("sage").items()}
    layer = mtl.MultiTaskConv.from_modules(frozen)
    assert not layer.training and not any(p.requires_grad for p in layer.parameters())
    assert layer.weight.dtype == torch.float64
    back = layer.to_modules()["a"]
    assert not back.training and not back.lin_l.weight.requires_grad


def test_learnt_aggregations_are_copied() -> None:
    layer = mtl.MultiTaskConv(F, {"a": 2}, aggr="softmax", aggr_kwargs={"learn": True})
    with torch.no_grad():
        layer.aggr_module.t.fill_(3.0)
    single, x = layer.to_modules()["a"], torch.randn(N, F)
    assert single.aggr_module.t.item() == 3.0 and single.aggr_module is not layer.aggr_module
    torch.testing.assert_close(single(x, E), layer(x, E)["a"])


class Mine(SAGEConv):
    pass


def hooked() -> SAGEConv:
    layer = SAGEConv(F, 2)
    layer.register_message_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({}, ValueError, "modules: expected at least one, got none"),
        ([SAGEConv(F, 1)], TypeError, "modules: expected a dict from task to layer, got list"),
        ({"a": nn.Linear(F, 1)}, TypeError, r"modules\['a'\]: expected a SAGEConv or a GCNConv, got Linear"),
        ({"a": Mine(F, 1)}, TypeError, r"modules\['a'\]: expected a SAGEConv or a GCNConv, got Mine"),
        ({"a": GraphConv(F, 1)}, TypeError, "expected a SAGEConv or a GCNConv, got GraphConv"),
        ({"a": SAGEConv(F, 1), "b": GCNConv(F, 1)}, TypeError, r"modules\['b'\]: expected a SAGEConv, .* got GCNConv"),
        ({"a": SAGEConv(F, 1, project=True)}, ValueError, r"modules\['a'\]: expected project=False, got True"),
        ({"a": SAGEConv(F, 1, normalize=True)}, ValueError, r"modules\['a'\]: expected normalize=False, got True"),
        (
            {"a": SAGEConv(F, 1, aggr="softmax")},
            ValueError,
            r"modules\['a'\]: expected aggr to be one of .* got softmax",
        ),
        ({"a": SAGEConv(F, 1, aggr=["mean", "max"])}, ValueError, r"expected aggr to be one of"),
        ({"a": GCNConv(F, 1, improved=True)}, ValueError, r"modules\['a'\]: expected improved=False, got True"),
        ({"a": GCNConv(F, 1, cached=True)}, ValueError, r"modules\['a'\]: expected cached=False, got True"),
        ({"a": GCNConv(F, 1, normalize=False)}, ValueError, r"modules\['a'\]: expected normalize=True, got False"),
        ({"a": GCNConv(F, 1, add_self_loops=False)}, ValueError, r"expected add_self_loops=True, got False"),
        ({"a": GCNConv(F, 1, aggr="mean")}, ValueError, r"expected aggr='add' of a GCNConv, got 'mean'"),
        ({"a": SAGEConv(-1, 1)}, ValueError, r"modules\['a'\]: expected an initialised layer, got a lazy one"),
        ({"a": hooked()}, ValueError, r"modules\['a'\]: expected a layer without hooks, got one with hooks"),
        ({"a": SAGEConv(F, 1), "b": SAGEConv(F, 1, "max")}, ValueError, r"'b'\]: expected aggr='mean', .* got 'max'"),
        (
            {"a": SAGEConv(F, 1), "b": SAGEConv(F, 1, flow="target_to_source")},
            ValueError,
            r"modules\['b'\]: expected flow='source_to_target', as modules\['a'\] has, got 'target_to_source'",
        ),
        (
            {"a": SAGEConv(F, 1), "b": SAGEConv(F, 1, root_weight=False)},
            ValueError,
            r"modules\['b'\]: expected root_weight=True, as modules\['a'\] has, got False",
        ),
        (
            {"a": SAGEConv(F, 1), "b": SAGEConv(F, 1, bias=False)},
            ValueError,
            r"modules\['b'\]: expected a bias, as modules\['a'\] has one",
        ),
        ({"a": SAGEConv(F, 1), "b": SAGEConv(F, 1).double()}, TypeError, r"'b'\]: expected dtype torch.float32, got"),
        ({"a": SAGEConv(F, 1), "b": SAGEConv(F, 1).eval()}, ValueError, r"'b'\]: expected training=True, .* got False"),
        ({"a": SAGEConv(F, 1), "b": SAGEConv(F, 1).to("meta")}, ValueError, r"'b'\]: expected device cpu, got meta"),
        (
            {"a": SAGEConv(F, 1), "b": SAGEConv(F, 1).requires_grad_(False)},
            ValueError,
            r"modules\['b'\]: expected requires_grad=True of its weight, got False",
        ),
    ],
)
def test_bad_modules(modules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskConv.from_modules(modules)


def test_no_gcn_with_a_root() -> None:
    for options in ({"root_weight": True}, {"aggr": "mean"}):
        with pytest.raises(
            ValueError, match="to_modules: expected root_weight=False and aggr='sum' with normalize='gcn'"
        ):
            mtl.MultiTaskConv(F, TASKS, normalize="gcn", **options).to_modules()


# ---- Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels: expected at least 1, or -1 .* got 0"),
        ({"in_channels": 2.0}, TypeError, "in_channels: expected an int, got float"),
        ({"in_channels": (F, 0)}, ValueError, r"in_channels\[1\]: expected at least 1, or -1 .* got 0"),
        ({"in_channels": (F, F, F)}, ValueError, r"in_channels: expected one number or a pair, got \(6, 6, 6\)"),
        ({"in_channels": {"a": F}}, ValueError, r"in_channels: expected the tasks 'a', 'b', got \['a'\]"),
        ({"in_channels": {"a": F, "b": -1}}, ValueError, r"in_channels\['b'\]: expected at least 1, got -1"),
        ({"in_channels": {"a": F, "b": "c"}}, TypeError, r"in_channels\['b'\]: expected an int, got str"),
        ({"out_channels": {}}, ValueError, "out_channels: expected at least one task, got an empty dict"),
        ({"out_channels": 3}, TypeError, "out_channels: expected a dict from name to Task or int, got int"),
        ({"out_channels": {"a": 0}}, ValueError, r"out_channels\['a'\]: out_channels: expected at least 1, got 0"),
        ({"normalize": True}, ValueError, "normalize: expected None or 'gcn', got True"),
        ({"root_weight": 1}, TypeError, "root_weight: expected a bool, got int"),
        ({"bias": None}, TypeError, "bias: expected a bool, got NoneType"),
        ({"return_packed": "yes"}, TypeError, "return_packed: expected a bool, got str"),
        ({"node_dim": 1}, ValueError, "node_dim: expected -2, rows being nodes, got 1"),
        ({"aggr": "nonsense"}, ValueError, "nonsense"),
        ({"flow": "up"}, ValueError, "flow"),
        ({"improved": True}, TypeError, "improved"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskConv(**{"in_channels": F, "out_channels": {"a": 2, "b": 1}, **arguments})


X = torch.randn(N, F)
A, B = torch.randn(N, 4), torch.randn(N, 5)
W = torch.rand(E.shape[1])
SHARED, OWN = {"in_channels": F}, {"in_channels": {"a": 4, "b": 5}}
CSR = adj_t(without_duplicates(E), N).float().to_sparse_csr()


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "message"),
    [
        (SHARED, (X[:, :5], E), ValueError, r"x: expected shape [N, 6] (or [N, 2, 6], a matrix per task), got [17, 5]"),
        (SHARED, (X[0], E), ValueError, "x: expected shape [N, 6]"),
        (SHARED, (X.double(), E), TypeError, "x: expected the dtype of weight, torch.float32, got torch.float64"),
        (SHARED, (X.long(), E), TypeError, "x: expected one of the dtypes"),
        (SHARED, (None, E), TypeError, "x: expected a tensor or a dict from task to tensor, got NoneType"),
        (SHARED, (X.to("meta"), E), ValueError, "x: expected the device of weight, cpu, got meta"),
        (SHARED, (X, E.to("meta")), ValueError, "edge_index: expected the device of x, cpu, got meta"),
        (SHARED, ((X, X.double()), E), TypeError, "x[1]: expected the dtype of weight_root, torch.float32, got"),
        (OWN, (torch.randn(N, 9).double(), E), TypeError, "x: expected the dtype of weight, torch.float32, got"),
        (SHARED, (torch.randn(N, 3, F), E), ValueError, "x: expected shape [N, 6] (or [N, 2, 6]"),
        (SHARED, (torch.randn(N, 2, 5), E), ValueError, "x: expected shape [N, 6] (or [N, 2, 6]"),
        (SHARED, ((X,), E), ValueError, "x: expected features or a pair of them, got 1"),
        (SHARED, ((X, X[:, :5]), E), ValueError, "x[1]: expected shape [N, 6]"),
        (SHARED, ((None, X), E), TypeError, "x[0]: expected a tensor or a dict from task to tensor, got NoneType"),
        (SHARED, ({"a": X}, E), ValueError, "x: expected the tasks 'a', 'b', got ['a']"),
        (SHARED, ({"a": X, "b": X[:5]}, E), ValueError, "x['b']: expected shape [17, 6], got [5, 6]"),
        (SHARED, ({"a": X, "b": X.double()}, E), TypeError, "x['b']: expected the dtype of x['a']"),
        (SHARED, ({"a": X, "b": 3}, E), TypeError, "x['b']: expected a tensor [N, 6], got int"),
        (OWN, (X, E), ValueError, "x: expected shape [N, 9], the tasks' [4, 5] side by side, got [17, 6]"),
        (OWN, ({"a": B, "b": A}, E), ValueError, "x['a']: expected shape [17, 4], got [17, 5]"),
        (OWN, (torch.randn(N, 2, 4), E), ValueError, "x: expected shape [N, 9]"),
        (SHARED, (X, E + 1), IndexError, "edge_index: expected every source in [0, 17)"),
        (SHARED, (X, E.float()), TypeError, "edge_index: expected int64 indices, got torch.float32"),
        (SHARED, (X, E.t()), ValueError, "edge_index: expected shape [2, E]"),
        (SHARED, (X, None), TypeError, "edge_index: expected a tensor [2, E], an EdgeIndex or a sparse matrix"),
        (
            SHARED,
            (X[:9], CSR),
            ValueError,
            "edge_index: expected a sparse matrix [N_dst, N_src] = [9, 9], got [17, 17]",
        ),
        (
            SHARED,
            (X, CSR.double()),
            TypeError,
            "edge_weight: expected the dtype of x, torch.float32, got torch.float64",
        ),
        (SHARED, (X, CSR, W), ValueError, "edge_weight: expected None, since the values of edge_index are the weights"),
        (SHARED, (X, E, W[:-1]), ValueError, "edge_weight: expected shape [83], one weight per edge, got [82]"),
        (SHARED, (X, E, W[:, None]), ValueError, "edge_weight: expected shape [E], got [83, 1]"),
        (SHARED, (X, E, W.double()), TypeError, "edge_weight: expected the dtype of x"),
        (SHARED, (X, E, W.long()), TypeError, "edge_weight: expected one of the dtypes"),
        (SHARED, (X, E, 1.0), TypeError, "edge_weight: expected a tensor [E], got float"),
        (SHARED, (X, E, None, (N, 5)), ValueError, "size: expected (17, 17), the rows of x, got (17, 5)"),
        (SHARED, ((X, None), E, None, (5, N)), ValueError, "size: expected (17, 17), the rows of x, got (5, 17)"),
        (SHARED, (X, E, None, 17), ValueError, "size: expected a pair of numbers of nodes, got 17"),
        ({"in_channels": F, "normalize": "gcn"}, ((X, X), E), ValueError, "x: expected one set of features with"),
    ],
)
@pytest.mark.parametrize("fuse", (True, False))
def test_bad_input(
    any_backend: str, layer: dict[str, Any], arguments: Any, error: type[Exception], message: str, fuse: bool
) -> None:
    made = mtl.MultiTaskConv(out_channels={"a": 2, "b": 1}, **layer)
    made.fuse = fuse
    with pytest.raises(error, match=re.escape(message)):
        made(*arguments)


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        (torch.zeros(3, 9), ValueError, r"packed: expected shape \[N, 10\], got \[3, 9\]"),
        (torch.zeros(10), ValueError, r"packed: expected shape \[N, 10\], got \[10\]"),
        ([], TypeError, r"packed: expected a tensor \[N, 10\], got list"),
    ],
)
def test_bad_split(packed: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskConv(F, TASKS).split(packed)
