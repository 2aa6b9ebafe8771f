"""MultiTaskEncoders: values, layout, conversion, saving, bad input."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

import torch_mtl_pyg as mtl

WIDTHS = {"a": 50, "b.with dots": 3, "weight": 17}
OTHER = "weight"


def features(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (7, 0, 12)) -> dict[str, Tensor]:
    return {name: torch.randn(n, f, dtype=dtype) for n, (name, f) in zip(sizes, WIDTHS.items(), strict=True)}


@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_layers(any_backend: str, bias: bool) -> None:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8, bias=bias).double()
    linears = encoders.to_modules()
    x = {name: t.requires_grad_() for name, t in features(torch.float64, (7, 4, 12)).items()}
    out = encoders(x)
    assert list(out) == list(WIDTHS)
    for name, own in out.items():
        expected = linears[name](x[name])
        torch.testing.assert_close(own, expected)
        weight = encoders.weights[list(WIDTHS).index(name)]
        ours = torch.autograd.grad(own.sin().sum(), [x[name], weight], retain_graph=True)
        theirs = torch.autograd.grad(expected.sin().sum(), [x[name], linears[name].weight])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(encoders(x[name], task=name), expected)
        torch.testing.assert_close(encoders(x[name], task=list(WIDTHS).index(name)), expected)


def test_results_are_views_of_one_buffer(any_backend: str) -> None:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8)
    x = features()
    reordered = {name: x[name] for name in reversed(WIDTHS)}
    out = encoders(reordered)
    assert list(out) == list(WIDTHS), "the packing order is that of in_channels"
    storage = {t.untyped_storage().data_ptr() for t in out.values()}
    assert len(storage) == 1
    assert [t.storage_offset() for t in out.values()] == [0, 7 * 8, 7 * 8]
    packed = encoders.packed(reordered)
    assert packed.shape == (19, 8) and torch.equal(packed, torch.cat(list(out.values())))


def test_tasks_may_be_left_out(any_backend: str) -> None:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8).double()
    x = features(torch.float64)
    out = encoders({"weight": x["weight"]})
    assert list(out) == ["weight"]
    torch.testing.assert_close(out["weight"], encoders(x)["weight"])
    out["weight"].sum().backward()
    assert encoders.weights[0].grad is None
    assert torch.equal(encoders.bias.grad[:2], torch.zeros(2, 8))
    assert torch.equal(encoders.bias.grad[2], torch.full((8,), 12.0))


def test_initial_values_are_those_of_linear_layers() -> None:
    encoders = mtl.MultiTaskEncoders({"wide": 400, "one": 1}, 300)
    for t, width in enumerate((400, 1)):
        bound = width**-0.5
        for values in (encoders.weights[t], encoders.bias[t]):
            assert 0.9 * bound < values.abs().max() <= bound
    before = [p.detach().clone() for p in encoders.parameters()]
    encoders.reset_parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, encoders.parameters(), strict=True))


def test_from_and_to_modules() -> None:
    linears: dict[str, Any] = {"a": nn.Linear(5, 4), "b": pyg.Linear(2, 4)}
    linears["a"].weight.requires_grad_(False)
    encoders = mtl.MultiTaskEncoders.from_modules(linears)
    again = encoders.to_modules()
    for name, linear in linears.items():
        assert torch.equal(again[name].weight, linear.weight) and torch.equal(again[name].bias, linear.bias)
        assert again[name].weight.requires_grad == linear.weight.requires_grad
    encoders.weights[1].data.zero_()
    assert linears["b"].weight.abs().sum() > 0, "a copy"
    assert mtl.MultiTaskEncoders.from_modules(nn.ModuleDict({"x": nn.Linear(3, 2, bias=False)})).bias is None


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ([nn.Linear(2, 3)], TypeError, "modules: expected a dict from task to a linear layer, got list"),
        ({}, ValueError, "modules: expected at least one"),
        ({"a": nn.ReLU()}, TypeError, r"modules\['a'\]: expected a linear layer, got ReLU"),
        ({"a": nn.LazyLinear(3)}, TypeError, "got LazyLinear"),
        ({"a": pyg.Linear(-1, 3)}, ValueError, "got a lazy one"),
        ({"a": nn.Linear(2, 3), "b": nn.Linear(2, 4)}, ValueError, r"modules\['b'\]: expected outputs .* 3, got 4"),
        ({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3, bias=False)}, ValueError, "expected a bias .* True, got False"),
        ({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3).double()}, TypeError, "expected dtype .*float32, got .*float64"),
    ],
)
def test_modules_that_do_not_fit(modules: Any, error: type[Exception], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules warn
        with pytest.raises(error, match=message):
            mtl.MultiTaskEncoders.from_modules(modules)


def test_state_dict_knows_the_tasks() -> None:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8)
    model = nn.Sequential(encoders)
    state = model.state_dict()
    assert list(state) == ["0.bias", "0.weights.0", "0.weights.1", "0.weights.2"]
    other = nn.Sequential(mtl.MultiTaskEncoders(WIDTHS, 8))
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(encoders.parameters(), other.parameters(), strict=True))
    renamed = nn.Sequential(mtl.MultiTaskEncoders({"a": 50, "c": 3, "weight": 17}, 8))
    with pytest.raises(RuntimeError, match=r"0\.tasks: expected \[\('a', 50\), \('c', 3\)"):
        renamed.load_state_dict(state)


def test_copies_and_pickles() -> None:
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8)
    x = features()
    for other in (copy.deepcopy(encoders), pickle.loads(pickle.dumps(encoders))):
        assert other.in_channels == WIDTHS
        assert torch.equal(other.packed(x), encoders.packed(x))
    assert repr(encoders).startswith("MultiTaskEncoders(\n  {a: 50, b.with dots: 3, weight: 17}, 8, bias=True")
    assert encoders.tasks == tuple(WIDTHS)


def test_autocast_and_compile(any_backend: str) -> None:
    torch._dynamo.reset()
    encoders = mtl.MultiTaskEncoders(WIDTHS, 8)
    x = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoders(x)
    assert all(t.dtype == torch.bfloat16 for t in out.values())
    compiled = torch.compile(encoders, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["a"], encoders(x)["a"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({}, 8), ValueError, "in_channels: expected at least one task"),
        (([3], 8), TypeError, "in_channels: expected a dict"),
        (({"a": 0}, 8), ValueError, r"^in_channels\['a'\]: expected at least 1 feature, got 0"),
        (({"a": 2.0}, 8), TypeError, r"in_channels\['a'\]: expected an int, got float"),
        (({"a": mtl.Task(3)}, 8), TypeError, r"in_channels\['a'\]: expected an int, got Task"),
        (({3: 3}, 8), TypeError, "in_channels: expected names that are strings"),
        (({"a": 3}, 0), ValueError, "out_channels: expected at least 1, got 0"),
        (({"a": 3}, "8"), TypeError, "out_channels: expected an int, got str"),
        (({"a": 3}, 8, 1), TypeError, "bias: expected a bool, got int"),
    ],
)
def test_bad_construction(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskEncoders(*arguments)


@pytest.mark.parametrize(
    ("change", "task", "error", "message"),
    [
        (lambda x: {}, None, ValueError, "x: expected the features of at least one task"),
        (lambda x: x["a"], None, TypeError, "x: expected a dict from task to features, got Tensor"),
        (lambda x: {**x, "c": x["a"]}, None, ValueError, "x: expected one of 'a', .*, got 'c'"),
        (lambda x: {**x, 0: x["a"]}, None, TypeError, "x: expected names of tasks, got 0"),
        (lambda x: {"a": x["a"][:, 1:]}, None, ValueError, r"x\['a'\]: expected shape \[N, 50\], got \[7, 49\]"),
        (lambda x: {"a": None}, None, TypeError, r"x\['a'\]: expected a tensor \[N, 50\], got NoneType"),
        (lambda x: {"a": x["a"].double()}, None, TypeError, r"^x\['a'\]: expected the dtype of weight"),
        (lambda x: {**x, OTHER: x[OTHER].double()}, None, TypeError, rf"^x\['{OTHER}'\]: expected the dtype of"),
        (lambda x: {**x, OTHER: x[OTHER].long()}, None, TypeError, rf"^x\['{OTHER}'\]: expected"),
        (lambda x: {**x, OTHER: x[OTHER].to("meta")}, None, ValueError, rf"^x\['{OTHER}'\]: expected the device"),
        (lambda x: x["a"], "d", ValueError, "task: expected one of .*, got 'd'"),
        (lambda x: x["a"], 3, IndexError, r"task: expected an index in \[0, 3\), got 3"),
        (lambda x: x, "a", TypeError, "x: expected a tensor, since task is given, got dict"),
        (lambda x: x["a"], 1, ValueError, r"x: expected shape \[N, 3\], got \[7, 50\]"),
    ],
)
def test_bad_input(any_backend: str, change: Any, task: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskEncoders(WIDTHS, 8)(change(features()), task=task)
