"""MultiTaskHeads with hidden layers: conversion, editing, freezing, saving, training."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from heads_common import TASKS, train_step
from mlp_cases import ACTS
from mlp_oracle import MODULES
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE, Linear

import torch_mtl_pyg as mtl

HIDDEN = ((1,), (5,), (33, 7), (16, 8, 4))
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.3, amsgrad=True),
}


def mlp(d: int, hidden: Any, width: int, act: str = "relu", dropout: float = 0.0, bias: bool = True,
        linear: Any = nn.Linear) -> nn.Sequential:  # fmt: skip
    """A head as one writes it."""
    parts: list[nn.Module] = []
    for units in hidden:
        parts += [linear(d, units, bias=bias), MODULES[act]()]
        if dropout:
            parts.append(nn.Dropout(dropout))
        d = units
    return nn.Sequential(*parts, linear(d, width, bias=bias))


def mlps(hidden: Any, **options: Any) -> dict[str, nn.Sequential]:
    return {name: mlp(6, hidden, t if isinstance(t, int) else t.out_channels, **options) for name, t in TASKS.items()}


def of_head(heads: mtl.MultiTaskHeads, name: str, attribute: str = "data") -> list[Tensor]:
    """A head's rows of all layers; or, with ``attribute="grad"``, their gradients."""
    rows = []
    for layer in range(heads.depth):
        for parameter in heads.layer_names(layer):
            if getattr(heads, parameter) is not None:
                rows.append(getattr(getattr(heads, parameter), attribute)[heads.rows_of(layer, name)].clone())
    return rows


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- What they are.


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_shapes_and_names(hidden: tuple[int, ...], bias: bool) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS, hidden_channels=list(hidden), act="gelu", dropout=0.25, bias=bias)
    expected = {}
    before = 6
    for layer, units in enumerate(hidden):
        expected[f"hidden_weight_{layer}"] = (4 * units, before)
        if bias:
            expected[f"hidden_bias_{layer}"] = (4 * units,)
        before = units
    expected["weight"] = (14, before)
    if bias:
        expected["bias"] = (14,)
    assert {name: tuple(p.shape) for name, p in heads.named_parameters()} == expected
    assert list(heads.state_dict()) == list(expected)
    assert heads.depth == len(hidden) + 1 and heads.hidden_channels == hidden and heads.out_channels == 14
    assert f"hidden_channels={list(hidden)}, act='gelu', dropout=0.25, bias={bias}" in repr(heads)
    for name, p in heads.named_parameters():
        bound = {"hidden_weight_0": 6, "hidden_bias_0": 6}.get(name) or (*hidden, before)[int(name[-1]) - 1 if name.startswith("hidden") else -1]  # fmt: skip  # noqa: E501
        assert p.abs().max() <= bound**-0.5


def test_one_width_is_one_layer() -> None:
    assert mtl.MultiTaskHeads(6, {"a": 2}, hidden_channels=5).hidden_channels == (5,)
    assert mtl.MultiTaskHeads(6, {"a": 2}, hidden_channels=(5, 3)).hidden_channels == (5, 3)
    assert mtl.MultiTaskHeads(6, {"a": 2}).hidden_channels == ()


def test_initial_values_are_those_of_linear() -> None:
    heads = mtl.MultiTaskHeads(100, {"a": 300, "b": 300}, hidden_channels=[400, 25])
    for layer, inputs in enumerate((100, 400, 25)):
        for name in heads.layer_names(layer):
            bound = inputs**-0.5
            p = getattr(heads, name)
            assert p.abs().max() <= bound and float(p.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    before = [p.clone() for p in heads.parameters()]
    heads.reset_parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, heads.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_channels": 0}, ValueError, "hidden_channels: expected widths of at least 1, got 0"),
        ({"hidden_channels": [4, -1]}, ValueError, "hidden_channels: expected widths of at least 1, got -1"),
        ({"hidden_channels": []}, ValueError, "hidden_channels: expected None or at least one width"),
        ({"hidden_channels": 4.0}, TypeError, "hidden_channels: expected an int, got float"),
        ({"hidden_channels": "4"}, TypeError, "hidden_channels: expected an int, got str"),
        ({"hidden_channels": True}, TypeError, "hidden_channels: expected an int, got bool"),
        ({"hidden_channels": [4, 2.5]}, TypeError, r"hidden_channels\[1\]: expected an int, got float"),
        (
            {"act": "softplus"},
            ValueError,
            "act: expected one of relu, gelu, silu, tanh, elu for hidden layers, got 'so",
        ),
        ({"act": "nonsense"}, ValueError, "act: expected the name of an activation, got 'nonsense'"),
        ({"act": nn.ReLU()}, TypeError, "act: expected the name of an activation, got ReLU"),
        ({"act": None}, TypeError, "act: expected the name of an activation, got NoneType"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads(**{"in_channels": 8, "tasks": {"a": 1}, "hidden_channels": 3, **arguments})


@pytest.mark.parametrize(("act", "name"), (("ReLU", "relu"), ("swish", "silu"), ("GELU", "gelu"), ("Tanh", "tanh")))
def test_names_that_pyg_knows(act: str, name: str) -> None:
    assert mtl.MultiTaskHeads(8, {"a": 1}, hidden_channels=3, act=act).act == name


# ---- Conversion.


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_modules_there_and_back(any_backend: str, act: str, hidden: tuple[int, ...]) -> None:
    for bias in (True, False):
        mods = {name: m.double() for name, m in mlps(hidden, act=act, dropout=0.3, bias=bias).items()}
        state = torch.get_rng_state()
        heads = mtl.MultiTaskHeads.from_modules(mods)
        back = heads.to_modules()
        assert torch.equal(torch.get_rng_state(), state)  # draws no random numbers
        assert (heads.act, heads.dropout, heads.hidden_channels, heads.training) == (act, 0.3, hidden, True)
        assert (heads.bias is not None) == bias and heads.weight.dtype == torch.float64
        for name, module in mods.items():
            assert repr(back[name]) == repr(module)
            assert all(torch.equal(a, b) for a, b in zip(module.parameters(), back[name].parameters(), strict=True))
            for p in back[name].parameters():
                assert p.is_contiguous() and all(p.data_ptr() != q.data_ptr() for q in heads.parameters())
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        for m in mods.values():
            m.eval()
        out = heads.eval()(x)
        for name, module in mods.items():
            torch.testing.assert_close(out[name], module(x))
            torch.testing.assert_close(heads(x, task=name), module(x))
            assert not heads.to_modules()[name].training
        heads.train(), [m.train() for m in mods.values()]
        heads.dropout = 0.0
        (got,) = torch.autograd.grad(heads.packed(x).sin().sum(), x)
        plain = {name: mlp_without_dropout(m) for name, m in mods.items()}
        (expected,) = torch.autograd.grad(sum(m(x).sin().sum() for m in plain.values()), x)
        torch.testing.assert_close(got, expected)


def mlp_without_dropout(module: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(part for part in module if not isinstance(part, nn.Dropout)))


def test_what_else_converts() -> None:
    listed = mtl.MultiTaskHeads.from_modules(nn.ModuleList(mlps((5,)).values()))
    assert list(listed.tasks) == ["0", "1", "2", "3"] and listed.dropout == 0.0
    pyg = mtl.MultiTaskHeads.from_modules(nn.ModuleDict({"a": mlp(6, (5, 3), 2, "elu", linear=Linear)}))
    assert pyg.act == "elu" and pyg.hidden_channels == (5, 3)
    with_identity = nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.SiLU(), nn.Identity(), nn.Linear(4, 2))
    assert mtl.MultiTaskHeads.from_modules({"a": with_identity}).act == "silu"
    single = mtl.MultiTaskHeads.from_modules({"a": nn.Sequential(nn.Linear(6, 2))})
    assert single.hidden_channels == () and isinstance(single.to_modules()["a"], nn.Linear)
    half = mtl.MultiTaskHeads.from_modules({"a": mlp(6, (5,), 2).bfloat16()})
    assert half.hidden_weight_0.dtype == half.weight.dtype == torch.bfloat16
    evaluating = mtl.MultiTaskHeads.from_modules({"a": mlp(6, (5,), 2).eval()})
    assert not evaluating.training


def test_frozen_modules_stay_frozen() -> None:
    mods = mlps((5, 3))
    mods["toxic"].requires_grad_(False)
    heads = mtl.MultiTaskHeads.from_modules(mods)
    assert heads.frozen == {"toxic"}
    back = heads.to_modules()
    assert not any(p.requires_grad for p in back["toxic"].parameters())
    assert all(p.requires_grad for p in back["other"].parameters())


def changed(change: Any) -> dict[str, nn.Module]:
    good = {"a": mlp(6, (5, 4), 2, "relu", 0.2), "b": mlp(6, (5, 4), 3, "relu", 0.2)}
    result = change(good["b"])
    return {"a": good["a"], "b": good["b"] if result is None else result}


def with_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def without_gradient(parameter: nn.Parameter) -> None:
    parameter.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: mlp(6, (5,), 3, "relu", 0.2), ValueError, r"modules\['b'\]: expected 3 layers.*got 2"),
        (lambda m: mlp(6, (5, 4), 3, "gelu", 0.2), ValueError, "activation 'relu'.*got 3, 'gelu'"),
        (lambda m: mlp(6, (5, 4), 3, "relu", 0.3), ValueError, r"dropout 0.2.*0.3"),
        (lambda m: mlp(6, (5, 4), 3, "relu"), ValueError, r"dropout 0.2.*0.0"),
        (lambda m: mlp(6, (5, 3), 3, "relu", 0.2), ValueError, r"modules\['b'\]: expected 4 units in layer 1.*got 3"),
        (lambda m: mlp(7, (5, 4), 3, "relu", 0.2), ValueError, r"modules\['b'\]: expected 6 inputs.*got 7"),
        (lambda m: mlp(6, (5, 4), 3, "relu", 0.2, bias=False), ValueError, r"modules\['b'\]: expected a bias"),
        (lambda m: m.double(), TypeError, r"modules\['b'\]: expected dtype torch.float32, got torch.float64"),
        (lambda m: m.to("meta"), ValueError, r"modules\['b'\]: expected device"),
        (lambda m: nn.Linear(6, 3), ValueError, r"modules\['b'\]: expected 3 layers.*got 1"),
        (lambda m: nn.Sequential(*m[:-1]), ValueError, "begins and ends with a linear layer"),
        (lambda m: nn.Sequential(nn.ReLU(), *m), ValueError, "begins and ends with a linear layer"),
        (lambda m: nn.Sequential(), ValueError, "begins and ends with a linear layer"),
        (lambda m: nn.Sequential(m[0], m[3], m[6]), TypeError, "expected an activation.*got nothing"),
        (lambda m: nn.Sequential(m[0], nn.Dropout(), nn.ReLU(), *m[3:]), TypeError, "expected an activation"),
        (lambda m: nn.Sequential(m[0], nn.BatchNorm1d(5), *m[1:]), TypeError, "got BatchNorm1d, ReLU, Dropout"),
        (lambda m: nn.Sequential(m[0], nn.Softplus(), m[2], *m[3:]), TypeError, "expected one of relu, gelu.*Softplus"),
        (lambda m: nn.Sequential(m[0], nn.GELU("tanh"), *m[2:]), TypeError, "expected one of relu.*GELU"),
        (lambda m: nn.Sequential(m[0], nn.ELU(0.5), *m[2:]), TypeError, "expected one of relu.*ELU"),
        (lambda m: nn.Sequential(m[0], nn.GELU(), *m[2:]), ValueError, "same activation and dropout everywhere"),
        (lambda m: nn.Sequential(m[0], nn.ReLU(), nn.Dropout(0.9), *m[3:]), ValueError, "dropout everywhere"),
        (lambda m: nn.Sequential(m[0], nn.ReLU(), nn.AlphaDropout(0.2), *m[3:]), TypeError, "got ReLU, AlphaDropout"),
        (lambda m: with_hook(m), ValueError, r"modules\['b'\]: expected a module without hooks"),
        (lambda m: with_hook(m[0]), ValueError, r"modules\['b'\]: expected a layer without hooks"),
        (lambda m: with_hook(m[1]), TypeError, "without hooks"),
        (lambda m: with_hook(m[2]), TypeError, "without hooks"),
        (lambda m: without_gradient(m[3].bias), ValueError, "weight and bias both trainable or both frozen"),
        (lambda m: m[3].requires_grad_(False) and None, ValueError, "all layers trainable or all frozen, got both"),
        (lambda m: nn.ModuleList(m), TypeError, r"modules\['b'\]: expected a linear layer"),
    ],
)
def test_modules_that_do_not_fit(change: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads.from_modules(changed(change))


def test_a_bias_in_some_layers_only() -> None:
    mixed = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"modules\['a'\]: expected a bias in all layers or in none, got both"):
        mtl.MultiTaskHeads.from_modules({"a": mixed})


# ---- Editing.


def test_adding_and_removing_leaves_the_others_alone(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 4], act="silu")
    x = torch.randn(9, 6)
    before = {name: (out.detach().clone(), of_head(heads, name)) for name, out in heads(x).items()}
    heads.add_task("new", mtl.Task(3, loss="mse"))
    heads.remove_task("toxic")
    assert list(heads.tasks) == ["subject", "degree", "other", "new"]
    assert heads.hidden_weight_0.shape == (20, 6) and heads.hidden_weight_1.shape == (16, 5)
    after = heads(x)
    for name in ("subject", "degree", "other"):
        assert same(of_head(heads, name), before[name][1])
        torch.testing.assert_close(after[name], before[name][0])
    for layer, inputs in enumerate((6, 5, 4)):
        fresh = of_head(heads, "new")[2 * layer]
        assert fresh.abs().max() <= inputs**-0.5 and fresh.std() > 0.2 * inputs**-0.5
    heads.remove_task("new")
    heads.add_task("wide", 30)
    assert heads(x)["wide"].shape == (9, 30)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_goes_on(any_backend: str, make: Any) -> None:
    """Editing heads midway gives the heads that stay the values they would have had."""
    x = torch.randn(9, 6, dtype=torch.float64)
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3, "c": 1}, hidden_channels=[5, 4], act="tanh").double()
    alone = mtl.MultiTaskHeads.from_modules({k: v for k, v in heads.to_modules().items() if k != "b"})
    optimizers = [make(m.parameters()) for m in (heads, alone)]
    for _ in range(3):
        train_step(heads, optimizers[0], x)
        train_step(alone, optimizers[1], x)
    heads.remove_task("b", optimizer=optimizers[0])
    heads.add_task("d", 4, optimizer=optimizers[0])
    added = of_head(heads, "d")
    for _ in range(3):
        train_step(heads, optimizers[0], x)
        train_step(alone, optimizers[1], x)
    for name in ("a", "c"):
        for ours, theirs in zip(of_head(heads, name), of_head(alone, name), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not any(torch.equal(a, b) for a, b in zip(added, of_head(heads, "d"), strict=True))
    assert {id(p) for p in heads.parameters()} == {id(p) for p in optimizers[0].param_groups[0]["params"]}
    with pytest.raises(ValueError, match="optimizer: expected one that holds"):
        heads.add_task("e", 1, optimizer=optimizers[1])
    partial = make([p for name, p in heads.named_parameters() if name != "hidden_bias_1"])
    with pytest.raises(ValueError, match="optimizer: expected one that holds hidden_bias_1"):
        heads.add_task("e", 1, optimizer=partial)
    assert list(heads.tasks) == ["a", "c", "d"] and heads.hidden_weight_0.shape == (15, 6)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_heads_do_not_move(any_backend: str, make: Any) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3, "c": 1}, hidden_channels=[5, 4], act="gelu")
    optimizer = make(heads.parameters())
    x = torch.randn(9, 6, requires_grad=True)
    for _ in range(2):
        train_step(heads, optimizer, x)  # so that there is momentum
    heads.freeze("a", "c")
    before = {name: of_head(heads, name) for name in heads.tasks}
    for model in (heads, copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        own = optimizer if model is heads else make(model.parameters())
        assert model.frozen == {"a", "c"}
        x.grad = None
        for _ in range(3):
            train_step(model, own, x)
        for name in model.tasks:
            assert same(of_head(model, name), before[name]) == (name != "b"), name
        assert not any(g.any() for g in of_head(model, "a", "grad")) and x.grad.any()
        assert all(g.any() for g in of_head(model, "b", "grad"))
    alone = heads.to_modules()["a"].requires_grad_(False)
    (got,) = torch.autograd.grad(heads(x)["a"].sum(), x)  # the embedding still gets the frozen heads' gradients
    (expected,) = torch.autograd.grad(alone(x).sum(), x)
    torch.testing.assert_close(got, expected)
    heads.unfreeze("a")
    train_step(heads, optimizer, x)
    assert not same(of_head(heads, "a"), before["a"]) and same(of_head(heads, "c"), before["c"])
    optimizer = make(heads.parameters())
    heads.remove_task("a", optimizer=optimizer)
    heads.add_task("d", 2, optimizer=optimizer)
    train_step(heads, optimizer, x)
    assert heads.frozen == {"c"} and same(of_head(heads, "c"), before["c"])


def test_a_layer_computed_from_others_cannot_be_frozen() -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3}, hidden_channels=5)
    normed = nn.utils.parametrizations.weight_norm(heads, "hidden_weight_0")
    with pytest.raises(ValueError, match="names: expected heads whose weight is a plain parameter"):
        normed.freeze("a")
    normed(torch.randn(3, 6))["a"].sum().backward()
    assert normed.parametrizations.hidden_weight_0.original0.grad is not None


# ---- Saving.


def test_state_dict_there_and_back(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 4], act="elu")
    heads.freeze("other")
    file = io.BytesIO()
    torch.save(heads.state_dict(), file)
    for weights_only in (True, False):
        file.seek(0)
        other = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 4], act="elu")
        other.load_state_dict(torch.load(file, weights_only=weights_only))
        x = torch.randn(4, 6)
        assert torch.equal(other.packed(x), heads.packed(x))
    permuted = mtl.MultiTaskHeads(6, dict(reversed(TASKS.items())), hidden_channels=[5, 4])
    with pytest.raises(RuntimeError, match=r"tasks: expected \[\('other', 5\), .* \(name, width\), got"):
        permuted.load_state_dict(heads.state_dict())
    deeper = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 4, 4])
    with pytest.raises(RuntimeError, match="hidden_weight_2"):
        deeper.load_state_dict(heads.state_dict())
    wider = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 3])
    with pytest.raises(RuntimeError, match="size mismatch for hidden_weight_1"):
        wider.load_state_dict(heads.state_dict())


def test_copies_compute_the_same(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS, hidden_channels=[5, 4], act="silu", dropout=0.5)
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert repr(other) == repr(heads)
        outputs = []
        for model in (heads, other):
            torch.manual_seed(3)
            outputs.append(model.packed(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("assign", (False, True))
def test_deferred_initialisation(any_backend: str, assign: bool) -> None:
    other = mtl.MultiTaskHeads(6, {"a": 3, "b": 1}, hidden_channels=5)
    with torch.device("meta"):
        heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1}, hidden_channels=5)
        assert heads(torch.empty(4, 6))["a"].shape == (4, 3)
    heads.freeze("a")
    if not assign:
        heads.to_empty(device="cpu")
    heads.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    x = torch.randn(4, 6)
    assert torch.equal(heads.packed(x), other.packed(x))
    train_step(heads, torch.optim.SGD(heads.parameters(), lr=0.1, weight_decay=0.1), x)
    assert same(of_head(heads, "a"), of_head(other, "a"))


# ---- In use.


def test_outputs_are_views_of_one_buffer(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS, hidden_channels=5)
    x = torch.randn(7, 6)
    out = heads(x)
    assert list(out) == list(TASKS)
    assert len({o.untyped_storage().data_ptr() for o in out.values()}) == 1
    assert all(o.stride() == (14, 1) for o in out.values())
    for i, name in enumerate(TASKS):
        torch.testing.assert_close(heads(x, task=name), out[name])
        assert torch.equal(heads(x, task=i), heads(x, task=name))


def test_a_model_trains_end_to_end(any_backend: str) -> None:
    x, edges = torch.randn(60, 12), torch.randint(0, 60, (2, 240))
    y = {"subject": torch.randint(0, 7, (60,)), "toxic": torch.rand(60).round(), "degree": torch.randn(60)}
    y["toxic"][::3] = torch.nan
    trunk = GraphSAGE(12, 32, 2)
    heads = mtl.MultiTaskHeads(32, TASKS, hidden_channels=[16], dropout=0.1)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01)
    totals = []
    for _ in range(60):
        optimizer.zero_grad()
        losses = heads.loss(trunk(x, edges), y)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.5 * totals[0]


def test_losses_are_those_of_the_outputs(any_backend: str) -> None:
    f = nn.functional
    tasks: dict[str, Any] = {**TASKS, "own": mtl.Task(2, lambda o, y: f.smooth_l1_loss(o, y))}
    heads = mtl.MultiTaskHeads(6, tasks, hidden_channels=[9, 5], act="gelu").double()
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    y = {"subject": torch.randint(0, 7, (30,)), "toxic": torch.rand(30).round().double(),
         "degree": torch.randn(30).double(), "own": torch.randn(30, 2).double()}  # fmt: skip
    losses = heads.loss(x, y, gramian=True)
    out = heads(x)
    expected = torch.stack(
        [
            f.cross_entropy(out["subject"], y["subject"], label_smoothing=0.1),
            f.binary_cross_entropy_with_logits(out["toxic"][:, 0], y["toxic"], pos_weight=torch.tensor(4.0)),
            f.huber_loss(out["degree"][:, 0], y["degree"]),
            x.new_zeros(()),
            f.smooth_l1_loss(out["own"], y["own"]),
        ]
    )
    torch.testing.assert_close(losses.per_task, expected)
    weights = torch.tensor([1, 1, 0.5, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(losses.total, weights @ expected)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: torch.stack([heads.loss(x, y)[name] for name in tasks]), x.detach()
    ).flatten(1)
    torch.testing.assert_close(losses.gramian, jacobian @ jacobian.t())
    again = torch.autograd.grad(weights @ expected, [x, *heads.parameters()])
    for a, b in zip(torch.autograd.grad(heads.loss(x, y).total, [x, *heads.parameters()]), again, strict=True):
        torch.testing.assert_close(a, b)
    for i, name in enumerate(y):
        place = list(tasks).index(name)
        one = heads.loss(x, y[name], task=name, gramian=True)
        torch.testing.assert_close(one[name], losses[name])
        torch.testing.assert_close(one.gramian[place, place], losses.gramian[place, place])
        assert one.count.nonzero().flatten().tolist() == [place], i


def test_threads_do_not_change_training(fused: None) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            heads = mtl.MultiTaskHeads(20, TASKS, hidden_channels=[24, 8], act="gelu", dropout=0.3)
            x = torch.randn(2000, 20, requires_grad=True)
            out = heads(x)
            torch.autograd.backward(list(out.values()), [torch.randn_like(o) for o in out.values()])
            results.append([x.grad, *(p.grad for p in heads.parameters())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
