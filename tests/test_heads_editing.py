"""MultiTaskHeads as a thing that changes: conversion, editing, freezing, saving."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from heads_common import TASKS, modules, train_step
from torch import nn
from torch.nn.utils import prune
from torch_geometric.nn import Linear

import torch_mtl_pyg as mtl

# ---- Conversion.


def test_modules_there_and_back() -> None:
    mods = modules(12, TASKS)
    heads = mtl.MultiTaskHeads.from_modules(mods)
    back = heads.to_modules()
    assert list(back) == list(mods)
    for name, module in mods.items():
        assert torch.equal(back[name].weight, module.weight) and torch.equal(back[name].bias, module.bias)
        assert back[name].weight.data_ptr() != heads.weight[heads.slices[name]].data_ptr()
    listed = mtl.MultiTaskHeads.from_modules(nn.ModuleList(mods.values()))
    assert list(listed.tasks) == ["0", "1", "2", "3"]
    assert torch.equal(listed.weight, heads.weight)
    of_dict = mtl.MultiTaskHeads.from_modules(
        nn.ModuleDict({"a": Linear(3, 2, bias=False), "b": nn.Linear(3, 4, False)})
    )
    assert of_dict.bias is None and list(of_dict.tasks) == ["a", "b"]
    half = mtl.MultiTaskHeads.from_modules({"a": nn.Linear(3, 2, dtype=torch.bfloat16)})
    assert half.weight.dtype == torch.bfloat16


def test_frozen_modules_stay_frozen() -> None:
    mods = modules(12, {"a": 2, "b": 3})
    mods["b"].requires_grad_(False)
    heads = mtl.MultiTaskHeads.from_modules(mods)
    assert heads.frozen == {"b"}
    assert not heads.to_modules()["b"].weight.requires_grad and heads.to_modules()["a"].weight.requires_grad


def half_frozen() -> nn.Linear:
    linear = nn.Linear(3, 1)
    linear.bias.requires_grad_(False)
    return linear


def hooked() -> nn.Linear:
    linear = nn.Linear(3, 1)
    linear.register_forward_hook(lambda module, inputs, output: output * 2)
    return linear


def test_conversion_draws_no_random_numbers() -> None:
    mods = modules(12, TASKS)
    before = torch.get_rng_state()
    mtl.MultiTaskHeads.from_modules(mods).to_modules()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("mods", "error", "message"),
    [
        ({}, ValueError, "modules: expected at least one, got none"),
        (3, TypeError, "modules: expected a dict or ModuleList, got int"),
        ({"a": nn.ReLU()}, TypeError, r"modules\['a'\]: expected a linear layer, got ReLU"),
        ({"a": nn.Linear(3, 1), "b": nn.Linear(4, 1)}, ValueError, r"modules\['b'\]: expected 3 inputs.*got 4"),
        ({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1, False)}, ValueError, r"modules\['b'\]: expected a bias"),
        ({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1).double()}, TypeError, r"modules\['b'\]: expected dtype"),
        ({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1, device="meta")}, ValueError, r"modules\['b'\]: expected device"),
        ({"a": nn.Linear(3, 1, dtype=torch.complex64)}, TypeError, r"modules\['a'\].weight: .*got complex64"),
        (
            {"a": nn.utils.parametrizations.weight_norm(nn.Linear(3, 1))},
            TypeError,
            r"modules\['a'\]: expected a linear",
        ),
        ({"a": half_frozen()}, ValueError, r"modules\['a'\]: expected weight and bias both trainable"),
        ({"a": hooked()}, ValueError, r"modules\['a'\]: expected a layer without hooks"),
        ({"a": Linear(-1, 1)}, ValueError, r"modules\['a'\]: expected an initialised layer, got a lazy one"),
    ],
)
def test_modules_that_do_not_fit(mods: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads.from_modules(mods)


# ---- Editing.


def test_adding_and_removing_leaves_the_others_alone(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS)
    x = torch.randn(9, 6)
    before = {name: out.detach().clone() for name, out in heads(x).items()}
    heads.add_task("new", mtl.Task(3, loss="mse"))
    heads.remove_task("toxic")
    assert list(heads.tasks) == ["subject", "degree", "other", "new"]
    assert heads.weight.shape == (16, 6) and heads.bias.shape == (16,)
    after = heads(x)
    assert all(torch.equal(after[name], before[name]) for name in ("subject", "degree", "other"))
    torch.testing.assert_close(heads(x, task=torch.full((9,), 3)), nn.functional.pad(after["new"], (0, 4)))
    for name in ("subject", "degree", "other"):
        heads.remove_task(name)
    with pytest.raises(ValueError, match="expected a task that is not the last one, got 'new'"):
        heads.remove_task("new")
    with pytest.raises(ValueError, match="name: expected one of 'new', got 'toxic'"):
        heads.remove_task("toxic")


def test_the_optimizer_goes_on(any_backend: str) -> None:
    """Editing heads midway must give the heads that stay the very values they would have had."""
    x = torch.randn(9, 6)
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3, "c": 1})
    alone = mtl.MultiTaskHeads.from_modules({k: v for k, v in heads.to_modules().items() if k != "b"})
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (heads, alone)]
    for _ in range(3):
        train_step(heads, optimizers[0], x)
        train_step(alone, optimizers[1], x)
    heads.remove_task("b", optimizer=optimizers[0])
    heads.add_task("d", 4, optimizer=optimizers[0])
    added = heads.weight[heads.slices["d"]].clone()
    for _ in range(3):
        train_step(heads, optimizers[0], x)
        train_step(alone, optimizers[1], x)
    for name in ("a", "c"):
        torch.testing.assert_close(heads.weight[heads.slices[name]], alone.weight[alone.slices[name]])
    assert not torch.equal(heads.weight[heads.slices["d"]], added)
    assert {id(p) for p in heads.parameters()} == {id(p) for p in optimizers[0].param_groups[0]["params"]}
    with pytest.raises(ValueError, match="optimizer: expected one that holds weight of these heads"):
        heads.add_task("e", 1, optimizer=optimizers[1])
    assert "e" not in heads.tasks


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
    ids=("AdamW", "SGD", "Adam", "RMSprop"),
)
def test_frozen_heads_do_not_move(any_backend: str, make: Any) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3, "c": 1})
    optimizer = make(heads.parameters())
    x = torch.randn(9, 6, requires_grad=True)
    for _ in range(2):
        train_step(heads, optimizer, x)  # so that there is momentum
    heads.freeze("a", "c")
    before = {name: (heads.weight[s].clone(), heads.bias[s].clone()) for name, s in heads.slices.items()}
    for model in (heads, copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        own = optimizer if model is heads else make(model.parameters())
        x.grad = None
        for _ in range(3):
            train_step(model, own, x)
        for name, rows in model.slices.items():
            same = torch.equal(model.weight[rows], before[name][0]) and torch.equal(model.bias[rows], before[name][1])
            assert same == (name != "b"), name
        assert not model.weight.grad[model.slices["a"]].any() and not model.bias.grad[model.slices["c"]].any()
        assert model.weight.grad[model.slices["b"]].any() and x.grad.any()
    # The embedding still gets the frozen heads' gradients.
    (gx,) = torch.autograd.grad(heads(x)["a"].sum(), x)
    torch.testing.assert_close(gx, heads.weight[heads.slices["a"]].sum(0).expand(9, 6))
    heads.unfreeze("a")
    assert heads.frozen == {"c"}
    train_step(heads, optimizer, x)
    assert not torch.equal(heads.weight[heads.slices["a"]], before["a"][0])
    assert torch.equal(heads.weight[heads.slices["c"]], before["c"][0])
    heads.unfreeze("c", "b")
    assert heads.frozen == frozenset()


def test_frozen_heads_follow_loading_and_editing(any_backend: str) -> None:
    heads, other = mtl.MultiTaskHeads(6, {"a": 2, "b": 3}), mtl.MultiTaskHeads(6, {"a": 2, "b": 3})
    heads.freeze("b")
    heads.load_state_dict(other.state_dict())
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(9, 6)
    train_step(heads, optimizer, x)
    assert torch.equal(heads.weight[heads.slices["b"]], other.weight[other.slices["b"]])
    heads.remove_task("a", optimizer=optimizer)
    heads.add_task("c", 2, optimizer=optimizer)
    assert heads.frozen == {"b"}
    train_step(heads, optimizer, x)
    assert torch.equal(heads.weight[heads.slices["b"]], other.weight[other.slices["b"]])
    heads.double()
    train_step(heads, torch.optim.SGD(heads.parameters(), lr=0.1, weight_decay=0.1), x.double())
    assert torch.equal(heads.weight[heads.slices["b"]], other.weight[other.slices["b"]].double())
    with pytest.raises(ValueError, match="names: expected one of 'b', 'c', got 'a'"):
        heads.freeze("a")
    with pytest.raises(ValueError, match="names: expected at least one of 'b', 'c', got none"):
        heads.freeze()
    with pytest.raises(ValueError, match="names: expected at least one"):
        heads.unfreeze()


# ---- Saving.


def test_state_dict_has_the_packed_parameters_only() -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 3})
    heads.freeze("a")
    assert list(heads.state_dict()) == ["weight", "bias"]
    wide = nn.Linear(6, 5)
    heads.load_state_dict(wide.state_dict())  # packed weights are those of a wide linear layer
    assert torch.equal(heads.weight, wide.weight)


@pytest.mark.parametrize("weights_only", (True, False))
def test_heads_are_not_taken_for_each_other(weights_only: bool) -> None:
    saved = nn.Sequential(nn.Linear(3, 6), mtl.MultiTaskHeads(6, {"a": 2, "b": 2}))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=weights_only)
    same = nn.Sequential(nn.Linear(3, 6), mtl.MultiTaskHeads(6, {"a": 2, "b": 2}))
    same.load_state_dict(state)
    assert torch.equal(same[1].weight, saved[1].weight)
    swapped = nn.Sequential(nn.Linear(3, 6), mtl.MultiTaskHeads(6, {"b": 2, "a": 2}))
    with pytest.raises(RuntimeError, match=r"1.tasks: expected \[\('b', 2\), \('a', 2\)\] \(name, width\), got"):
        swapped.load_state_dict(state)


def test_copies_compute_the_same(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS)
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert torch.equal(other.packed(x), heads.packed(x))
        assert other.tasks == heads.tasks


def test_removing_the_only_frozen_head(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    heads.freeze("a")
    with pytest.raises(ValueError, match="optimizer: expected one that holds weight"):
        heads.remove_task("a", optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    assert heads.frozen == {"a"}
    assert list(heads.tasks) == ["a", "b"]
    heads.remove_task("a", optimizer=optimizer)
    assert heads.frozen == frozenset()
    before = heads.weight.clone()
    train_step(heads, optimizer, torch.randn(4, 6))
    assert not torch.equal(heads.weight, before)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda h: torch.optim.LBFGS(h.parameters()), ValueError, "optimizer: .*row by row, got LBFGS"),
        (
            lambda h: torch.optim.Adafactor(h.parameters()),
            ValueError,
            "optimizer: expected state of the shape of weight",
        ),
        (lambda h: torch.optim.SGD([h.weight], lr=0.1), ValueError, "optimizer: expected one that holds bias"),
        (lambda h: "adam", TypeError, "optimizer: expected a torch.optim.Optimizer, got str"),
    ],
    ids=("LBFGS", "Adafactor", "without bias", "no optimizer"),
)
def test_optimizers_that_cannot_follow(make: Any, error: type[Exception], message: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    optimizer = make(heads)
    if isinstance(optimizer, torch.optim.Adafactor):
        train_step(heads, optimizer, torch.randn(4, 6))
    with pytest.raises(error, match=message):
        heads.add_task("c", 2, optimizer=optimizer)
    assert list(heads.tasks) == ["a", "b"]
    assert heads.weight.shape == (4, 6)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Rprop(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=("Rprop", "Adagrad", "Adam"),
)
def test_an_added_head_learns_as_a_fresh_one(make: Any) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    optimizer = make(heads.parameters())
    x = torch.randn(4, 6)
    train_step(heads, optimizer, x)
    heads.add_task("c", 2, optimizer=optimizer)
    rows = heads.slices["c"]
    fresh = mtl.MultiTaskHeads.from_modules({"c": heads.to_modules()["c"]})
    before = heads.weight[rows].clone()
    train_step(heads, optimizer, x)
    train_step(fresh, make(fresh.parameters()), x)
    moved, expected = heads.weight[rows] - before, fresh.weight - before
    if isinstance(optimizer, torch.optim.Adam):  # the step count is that of the others
        assert (moved.sign() == expected.sign()).all()
        assert moved.abs().max() > 0
    else:
        torch.testing.assert_close(moved, expected)


def test_frozen_rows_may_be_written_by_hand() -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    heads.freeze("a")
    nn.init.constant_(heads.weight, 2.0)
    train_step(heads, torch.optim.SGD(heads.parameters(), lr=0.1, weight_decay=0.1), torch.randn(4, 6))
    assert (heads.weight[:3] == 2.0).all()
    assert (heads.weight[3] != 2.0).any()
    normed = nn.utils.parametrizations.weight_norm(mtl.MultiTaskHeads(6, {"a": 3, "b": 1}), "weight")
    with pytest.raises(ValueError, match="names: expected heads whose weight is a plain parameter"):
        normed.freeze("a")


def test_deferred_initialisation(any_backend: str) -> None:
    other = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    x, index = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    for assign in (False, True):
        with torch.device("meta"):
            heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
            assert heads(torch.empty(4, 6))["a"].shape == (4, 3)
        heads.freeze("a")
        if not assign:
            heads.to_empty(device="cpu")
        # A copy: with assign, the parameters are the tensors of the state themselves.
        heads.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(heads(x, task=index), other(x, task=index))
        train_step(heads, torch.optim.SGD(heads.parameters(), lr=0.1, weight_decay=0.1), x)
        assert torch.equal(heads.weight[:3], other.weight[:3])
        assert not torch.equal(heads.weight[3], other.weight[3])


# ---- Parameters computed from others.


def computed(how: str, name: str, hidden: int | None = None) -> mtl.MultiTaskHeads:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 2}, hidden_channels=hidden)
    if how == "prune":
        prune.random_unstructured(heads, name, 0.5)
    elif how == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(heads, name)
    else:
        torch.nn.utils.parametrize.register_parametrization(heads, name, torch.nn.Identity())
    return heads


@pytest.mark.parametrize(
    ("how", "name", "hidden"),
    [
        ("weight_norm", "weight", 4),
        ("prune", "weight", None),
        ("identity", "bias", None),
        ("identity", "hidden_bias_0", 4),
    ],
)
def test_tasks_of_heads_with_computed_parameters_stay(how: str, name: str, hidden: int | None) -> None:
    heads, x = computed(how, name, hidden), torch.randn(3, 6)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    before = {task: out.detach().clone() for task, out in heads(x).items()}
    for edit in (lambda o: heads.add_task("c", 1, o), lambda o: heads.remove_task("a", o)):
        for given in (None, optimizer):
            with pytest.raises(ValueError, match=f"{name}: expected a plain parameter of heads whose tasks change"):
                edit(given)
    assert {task: torch.equal(out, before[task]) for task, out in heads(x).items()} == {"a": True, "b": True}
    with pytest.raises(ValueError, match=f"names: expected heads whose weight is a plain parameter, got {name} comp"):
        heads.freeze("a")


@pytest.mark.parametrize("how", ("weight_norm", "prune"))
def test_frozen_heads_whose_parameters_become_computed(how: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 2})
    heads.freeze("a")
    if how == "prune":
        prune.random_unstructured(heads, "weight", 0.5)
    else:
        torch.nn.utils.parametrizations.weight_norm(heads, "weight")
    with pytest.raises(ValueError, match="weight: expected a plain parameter, since some heads are frozen"):
        heads(torch.randn(3, 6))
    heads.unfreeze("a")
    assert heads(torch.randn(3, 6))["a"].shape == (3, 2)


def test_modules_are_as_trainable_as_the_heads() -> None:
    for hidden in (None, 4):
        heads = mtl.MultiTaskHeads(6, {"a": 2, "b": 2}, hidden_channels=hidden)
        heads.requires_grad_(False)
        assert not any(p.requires_grad for module in heads.to_modules().values() for p in module.parameters())
