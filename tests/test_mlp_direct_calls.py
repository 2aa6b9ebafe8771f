"""Direct calls of multi_head_mlp, its backward and multi_head_mlp_loss with anything: an error, or a result."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from conftest import examples, require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from mlp_cases import SINGLE, problem

from torch_mtl_pyg import backend
from torch_mtl_pyg.ops.loss_table import loss_table

WRONG = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
OPS = ("multi_head_mlp", "multi_head_mlp_backward", "multi_head_mlp_loss")


def arguments(op: str, routed: bool, dropout: float = 0.5) -> dict[str, Any]:
    """A good call of an op: six rows, five tasks, two hidden layers."""
    p = problem(6, 4, torch.float32, SINGLE, (3, 2), dropout=dropout, route="random" if routed else None)
    table = loss_table(p.layout)
    columns = max(p.layout.widths) if routed else p.layout.total
    common = {
        "x": p.x, "weights": p.weights, "biases": p.biases, "route": p.route, "integers": table.integers,
        "seed": p.hidden.seed, "act": 0, "dropout": dropout,
    }  # fmt: skip
    if op == "multi_head_mlp":
        return {**common, "columns": columns}
    if op == "multi_head_mlp_backward":
        return {"grads": [torch.randn(6, columns)], **common, "need_x": True, "need_parameters": True}
    targets = [p.labels] if routed else list(p.labels.values())
    return {**common, "targets": targets, "reals": table.reals, "task_weight": table.weight, "need_x": True,
            "need_parameters": True, "need_gramian": False}  # fmt: skip


def call(op: str, values: dict[str, Any]) -> Any:
    return getattr(torch.ops.torch_mtl_pyg, op)(**values)


def kind(place: tuple[int, int], value: int) -> Any:
    def changed(integers: torch.Tensor) -> torch.Tensor:
        integers = integers.clone()
        integers[place] = value
        return integers

    return changed


def with_(values: list[torch.Tensor], place: int, change: Any) -> list[torch.Tensor]:
    return [change(t) if i == place else t for i, t in enumerate(values)]


# Of every op: what is changed, how, and what the error says.
COMMON: list[tuple[str, str, Any]] = [
    ("x", "x: expected float32", lambda x: x.long()),
    ("x", "x: expected", lambda x: x[0]),
    ("x", "weights: .*size of dimension 1|weights: expected", lambda x: x[:, :3]),
    ("x", "weights: expected|grads: expected", lambda x: x.double()),
    ("weights", "weights: expected 1 to 63 layers", lambda w: []),
    ("weights", "weights: expected as many rows for each task in layer 0", lambda w: with_(w, 0, lambda t: t[:14])),
    ("weights", "weights: expected as many rows for each task in layer 0", lambda w: with_(w, 0, lambda t: t[:0])),
    ("weights", "weights: size of dimension 1", lambda w: with_(w, 1, lambda t: t[:, :2])),
    ("weights", "weights: size of dimension 0 of the last", lambda w: with_(w, 2, lambda t: t[:-1])),
    ("weights", "weights: |biases: ", lambda w: w[:2]),
    ("weights", "weights: |biases: ", lambda w: [*w, w[2]]),
    ("weights", "weights: expected", lambda w: with_(w, 1, lambda t: t.half())),
    ("weights", "weights: expected", lambda w: with_(w, 1, lambda t: t.flatten())),
    ("biases", "biases: expected none or one for each layer", lambda b: b[:2]),
    ("biases", "biases: size of dimension 0", lambda b: with_(b, 1, lambda t: t[1:])),
    ("biases", "biases: expected CPU vectors", lambda b: with_(b, 1, lambda t: t[None])),
    ("biases", "biases: expected CPU vectors", lambda b: with_(b, 0, lambda t: t.double())),
    ("integers", "integers: expected", lambda i: i.int()),
    ("integers", "integers: expected", lambda i: i[:, :3]),
    ("integers", "integers: expected", lambda i: i.flatten()),
    ("integers", "integers: expected", kind((1, 1), 0)),
    ("integers", "integers: expected", kind((1, 1), -1)),
    ("integers", "integers: |weights: |grads: ", kind((1, 1), 2**62)),
    ("integers", "integers: |weights: |grads: ", kind((0, 1), 8)),
    ("act", r"act: expected a number in \[0, 5\), got 5", lambda a: 5),
    ("act", r"act: expected a number in \[0, 5\), got -1", lambda a: -1),
    ("dropout", r"dropout: expected a number in \[0, 1\]", lambda p: -0.1),
    ("dropout", r"dropout: expected a number in \[0, 1\]", lambda p: 1.1),
    ("dropout", r"dropout: expected a number in \[0, 1\]", lambda p: math.nan),
    ("seed", "seed: expected a contiguous CPU tensor", lambda s: None),
    ("seed", "seed: expected a contiguous CPU tensor", lambda s: s[:1]),
    ("seed", "seed: expected a contiguous CPU tensor", lambda s: s.double()),
    ("seed", "seed: expected a contiguous CPU tensor", lambda s: torch.stack((s, s), 1)[:, 0]),
]
ROUTED: list[tuple[str, str, Any]] = [
    ("route", "route: expected a CPU vector of int64", lambda r: r.int()),
    ("route", "route: expected a CPU vector of int64", lambda r: r[None]),
    ("route", "route: size of dimension 0", lambda r: r[:5]),
    ("route", r"route: expected tasks in \[0, 5\), got another in row 0", lambda r: torch.full_like(r, 5)),
    ("route", "got another in row 2", lambda r: torch.tensor([0, 1, -1, 0, 0, 0])),
    ("route", "got another in row 0", lambda r: torch.full_like(r, -(2**63))),
]
OWN: dict[str, list[tuple[str, str, Any]]] = {
    "multi_head_mlp": [
        ("columns", "columns: expected", lambda c: c + 1),
        ("columns", "columns: expected", lambda c: -1),
    ],
    "multi_head_mlp_backward": [
        ("grads", "grads: ", lambda g: []),
        ("grads", "grads: ", lambda g: [g[0][:5]]),
        ("grads", "grads: ", lambda g: [g[0][:, 1:]]),
        ("grads", "grads: ", lambda g: [g[0].double()]),
        ("grads", "grads: ", lambda g: [g[0][0]]),
        ("grads", "grads: ", lambda g: [g[0], g[0]]),
    ],
    "multi_head_mlp_loss": [
        ("targets", "targets: expected", lambda y: []),
        ("targets", "targets: expected", lambda y: [*y, y[0]]),
        ("targets", "targets", lambda y: with_(y, 0, lambda t: t[:5])),
        ("targets", "targets", lambda y: with_(y, 0, lambda t: t.cfloat())),
        ("targets", "targets: expected .*for task", lambda y: with_(y, 0, lambda t: t * 0 + 100)),
        ("reals", "reals: expected", lambda r: r[:0]),
        ("reals", "reals: expected", lambda r: r.float()),
        ("task_weight", "task_weight: expected", lambda w: w[:4]),
        ("task_weight", "task_weight: expected", lambda w: w.float()),
        ("integers", "integers: expected", kind((0, 0), 99)),
        ("integers", "integers: expected", kind((0, 0), -1)),
        ("integers", "integers: expected", kind((1, 3), 10**6)),
        ("need_gramian", "need_gramian: expected no gradients together", lambda g: True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("routed", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_what_is_wrong_is_named(fused: None, op: str, routed: bool) -> None:
    call(op, arguments(op, routed))
    for name, message, change in COMMON + OWN[op] + (ROUTED if routed else []):
        values = arguments(op, routed)
        values[name] = change(values[name])
        with pytest.raises(WRONG, match=message):
            call(op, values)


def test_a_seed_is_not_needed_without_dropout(fused: None) -> None:
    for op in OPS:
        for routed in (False, True):
            call(op, {**arguments(op, routed, 0.0), "seed": None})


def apply(change: Any, t: torch.Tensor) -> torch.Tensor:
    """A change, where it can follow others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex numbers made real
        try:
            changed: torch.Tensor = change(t)
        except (IndexError, RuntimeError):
            return t
        return changed


def tensors() -> st.SearchStrategy[Any]:
    """Changes of a tensor, most of which make it wrong."""
    return st.sampled_from(
        [
            lambda t: t,
            lambda t: t[:0],
            lambda t: t[..., :0],
            lambda t: t[:1],
            lambda t: t[..., 1:],
            lambda t: torch.cat((t, t)),
            lambda t: t.t() if t.dim() == 2 else t[None],
            lambda t: t.unsqueeze(-1),
            lambda t: t.flip(0),
            lambda t: t.expand(2, *t.shape),
            lambda t: t.double(),
            lambda t: t.half(),
            lambda t: t.bfloat16(),
            lambda t: t.long() if t.is_floating_point() else t.float(),
            lambda t: t.bool(),
            lambda t: t.to(torch.complex64),
            lambda t: t.to("meta"),
            lambda t: torch.empty(0),
            lambda t: torch.zeros(()),
            lambda t: torch.zeros_like(t),
            lambda t: torch.full_like(t, 2**40 if not t.is_floating_point() and t.dtype == torch.int64 else 1),
            lambda t: torch.full_like(t, -1),
            lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
            lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
            lambda t: torch.randint(-5, 9, t.shape).to(t.dtype),
        ]
    )


@settings(max_examples=examples(400), deadline=None)
@given(
    op=st.sampled_from(OPS),
    routed=st.booleans(),
    seed=st.integers(0, 2**31),
    changes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), tensors()), min_size=1, max_size=3),
    act=st.sampled_from((0, 1, 2, 3, 4, 4, 7, -(2**62))),
    dropout=st.sampled_from((0.0, 0.3, 1.0, 2.0, math.inf, math.nan)),
)
def test_anything_is_refused_or_computed(op: str, routed: bool, seed: int, changes: Any, act: int, dropout: float) -> None:  # fmt: skip  # noqa: E501
    """Memory errors would end the process; what is computed has the shapes it should have."""
    require_fused()
    torch.manual_seed(seed)
    values = arguments(op, routed)
    values |= {"act": act, "dropout": dropout}
    names = [name for name, value in values.items() if isinstance(value, (torch.Tensor, list))]
    for which, place, change in changes:
        name = names[which % len(names)]
        value = values[name]
        if isinstance(value, list) and value and place < 8:
            values[name] = with_(value, place % len(value), partial(apply, change))
        elif isinstance(value, list):
            values[name] = [*value[:-1]] if place == 8 else [*value, *value]
        else:
            values[name] = apply(change, value)
    with backend.use_backend("fused"):
        try:
            result = call(op, values)
        except WRONG:
            return
    if values["x"].is_meta:
        return  # nothing but shapes is looked at
    x, numbers = values["x"], sum(t.numel() for t in (*values["weights"], *values["biases"]))
    if op == "multi_head_mlp":
        assert result.shape == (x.shape[0], values["columns"])
    elif op == "multi_head_mlp_backward":
        assert result[0].shape == x.shape and result[1].shape == (numbers,)
    else:
        assert result[0].shape == (5,) and result[4].shape == x.shape and result[5].shape == (numbers,)
