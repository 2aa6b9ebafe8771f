"""MultiTaskConv: against one PyG layer per task, on both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate
from conv_common import TASKS, adj_t, assert_same_training, formats, graph, without_duplicates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv, GraphConv, SAGEConv

import torch_mtl_pyg as mtl

N, M, F = 17, 11, 6
EMPTY = torch.empty(2, 0, dtype=torch.int64)
GRAPHS = {"random": (N, graph(N)), "without edges": (N, EMPTY), "without nodes": (0, EMPTY), "one node": (1, EMPTY)}


def conv(*args: Any, **kwargs: Any) -> mtl.MultiTaskConv:
    return mtl.MultiTaskConv(*args, **kwargs).double()


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- One layer per task.


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("aggr", ("mean", "sum", "add", "max", "min"))
@pytest.mark.parametrize(("root_weight", "bias"), [(True, True), (False, True), (True, False)])
def test_equals_one_sage_per_task(any_backend: str, name: str, aggr: str, root_weight: bool, bias: bool) -> None:
    n, edge_index = GRAPHS[name]
    layer = conv(F, TASKS, aggr=aggr, root_weight=root_weight, bias=bias)
    assert_same_training(layer, layer.to_modules(), features(n, F), edge_index)
    assert all(type(single) is SAGEConv for single in layer.to_modules().values())


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("weighted", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_equals_one_gcn_per_task(any_backend: str, name: str, weighted: bool, bias: bool) -> None:
    n, edge_index = GRAPHS[name]
    layer = conv(F, TASKS, normalize="gcn", bias=bias)
    assert layer.aggr == "sum" and layer.weight_root is None
    weight = torch.rand(edge_index.shape[1], dtype=torch.float64) if weighted else None
    assert_same_training(layer, layer.to_modules(), features(n, F), edge_index, weight)
    assert all(type(single) is GCNConv for single in layer.to_modules().values())


@pytest.mark.parametrize("aggr", ("sum", "mean"))
def test_equals_one_graph_conv_per_task(any_backend: str, aggr: str) -> None:
    """Weighted edges: the mean divides by their number."""
    layer = conv(F, TASKS, aggr=aggr)
    edge_index = graph()
    x, weight = features(N, F), torch.randn(edge_index.shape[1], dtype=torch.float64)
    singles = layer.to_modules()
    for name in TASKS:
        single = GraphConv(F, layer.tasks[name].out_channels, aggr=aggr).double()
        single.lin_rel, single.lin_root = singles[name].lin_l, singles[name].lin_r
        torch.testing.assert_close(layer(x, edge_index, weight)[name], single(x, edge_index, weight))
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: layer.packed(x, edge_index, w), inputs)


@pytest.mark.parametrize("root_weight", (True, False))
@pytest.mark.parametrize("aggr", ("mean", "sum", "max"))
def test_explicit_options_hold_with_gcn_too(any_backend: str, aggr: str, root_weight: bool) -> None:
    layer = conv(F, {"a": 2}, aggr=aggr, root_weight=root_weight, normalize="gcn")
    assert layer.aggr == aggr and layer.root_weight == root_weight
    x, edge_index = features(N, F), graph()
    single = GCNConv(F, F, bias=False, aggr=aggr).double()
    single.lin.weight = nn.Parameter(torch.eye(F, dtype=torch.float64))
    expected = single(x, edge_index) @ layer.weight.t() + layer.bias
    if root_weight:
        expected = expected + x @ layer.weight_root.t()
    torch.testing.assert_close(layer(x, edge_index)["a"], expected)


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=40),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from(("mean", "sum", "max", "min", "gcn")),
    st.booleans(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_graph(
    any_backend: str, n: int, pairs: list[tuple[int, int]], widths: list[int], aggr: str, as_edge_index: bool
) -> None:
    e = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous() % n
    tasks = {f"t{i}": width for i, width in enumerate(widths)}
    layer = conv(3, tasks, normalize="gcn") if aggr == "gcn" else conv(3, tasks, aggr=aggr)
    # Few different values, so that maxima are shared.
    x = torch.randint(-2, 3, (n, 3)).double()
    if aggr in ("max", "min"):
        x = x + 0.5  # PyG counts the zero it starts from as one more that attains the maximum
    assert_same_training(layer, layer.to_modules(), x, EdgeIndex(e, sparse_size=(n, n)) if as_edge_index else e)


def test_a_maximum_of_zero_is_shared_by_the_edges_alone(any_backend: str) -> None:
    layer = conv(1, {"a": 1}, aggr="max", root_weight=False)
    x = torch.tensor([[0.0], [0.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    out = layer(x, torch.tensor([[0, 1, 2], [0, 0, 0]]))["a"][0]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient.flatten(), layer.weight[0, 0].detach() * torch.tensor([0.5, 0.5, 0]).double())


def test_nan_is_passed_on(any_backend: str) -> None:
    for aggr in ("mean", "max"):
        layer = conv(2, {"a": 1}, aggr=aggr, root_weight=False)
        x = features(3, 2)
        x[0, 0] = float("nan")
        out = layer(x, torch.tensor([[0, 1, 2], [1, 1, 2]]))["a"][:, 0]
        assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aggr", ("mean", "sum", "max", "gcn"))
def test_every_dtype(any_backend: str, dtype: torch.dtype, aggr: str) -> None:
    options: dict[str, Any] = {"normalize": "gcn"} if aggr == "gcn" else {"aggr": aggr}
    layer = mtl.MultiTaskConv(50, TASKS, **options).to(dtype)
    x, edge_index = torch.randn(N, 50).to(dtype), graph()
    with torch.no_grad():
        packed = layer.packed(x, edge_index)
        assert packed.dtype == dtype
        exact = conv(50, TASKS, **options)
        exact.load_state_dict(layer.state_dict())
        positive = conv(50, TASKS, **options)
        positive.load_state_dict({name: value.abs() for name, value in layer.state_dict().items()})
        same = torch.cat([single(x, edge_index) for single in layer.to_modules().values()], dim=1)
        magnitude = positive.packed(x.double().abs(), edge_index)
        if aggr == "max":
            magnitude = magnitude + x.double().abs().max() * positive.weight.sum(1)
        # In 16 bits, the weights of the edges and the aggregated features may be rounded on the way.
        assert_accurate(packed, exact.packed(x.double(), edge_index), magnitude, same, 2 * magnitude)


def test_second_derivatives(any_backend: str) -> None:
    edge_index = without_duplicates(graph(6, 8))
    for options in ({"aggr": "mean"}, {"aggr": "sum"}, {"normalize": "gcn"}, {"aggr": "max"}):
        layer = conv(3, {"a": 2, "b": 1}, **options)
        names = [name for name, _ in layer.named_parameters()]
        weight = None if options.get("aggr") == "max" else torch.rand(edge_index.shape[1], dtype=torch.float64) + 0.5

        def run(
            x: Tensor, *rest: Any, layer: Any = layer, names: Any = names, weighted: bool = weight is not None
        ) -> Any:
            w = rest[-1] if weighted else None
            parameters = dict(zip(names, rest, strict=False))
            return tuple(torch.func.functional_call(layer, parameters, (x, edge_index, w)).values())

        inputs = [features(6, 3), *layer.parameters()] + ([] if weight is None else [weight])
        leaves = tuple(t.detach().requires_grad_() for t in inputs)
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


def test_initial_values_are_those_of_the_single_layers() -> None:
    for options in ({"aggr": "mean"}, {"normalize": "gcn"}, {"bias": False}):
        layer = mtl.MultiTaskConv(30, TASKS, **options)
        singles = layer.to_modules()
        torch.manual_seed(4)
        layer.reset_parameters()
        torch.manual_seed(4)
        for single in singles.values():
            single.reset_parameters()
        again = mtl.MultiTaskConv.from_modules(singles)
        for (name, mine), (_, theirs) in zip(layer.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(mine, theirs), name
    made = mtl.MultiTaskConv(30, TASKS)
    assert 0 < made.weight.abs().max() <= 30**-0.5 and 0 < made.bias.abs().max() <= 30**-0.5


# ---- Formats of the graph, and of the features.


@pytest.mark.parametrize("name", formats(without_duplicates(graph()), N))
@pytest.mark.parametrize("aggr", ("mean", "sum", "max", "gcn", "median"))
@pytest.mark.parametrize("fuse", (True, False))
def test_every_format_gives_the_same(any_backend: str, name: str, aggr: str, fuse: bool) -> None:
    edge_index = without_duplicates(graph())
    if aggr == "gcn":  # to loops that are there, PyG adds others in matrices alone
        edge_index = edge_index[:, edge_index[0] != edge_index[1]].contiguous()
    layer = conv(F, TASKS, normalize="gcn") if aggr == "gcn" else conv(F, TASKS, aggr=aggr)
    x = features(N, F)
    expected = layer.packed(x, edge_index)
    layer.fuse = fuse
    torch.testing.assert_close(layer.packed(x, formats(edge_index, N)[name]), expected)


@pytest.mark.parametrize("name", ("csr", "coo", "csc"))
@pytest.mark.parametrize("aggr", ("mean", "sum", "max", "gcn"))
def test_values_of_a_matrix_are_weights(any_backend: str, name: str, aggr: str) -> None:
    edge_index = without_duplicates(graph())
    weight = torch.rand(edge_index.shape[1], dtype=torch.float64) + 0.5
    dense = adj_t(edge_index, N, weight)
    matrix = {"csr": dense.to_sparse_csr, "coo": dense.to_sparse_coo, "csc": dense.to_sparse_csc}[name]()
    x = features(N, F)
    if aggr == "gcn":
        layer = conv(F, TASKS, normalize="gcn")
        for task, single in layer.to_modules().items():  # of CSC, PyG makes nothing
            torch.testing.assert_close(layer(x, matrix)[task], single(x, dense.to_sparse_csr()))
        return
    layer = conv(F, TASKS, aggr=aggr)
    torch.testing.assert_close(layer.packed(x, matrix), layer.packed(x, edge_index, weight))
    with pytest.raises(ValueError, match="edge_weight: expected None, since the values of edge_index are the weights"):
        layer(x, matrix, weight)


def test_gradients_of_the_values_of_a_matrix(any_backend: str) -> None:
    edge_index = without_duplicates(graph())
    weight = torch.rand(edge_index.shape[1], dtype=torch.float64, requires_grad=True)
    x = features(N, F)
    for options in ({"aggr": "mean"}, {"normalize": "gcn"}):
        layer = conv(F, TASKS, **options)
        no_loops = edge_index[:, edge_index[0] != edge_index[1]]
        w = weight[: no_loops.shape[1]]
        matrix = torch.sparse_coo_tensor(no_loops.flip(0), w, (N, N), check_invariants=True)
        (a,) = torch.autograd.grad(layer.packed(x, matrix).sin().sum(), weight)
        (b,) = torch.autograd.grad(layer.packed(x, no_loops, w).sin().sum(), weight)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("aggr", ("mean", "sum", "max"))
@pytest.mark.parametrize("root_weight", (True, False))
def test_bipartite(any_backend: str, aggr: str, root_weight: bool) -> None:
    edge_index = graph(N, num_dst=M)
    x = (features(N, F), features(M, 4))
    layer = conv((F, 4), TASKS, aggr=aggr, root_weight=root_weight)
    singles = layer.to_modules()
    for size in (None, (N, M), (None, M)):
        assert_same_training(layer, singles, x, edge_index, size=None if size is None else (N, M))
        out = layer(x, edge_index, size=size)
        assert out["toxic"].shape == (M, 1)
    for given_as in formats(without_duplicates(edge_index), N, M).values():
        expected = layer.packed(x, without_duplicates(edge_index))
        torch.testing.assert_close(layer.packed(x, given_as), expected)
        torch.testing.assert_close(layer.packed(list(x), given_as), expected)
    for task, single in singles.items():
        mine = layer((x[0], None), edge_index, size=(N, M))[task]
        assert mine.shape[0] == M
        torch.testing.assert_close(mine, single((x[0], None), edge_index, size=(N, M)))
    matrix = adj_t(without_duplicates(edge_index), N, num_dst=M).to_sparse_csr()
    assert layer.packed((x[0], None), matrix).shape == (M, 10)
    assert layer.packed((x[0], None), EdgeIndex(edge_index, sparse_size=(N, M))).shape == (M, 10)


def test_bipartite_sides_without_nodes(any_backend: str) -> None:
    layer = conv((F, 4), TASKS)
    assert layer((features(0, F), features(M, 4)), EMPTY)["degree"].shape == (M, 2)
    assert layer((features(N, F), features(0, 4)), EMPTY)["degree"].shape == (0, 2)
    assert layer((features(N, F), None), EMPTY, size=(N, 0))["degree"].shape == (0, 2)


@pytest.mark.parametrize("fuse", (True, False))
def test_flow_from_target_to_source(any_backend: str, fuse: bool) -> None:
    edge_index = graph()
    x, weight = features(N, F), torch.rand(edge_index.shape[1], dtype=torch.float64)
    for options in ({"aggr": "mean"}, {"normalize": "gcn"}):
        layer = conv(F, TASKS, flow="target_to_source", **options)
        layer.fuse = fuse
        assert layer.to_modules()["toxic"].flow == "target_to_source"
        w = weight if "normalize" in options else None
        assert_same_training(layer, layer.to_modules(), x, edge_index, w)
        back = EdgeIndex(edge_index.flip(0).contiguous())
        forward = conv(F, TASKS, **options)
        forward.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer.packed(x, edge_index, weight), forward.packed(x, back, weight))
    # Of a pair, the first sends, whatever the flow.
    edges = graph(N, num_dst=M)
    pair = (features(N, F), features(M, 4))
    layer, forward = conv((F, 4), TASKS, flow="target_to_source"), conv((F, 4), TASKS)
    layer.fuse = fuse
    forward.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.packed(pair, edges.flip(0)), forward.packed(pair, edges))
    expected = forward.packed((pair[0], None), edges, size=(N, M))
    torch.testing.assert_close(layer.packed((pair[0], None), edges.flip(0), size=(N, M)), expected)
    back = EdgeIndex(edges.flip(0).contiguous(), sparse_size=(M, N))
    torch.testing.assert_close(layer.packed((pair[0], None), back), expected)
    other = (features(N, F), features(N, 4))
    for name, single in layer.to_modules().items():  # in PyG, both must be as many
        torch.testing.assert_close(layer(other, edge_index)[name], single(other, edge_index))


# ---- Every task with features of its own.


@pytest.mark.parametrize("aggr", ("mean", "max", "gcn", "median", ["mean", "max"]))
@pytest.mark.parametrize("fuse", (True, False))
def test_equal_widths_per_task(any_backend: str, aggr: Any, fuse: bool) -> None:
    options: dict[str, Any] = {"normalize": "gcn"} if aggr == "gcn" else {"aggr": aggr}
    layer = conv(F, TASKS, **options)
    layer.fuse = fuse
    edge_index, x = graph(), features(N, 3, F)
    singles = layer.to_modules()
    expected = torch.cat([s(x[:, t].contiguous(), edge_index) for t, s in enumerate(singles.values())], dim=1)
    torch.testing.assert_close(layer.packed(x, edge_index), expected)
    as_dict = {name: x[:, t] for t, name in enumerate(TASKS)}
    torch.testing.assert_close(layer.packed(as_dict, edge_index), expected)
    torch.testing.assert_close(layer.packed(dict(reversed(as_dict.items())), edge_index), expected)
    torch.testing.assert_close(layer.packed(x.transpose(0, 1).contiguous().transpose(0, 1), edge_index), expected)
    shared = x[:, 0].contiguous()
    torch.testing.assert_close(
        layer.packed(shared.unsqueeze(1).expand(-1, 3, -1), edge_index), layer.packed(shared, edge_index)
    )


WIDTHS = {"subject": 5, "toxic": 3, "degree": 8}


@pytest.mark.parametrize("aggr", ("mean", "sum", "max", "gcn", "median", ["mean", "max"]))
@pytest.mark.parametrize("fuse", (True, False))
def test_different_widths_per_task(any_backend: str, aggr: Any, fuse: bool) -> None:
    options: dict[str, Any] = {"normalize": "gcn"} if aggr == "gcn" else {"aggr": aggr}
    layer = conv(dict(reversed(WIDTHS.items())), TASKS, **options)
    layer.fuse = fuse
    edge_index = graph()
    x = {name: features(N, width).requires_grad_() for name, width in WIDTHS.items()}
    singles = layer.to_modules()
    out = layer(x, edge_index)
    expected = {name: singles[name](x[name], edge_index) for name in TASKS}
    for name in TASKS:
        torch.testing.assert_close(out[name], expected[name])
    mine = torch.autograd.grad(sum(o.sin().sum() for o in out.values()), [*x.values()])
    theirs = torch.autograd.grad(sum(o.sin().sum() for o in expected.values()), [*x.values()])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    packed = torch.cat([x[name] for name in TASKS], dim=1)
    torch.testing.assert_close(layer.packed(packed, edge_index), torch.cat(list(out.values()), dim=1))


def test_pairs_per_task(any_backend: str) -> None:
    edge_index = graph(N, num_dst=M)
    sources = {name: features(N, width) for name, width in WIDTHS.items()}
    targets = features(M, 3, 4)
    own = {name: targets[:, t] for t, name in enumerate(TASKS)}
    layer = conv((WIDTHS, 4), TASKS)
    for fuse in (True, False):
        layer.fuse = fuse
        out = layer((sources, targets), edge_index)
        for name, single in layer.to_modules().items():
            torch.testing.assert_close(out[name], single((sources[name], own[name]), edge_index))
        # Sources of their own meet targets that all share, and the other way round.
        shared = layer((sources, targets[:, 0].contiguous()), edge_index)
        for name, single in layer.to_modules().items():
            torch.testing.assert_close(shared[name], single((sources[name], targets[:, 0]), edge_index))
        torch.testing.assert_close(
            layer((sources, None), edge_index, size=(N, M))["toxic"],
            layer.to_modules()["toxic"]((sources["toxic"], None), edge_index, size=(N, M)),
        )
    other = conv((F, WIDTHS), TASKS)
    roots = {name: features(M, width) for name, width in WIDTHS.items()}
    x = features(N, F)
    for name, single in other.to_modules().items():
        torch.testing.assert_close(other((x, roots), edge_index)[name], single((x, roots[name]), edge_index))


def test_towers(any_backend: str) -> None:
    """Layers stack, each task's features meeting its own weights only; nothing is copied between them."""
    first = conv(F, {"a": 4, "b": 4})
    second = conv(4, {"a": 3, "b": 5})
    third = conv({"a": 3, "b": 5}, {"a": 1, "b": 2})
    edge_index, x = EdgeIndex(graph()), features(N, F).requires_grad_()
    out = third(second(first(x, edge_index), edge_index), edge_index)
    for name in ("a", "b"):
        layers = [layer.to_modules()[name] for layer in (first, second, third)]
        expected = x
        for layer in layers:
            expected = layer(expected, edge_index)
        torch.testing.assert_close(out[name], expected)
        (a,) = torch.autograd.grad(out[name].sum(), x, retain_graph=True)
        torch.testing.assert_close(a, torch.autograd.grad(expected.sum(), x)[0])
    (only_a,) = torch.autograd.grad(out["a"].sum(), second.weight)
    assert not only_a[second.slices["b"]].any() and only_a[second.slices["a"]].any()


def test_views_of_one_buffer_are_not_copied(any_backend: str) -> None:
    from torch_mtl_pyg.nn.features import read_features

    layer = conv(F, {"a": 4, "b": 1, "c": 4})
    out = layer(features(N, F), graph())
    pointers = {o.untyped_storage().data_ptr() for o in out.values()}
    assert len(pointers) == 1 and all(o.stride() == (9, 1) for o in out.values())
    channels = {"a": 4, "b": 1, "c": 4}
    for given_as in (out, {name: o.detach() for name, o in out.items()}):
        packed, widths = read_features("x", given_as, channels, layer.layout)
        assert packed.data_ptr() == out["a"].data_ptr() and packed.shape == (N, 9) and widths == (4, 1, 4)
    parts = {name: o.detach().requires_grad_() for name, o in out.items()}
    packed, _ = read_features("x", parts, channels, layer.layout)
    gradients = torch.autograd.grad((packed * packed).sum(), list(parts.values()))
    for part, gradient in zip(parts.values(), gradients, strict=True):
        torch.testing.assert_close(gradient, 2 * part)
    for other in ({**out, "b": out["b"].clone()}, {**out, "a": out["c"], "c": out["a"]}, {**out, "a": out["c"]}):
        packed, _ = read_features("x", other, channels, layer.layout)
        assert packed.data_ptr() != out["a"].data_ptr()
        assert torch.equal(packed, torch.cat([other[name] for name in channels], dim=1))
    x = features(N, 3, F)
    assert read_features("x", x, F, layer.layout).packed.data_ptr() == x.data_ptr()
