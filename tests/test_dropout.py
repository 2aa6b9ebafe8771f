"""Dropout of the heads' hidden units: which units stay, that they are independent, and the same everywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accuracy import DTYPES
from mlp_cases import EQUAL, RAGGED, SINGLE, Problem, problem, routed_labels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_mtl_pyg as mtl
from torch_mtl_pyg.ops import Hidden, multi_head_mlp, multi_head_mlp_loss
from torch_mtl_pyg.ops.reference_mlp import keep_mask

WORD, LONG = 2**32 - 1, 2**64 - 1


def kept(seed: int, row: int, task: int, layer: int, unit: int, dropout: float) -> bool:
    """The rule, in Python's integers: splitmix64 makes a key, MurmurHash3's finaliser the 32 bits of a unit."""
    key = (seed + row * 0x9E3779B97F4A7C15 + (task * 64 + layer + 1) * 0xD1B54A32D192ED03) & LONG
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & LONG
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB & LONG
    key ^= key >> 31
    v = (key + unit * 0x9E3779B9) & WORD
    v = (v ^ (v >> 16)) * 0x85EBCA6B & WORD
    v ^= key >> 32
    v = (v ^ (v >> 13)) * 0xC2B2AE35 & WORD
    v ^= v >> 16
    return v >= round(dropout * 2**32)


def shown(n: int, tasks: int, units: int, hidden: Hidden, dtype: torch.dtype = torch.float32, layers: int = 1,
          route: Tensor | None = None) -> Tensor:  # fmt: skip
    """The factors that the op multiplies the last hidden layer's units with: ``[N, tasks, units]``.

    Each output of a head is one of its units, which are 1 before dropout.
    """
    layout_tasks: dict[str, Any] = {f"t{i}": mtl.Task(units) for i in range(tasks)}
    weights = [torch.zeros(tasks * units, 1, dtype=dtype)]
    weights += [torch.zeros(tasks * units, units, dtype=dtype) for _ in range(layers - 1)]
    weights.append(torch.eye(units, dtype=dtype).repeat(tasks, 1))
    biases = [*(torch.ones(tasks * units, dtype=dtype) for _ in range(layers)), torch.zeros(tasks * units, dtype=dtype)]
    p = Problem(torch.zeros(n, 1, dtype=dtype), weights, biases, layout_tasks, hidden=hidden, route=route)
    out = multi_head_mlp(p.x, weights, biases, p.layout, hidden, route)
    return out.reshape(n, -1, units)


def drawn(dropout: float, seed: int = 77, first: int = 0) -> Hidden:
    return Hidden("relu", dropout, torch.tensor([seed, first]))


# ---- Which units stay.


def test_the_masks_are_those_of_the_rule() -> None:
    rows = torch.tensor([0, 1, 5, 2**31 + 3, 2**40])
    for seed, first in ((0, 0), (2**62 - 1, 3), (12345678901234567, 1000)):
        for dropout in (0.1, 0.5, 0.999):
            for layer in (0, 2):
                mask = keep_mask(torch.tensor([seed, first]), rows, 3, 7, layer, dropout)
                expected = [
                    [kept(seed, int(row), first + task, layer, unit, dropout) for task in range(3) for unit in range(7)]
                    for row in rows
                ]
                assert mask.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_has_these_masks(isa: str, dtype: torch.dtype) -> None:
    for n, tasks, units in ((70, 5, 16), (1, 1, 1), (300, 3, 70), (33, 40, 7)):
        for dropout in (0.25, 0.5, 0.9):
            for layers in (1, 3):
                got = shown(n, tasks, units, drawn(dropout), dtype, layers)
                seed, rows = torch.tensor([77, 0]), torch.arange(n)
                mask = keep_mask(seed, rows, tasks, units, layers - 1, dropout).reshape(n, tasks, units)
                assert torch.equal(got != 0, mask)
                scale = torch.tensor(1 / (1 - dropout), dtype=torch.float64)
                exact = mask * scale
                assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps * scale).all()


def test_routed_rows_and_single_heads_have_the_masks_of_all(any_backend: str) -> None:
    """A unit's fate depends on seed, row, task, layer and unit, not on what else is computed."""
    everything = shown(90, 4, 12, drawn(0.4))
    route = torch.randint(0, 4, (90,))
    routed = shown(90, 4, 12, drawn(0.4), route=route)
    assert torch.equal(routed[:, 0], everything[torch.arange(90), route])
    for task in range(4):
        assert torch.equal(shown(90, 1, 12, drawn(0.4, first=task))[:, 0], everything[:, task])


@pytest.mark.parametrize("dropout", (0.1, 0.5, 0.8))
def test_the_share_and_independence(any_backend: str, dropout: float) -> None:
    """Two masks that are independent agree in p^2 + (1 - p)^2 of the units; so must neighbours in each direction."""
    n, tasks, units = 400, 6, 24
    masks = [shown(n, tasks, units, drawn(dropout, seed), layers=layers) != 0
             for seed in (5, 6, 2**61) for layers in (1, 2)]  # fmt: skip
    total = n * tasks * units
    for mask in masks:
        share = mask.double().mean()
        assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / total) ** 0.5
        # No row, task or unit is special.
        for axes, count in (((1, 2), tasks * units), ((0, 2), n * units), ((0, 1), n * tasks)):
            means = mask.double().mean(axes)
            assert (means - (1 - dropout)).abs().max() < 5.5 * (dropout * (1 - dropout) / count) ** 0.5
    agree = dropout**2 + (1 - dropout) ** 2
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]  # seeds and layers
    for mask in masks:
        pairs += [(mask[1:], mask[:-1]), (mask[7:], mask[:-7])]  # rows
        pairs += [(mask[:, 1:], mask[:, :-1]), (mask[:, 3:], mask[:, :-3])]  # tasks
        pairs += [(mask[:, :, 1:], mask[:, :, :-1]), (mask[:, :, 16:], mask[:, :, :-16])]  # units
    for a, b in pairs:
        same = (a == b).double().mean()
        assert abs(same - agree) < 5.5 * (agree * (1 - agree) / a.numel()) ** 0.5
    # Triples, which pairs do not see: the parity of three neighbours.
    odd = masks[0][:, :, 2:] ^ masks[0][:, :, 1:-1] ^ masks[0][:, :, :-2]
    q = 1 - dropout
    expected = 3 * q * dropout**2 + q**3
    assert abs(odd.double().mean() - expected) < 0.01


@pytest.mark.parametrize("dropout", (0.0, 1.0))
def test_none_and_all(any_backend: str, dropout: float) -> None:
    heads = mtl.MultiTaskHeads(6, SINGLE, hidden_channels=[8, 5], dropout=dropout, act="gelu")
    x = torch.randn(20, 6, requires_grad=True)
    out = heads.packed(x)
    if dropout == 0.0:
        assert torch.equal(out, heads.eval().packed(x))
        return
    torch.testing.assert_close(out, heads.bias.expand_as(out))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(20, 6)) and torch.equal(heads.bias.grad, torch.full((14,), 20.0))
    for p in (heads.hidden_weight_0, heads.hidden_bias_1, heads.weight):
        assert torch.equal(p.grad, torch.zeros_like(p))


# ---- The heads.


def dropping(tasks: dict[str, Any] = RAGGED, p: float = 0.5) -> mtl.MultiTaskHeads:
    return mtl.MultiTaskHeads(6, tasks, hidden_channels=[8, 5], dropout=p, act="silu").double()


def test_seeds_and_calls(any_backend: str) -> None:
    heads, x = dropping(), torch.randn(30, 6, dtype=torch.float64)
    torch.manual_seed(3)
    first, second = heads.packed(x), heads.packed(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(heads.packed(x), first) and torch.equal(heads.packed(x), second)
    heads.eval()
    state = torch.get_rng_state()
    assert torch.equal(heads.packed(x), heads.packed(x))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
    linear = mtl.MultiTaskHeads(6, {"a": 2}, dropout=0.5)  # there is nothing to drop
    state = torch.get_rng_state()
    linear(x.float())
    assert torch.equal(torch.get_rng_state(), state)
    expected = copy.deepcopy(heads)
    expected.dropout = 0.0
    assert torch.equal(expected.train().packed(x), heads.packed(x))


def test_ways_of_calling_agree(any_backend: str) -> None:
    heads, x = dropping(), torch.randn(30, 6, dtype=torch.float64)

    def seeded(call: Any) -> Any:
        torch.manual_seed(9)
        return call()

    whole = seeded(lambda: heads.packed(x))
    out = seeded(lambda: heads(x))
    route = torch.randint(0, len(heads.tasks), (30,))
    routed = seeded(lambda: heads(x, task=route))
    for i, (name, columns) in enumerate(heads.slices.items()):
        torch.testing.assert_close(out[name], whole[:, columns])
        torch.testing.assert_close(seeded(lambda name=name: heads(x, task=name)), whole[:, columns])
        width = columns.stop - columns.start
        torch.testing.assert_close(routed[route == i][:, :width], whole[route == i][:, columns])
    y = {name: torch.zeros(30, dtype=torch.long) for name in heads.tasks}
    losses = seeded(lambda: heads.loss(x, y))
    for name, columns in heads.slices.items():
        expected = nn.functional.cross_entropy(whole[:, columns], y[name])
        torch.testing.assert_close(losses[name], expected)
        torch.testing.assert_close(seeded(lambda name=name: heads.loss(x, y[name], task=name))[name], expected)


def test_mean_over_masks_is_the_value_without(any_backend: str) -> None:
    """The scale: the expectation of a linear layer behind dropout is that without."""
    p = problem(2, 5, torch.float64, EQUAL, (64,), "relu", dropout=0.3)
    without = multi_head_mlp(p.x, p.weights, p.biases, p.layout, Hidden("relu"))
    draws = torch.stack(
        [
            multi_head_mlp(p.x, p.weights, p.biases, p.layout, Hidden("relu", 0.3, torch.tensor([seed, 0])))
            for seed in range(500)
        ]
    )
    assert ((draws.mean(0) - without).abs() < 5 * draws.std(0) / 500**0.5).all()


@pytest.mark.parametrize("what", ("outputs", "routed", "loss", "routed loss", "callable"))
def test_checkpointing_draws_the_same_masks(any_backend: str, what: str) -> None:
    tasks: dict[str, Any] = dict(SINGLE)
    if what == "callable":
        tasks["own"] = mtl.Task(1, lambda o, y: (o[:, 0] - y).square())
    heads = dropping(tasks)
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    route = torch.randint(0, len(SINGLE), (30,))
    y: dict[str, Tensor] = {
        "classes": torch.randint(0, 7, (30,)), "toxic": torch.rand(30).round(), "degree": torch.randn(30),
        "gauss": torch.randn(30), "smooth": torch.randint(0, 3, (30,)),
    }  # fmt: skip
    if what == "callable":
        y["own"] = torch.randn(30)

    def scalar(x: Tensor) -> Tensor:
        if what == "outputs":
            return heads.packed(torch.tanh(x)).square().sum()
        if what == "routed":
            return heads(torch.tanh(x), task=route).square().sum()
        if what == "routed loss":
            return heads.loss(torch.tanh(x), routed, task=route).total
        return heads.loss(torch.tanh(x), y).total

    routed = routed_labels(route, SINGLE)
    results = []
    for how in (None, False, True):
        x.grad = None
        heads.zero_grad()
        torch.manual_seed(11)
        value = scalar(x) if how is None else checkpoint(scalar, x, use_reentrant=how)
        torch.rand(3)  # what else is drawn meanwhile
        value.backward()
        results.append((value.detach(), x.grad, *(p.grad for p in heads.parameters())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_second_pass_has_the_masks_of_the_first(any_backend: str) -> None:
    """Weights known later: the op runs again in the backward."""
    p = problem(40, 6, torch.float64, SINGLE, (9, 5), "gelu", dropout=0.5)
    own = [t.clone().requires_grad_() for t in p.tensors]
    weights = torch.linspace(1, 2, len(SINGLE), dtype=torch.float64)
    per_task = multi_head_mlp_loss(own[0], own[1:4], own[4:], p.labels, p.layout, p.hidden)[0]
    ours = torch.autograd.grad(per_task @ weights, own)
    total = sum(
        w * multi_head_mlp_loss(own[0], own[1:4], own[4:], p.labels, p.layout, p.hidden)[0][i]
        for i, w in enumerate(weights)
    )
    for a, b in zip(ours, torch.autograd.grad(total, own), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", (-0.1, 1.5, float("nan"), "a", None, True))
def test_bad_dropout(dropout: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="dropout: expected a number"):
        mtl.MultiTaskHeads(4, {"a": 1}, hidden_channels=3, dropout=dropout)


@pytest.mark.parametrize("gramian", (False, True))
def test_masks_of_a_routed_loss_of_ones_own(any_backend: str, gramian: bool) -> None:
    """Those of the rows' places among all rows, as in the outputs."""

    def square(out: Tensor, y: Tensor) -> Tensor:
        return (out[:, 0] - y).square().mean()

    tasks = {"a": mtl.Task(1, loss=square), "b": mtl.Task(1, loss="mse")}
    heads = mtl.MultiTaskHeads(6, tasks, hidden_channels=64, dropout=0.5).double()
    x, y, route = (
        torch.randn(9, 6).double().requires_grad_(),
        torch.randn(9).double(),
        torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 1]),
    )
    torch.manual_seed(0)
    out = heads(x, task=route)
    torch.manual_seed(0)
    losses = heads.loss(x, y, task=route, gramian=gramian)
    for i, name in enumerate(tasks):
        expected = square(out[route == i], y[route == i])
        torch.testing.assert_close(losses[name], expected)
        if gramian:
            (gradient,) = torch.autograd.grad(expected, x, retain_graph=True)
            torch.testing.assert_close(losses.gramian[i, i], gradient.square().sum())
    losses["a"].backward()
