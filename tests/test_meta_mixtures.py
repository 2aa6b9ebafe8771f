"""Tensors without values, of the device meta or fake: beside others an error, never memory that nobody has written; and
what is wrong with them is an error as it is with others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import require_fused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import torch_mtl_pyg as mtl
from torch_mtl_pyg import ops

TASKS = {"a": mtl.Task(2, loss="cross_entropy"), "b": mtl.Task(1, loss="mse")}
X, W, G = torch.ones(3, 4), torch.ones(5, 4), torch.ones(3, 5)
PTR, INDEX = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 2])
# Arguments of a direct call.
CALLS: dict[str, tuple[Any, ...]] = {
    "multi_head_linear": (X, W, torch.ones(5)),
    "multi_head_linear_backward": ([G], X, W, True, True, True),
    "grouped_linear": ([X, X], [W, W], None),
    "grouped_linear_backward": (torch.ones(6, 5), [X, X], [W, W], [True, True], [True, True], True),
    "aggregate": (X, PTR, INDEX, None, None, None, 0),
    "aggregate_linear": (X, PTR, INDEX, None, None, [W], X, [W], torch.ones(5), 0, False, False),
    "edge_dots": (X, X, PTR, INDEX, None, 0),
    "group_edges": (INDEX, INDEX, 3, 3),
}
# The argument whose device all results have. Of a list of several, the others stay where they are.
MAKES_RESULTS = {
    "multi_head_linear": 0,
    "multi_head_linear_backward": 1,
    "aggregate": 0,
    "aggregate_linear": 0,
    "edge_dots": 1,
    "group_edges": 0,
}


def moved(args: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    """The arguments with one tensor on the device meta: the last one of a list."""
    arg = args[place]
    there = [*arg[:-1], arg[-1].to("meta")] if isinstance(arg, list) else arg.to("meta")
    return (*args[:place], there, *args[place + 1 :])


def is_tensors(arg: Any) -> bool:
    return isinstance(arg, Tensor) or (isinstance(arg, list) and isinstance(arg[0], Tensor))


@pytest.mark.parametrize(
    ("op", "place"), [(op, i) for op, args in CALLS.items() for i, arg in enumerate(args) if is_tensors(arg)]
)
def test_a_direct_call_refuses_a_mixture(op: str, place: int) -> None:
    require_fused()
    call = getattr(torch.ops.torch_mtl_pyg, op)
    assert {t.device.type for t in tree_leaves(call(*CALLS[op]))} == {"cpu"}
    if place == MAKES_RESULTS.get(op):
        assert {t.device.type for t in tree_leaves(call(*moved(CALLS[op], place)))} == {"meta"}
        return
    with pytest.raises(ValueError, match=r"(grads?|xs?|a|key): expected the device of the others, meta, got cpu"):
        call(*moved(CALLS[op], place))


@pytest.mark.parametrize("hidden", (None, 6))
@pytest.mark.parametrize("name", ("x", "weight", "bias", "y"))
def test_losses_name_the_argument(any_backend: str, name: str, hidden: int | None) -> None:
    heads = mtl.MultiTaskHeads(4, TASKS, hidden_channels=hidden)
    y = torch.zeros(3, 2)
    if name in ("x", "y"):
        x, labels = (X.to("meta"), y) if name == "x" else (X, y.to("meta"))
        wanted = "x: expected the device of weight, cpu, got meta" if name == "x" else "y: expected the device of x"
    else:
        setattr(heads, name, torch.nn.Parameter(getattr(heads, name).detach().to("meta")))
        x, labels = X, y
        wanted = "(weight|bias|x).*: expected the device of "
    for inputs in (x, x.clone().requires_grad_()):
        with pytest.raises(ValueError, match=wanted):
            heads.loss(inputs, labels)
        with pytest.raises(ValueError, match=wanted), torch.no_grad():
            heads.loss(inputs, labels)


def test_the_op_of_losses_names_the_argument(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(4, TASKS)
    y, bias = torch.zeros(3, 2), heads.bias
    assert bias is not None
    with pytest.raises(ValueError, match="bias: expected the device of weight, cpu, got meta"):
        ops.multi_head_loss(X, heads.weight, bias.to("meta"), y, heads.layout)
    with pytest.raises(ValueError, match="x: expected the device of weight, meta, got cpu"):
        ops.multi_head_loss(X, heads.weight.to("meta"), bias, y, heads.layout)


@pytest.mark.parametrize("hidden", (None, 4))
@pytest.mark.parametrize("fake", (False, True))
def test_labels_are_checked_without_values(fused: None, hidden: int | None, fake: bool) -> None:
    heads = mtl.MultiTaskHeads(
        5, {"a": mtl.Task(3, loss="cross_entropy"), "b": mtl.Task(2, loss="mse")}, hidden_channels=hidden
    )
    device = "cpu" if fake else "meta"
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        heads, x = heads.to(device), torch.empty(6, 5, device=device)
        a = torch.zeros(6, dtype=torch.long, device=device)
        for wrong, error in ((torch.zeros(7, 9, device=device), ValueError), (torch.zeros(6, 2, 1), ValueError),
                             (torch.zeros(6, 2, dtype=torch.cfloat, device=device), TypeError)):  # fmt: skip
            with pytest.raises(error, match=r"y\['b'\]"):
                heads.loss(x, {"a": a, "b": wrong})


def test_fake_tensors_are_checked(fused: None) -> None:
    with FakeTensorMode():
        heads = mtl.MultiTaskHeads(5, {"a": 3, "b": 2})
        for call in (heads, heads.packed):
            for x, error in (
                (torch.randn(4, 6), ValueError),
                (torch.randn(2, 4, 5), ValueError),
                (torch.randn(4, 5).double(), TypeError),
                (torch.ones(4, 5, dtype=torch.long), TypeError),
            ):
                with pytest.raises(error, match=r"^x: "):
                    call(x)
