"""multi_head_mlp and multi_head_mlp_loss in PyTorch: derivatives, transforms, compile, export, autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES
from loss_cases import TASKS
from mlp_cases import ACTS, EQUAL, RAGGED, SINGLE, Problem, problem
from mlp_oracle import names_of
from torch import Tensor

import torch_mtl_pyg as mtl
from torch_mtl_pyg.ops import multi_head_mlp, multi_head_mlp_loss
from torch_mtl_pyg.ops.loss_table import loss_table
from torch_mtl_pyg.ops.multi_head_mlp import CODES

ROUTES = (None, "random")
# No kinks, so that numerical derivatives exist.
SMALL = {name: TASKS[name] for name in ("two", "both", "labels", "mse", "counts", "gaussian")}


def outputs(p: Problem) -> Callable[..., Tensor]:
    depth = len(p.weights)
    return lambda x, *w: multi_head_mlp(x, w[:depth], w[depth:], p.layout, p.hidden, p.route)


def losses(p: Problem) -> Callable[..., Tensor]:
    depth = len(p.weights)

    def both(x: Tensor, *w: Tensor) -> Tensor:
        found = multi_head_mlp_loss(x, w[:depth], w[depth:], p.labels, p.layout, p.hidden, p.route)
        return torch.cat([t.reshape(-1) for t in found[:2]])

    return both


FUNCTIONS = pytest.mark.parametrize("function", (outputs, losses), ids=("outputs", "losses"))


def small(n: int = 5, route: str | None = None, act: str = "gelu", **options: Any) -> tuple[Problem, list[Tensor]]:
    p = problem(n, 3, torch.float64, SMALL, (3, 2), act, route=route, **options)
    return p, [t.clone().requires_grad_() for t in p.tensors]


# ---- Derivatives.


@FUNCTIONS
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("act", ("gelu", "silu", "tanh"))
def test_gradients_of_first_and_second_order(any_backend: str, function: Any, route: str | None, act: str) -> None:
    for dropout in (0.0, 0.4):
        p, tensors = small(3, route, act, dropout=dropout)
        assert torch.autograd.gradcheck(function(p), tensors)
    tasks = {name: SMALL[name] for name in ("two", "gaussian")}
    p = problem(3, 2, torch.float64, tasks, (2,), act, dropout=0.2, route=route)
    assert torch.autograd.gradgradcheck(function(p), [t.clone().requires_grad_() for t in p.tensors])


@FUNCTIONS
@pytest.mark.parametrize("route", ROUTES)
def test_only_the_gradients_asked_for(any_backend: str, function: Any, route: str | None) -> None:
    p, tensors = small(7, route)
    expected = torch.autograd.grad(function(p)(*tensors).sum(), tensors)
    count = len(tensors)
    for wanted in (1, 2, 1 << 3, 1 << 4, 1 << 6, 0b0101010, 0b1111110, 0):
        own = [t.detach().clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
        out = function(p)(*own).sum()
        assert out.requires_grad == (wanted > 0)
        if wanted:
            out.backward()
        for i in range(count):
            assert (own[i].grad is not None) == bool(wanted >> i & 1)
            if own[i].grad is not None:
                torch.testing.assert_close(own[i].grad, expected[i])


@FUNCTIONS
@pytest.mark.parametrize("route", ROUTES)
def test_many_gradients_at_once(any_backend: str, function: Any, route: str | None) -> None:
    p, tensors = small(4, route, dropout=0.3)
    out = function(p)(*tensors)
    count = out.numel()
    eye = torch.eye(count, dtype=torch.float64).reshape(count, *out.shape)
    rows = [torch.autograd.grad(out, tensors, v, retain_graph=True) for v in eye]
    batched = torch.autograd.grad(out, tensors, eye, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(out, tensors, v, retain_graph=True))(eye)
    for i in range(len(tensors)):
        stacked = torch.stack([row[i] for row in rows])
        torch.testing.assert_close(batched[i], stacked)
        torch.testing.assert_close(mapped[i], stacked)


@FUNCTIONS
@pytest.mark.parametrize("route", ROUTES)
def test_transforms_of_torch_func(any_backend: str, function: Any, route: str | None) -> None:
    p, tensors = small(4, route)
    x, *parameters = (t.detach() for t in tensors)

    def of_x(x: Tensor) -> Tensor:
        return function(p)(x, *parameters)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and jvp loads it
        jacobian = torch.autograd.functional.jacobian(of_x, x)
        torch.testing.assert_close(torch.func.jacrev(of_x)(x), jacobian)
        tangent = torch.func.jvp(of_x, (x,), (x,))[1]
        torch.testing.assert_close(tangent, (jacobian * x).sum((-2, -1)))
        torch.testing.assert_close(torch.func.grad(lambda x: of_x(x).sin().sum())(x),
                                   torch.autograd.functional.jacobian(lambda x: of_x(x).sin().sum(), x))  # fmt: skip
        many = torch.randn(3, *x.shape, dtype=torch.float64)
        torch.testing.assert_close(torch.func.vmap(of_x)(many), torch.stack([of_x(one) for one in many]))
        by_weight = torch.func.jacrev(lambda w: function(p)(x, w, *parameters[1:]))(parameters[0])
        expected = torch.autograd.functional.jacobian(lambda w: function(p)(x, w, *parameters[1:]), parameters[0])
        torch.testing.assert_close(by_weight, expected)


@FUNCTIONS
def test_backward_twice_and_accumulation(any_backend: str, function: Any) -> None:
    p, tensors = small(6)
    out = function(p)(*tensors)[-1].sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    for _ in range(3):
        out.backward(retain_graph=True)
    for t, g in zip(tensors, first, strict=True):
        torch.testing.assert_close(t.grad, 3 * g)


@FUNCTIONS
def test_changes_of_saved_tensors_are_noticed(any_backend: str, function: Any) -> None:
    p, tensors = small(6)
    out = function(p)(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()


@FUNCTIONS
def test_no_graph_without_need(any_backend: str, function: Any) -> None:
    p, tensors = small(6)
    with torch.no_grad():
        assert not function(p)(*tensors).requires_grad
    with torch.inference_mode():
        assert multi_head_mlp(p.x, p.weights, p.biases, p.layout, p.hidden).is_inference()
    heads = mtl.MultiTaskHeads(3, EQUAL, hidden_channels=4)
    with torch.inference_mode():
        assert heads.loss(torch.randn(5, 3), torch.zeros(5, 6)).total.is_inference()


# ---- What PyTorch knows of the ops.


def arguments(p: Problem, tensors: list[Tensor]) -> tuple[Any, ...]:
    """What the compiled ops have in common."""
    depth = len(p.weights)
    h = p.hidden
    integers = loss_table(p.layout).integers
    return tensors[0], tensors[1 : depth + 1], tensors[depth + 1 :], p.route, integers, h.seed, CODES[h.act], h.dropout


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fused: None, dtype: torch.dtype, route: str | None) -> None:
    ops = torch.ops.torch_mtl_pyg
    for n, hidden, bias, dropout, grads in ((3, (4, 2), True, 0.3, True), (0, (4,), True, 0.0, True),
                                            (5, (), False, 0.0, False)):  # fmt: skip
        p = problem(n, 4, dtype, SINGLE, hidden, "silu", bias=bias, dropout=dropout, route=route)
        columns = p.layout.total if route is None else max(p.layout.widths)
        grad = torch.randn(n, columns).to(dtype)
        table = loss_table(p.layout)
        targets = [p.labels] if route else list(p.labels.values())
        common = arguments(p, [t.detach().clone().requires_grad_(grads) for t in p.tensors])
        torch.library.opcheck(ops.multi_head_mlp.default, (*common, columns))
        others = (*common, targets, table.reals, table.weight)
        torch.library.opcheck(ops.multi_head_mlp_loss.default, (*others, grads, grads, not grads))
        detached = arguments(p, p.tensors)
        torch.library.opcheck(ops.multi_head_mlp_backward.default, ([grad], *detached, n != 5, n != 3))


@pytest.mark.parametrize("route", ROUTES)
def test_direct_calls_have_derivatives(fused: None, route: str | None) -> None:
    """Autograd of the registered ops, which compiled functions use."""
    ops, table = torch.ops.torch_mtl_pyg, loss_table(problem(1, 1, torch.float64, SINGLE).layout)
    p = problem(9, 4, torch.float64, SINGLE, (5, 3), "tanh", dropout=0.2, route=route)
    own = [t.clone().requires_grad_() for t in p.tensors]
    columns = p.layout.total if route is None else max(p.layout.widths)
    got = torch.autograd.grad(ops.multi_head_mlp(*arguments(p, own), columns).sin().sum(), own)
    expected = torch.autograd.grad(outputs(p)(*own).sin().sum(), own)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    targets = [p.labels] if route else list(p.labels.values())
    for ready in (True, False):
        found = ops.multi_head_mlp_loss(
            *arguments(p, own), targets, table.reals, table.weight, ready, ready, False
        )  # fmt: skip
        per_task, total = multi_head_mlp_loss(own[0], own[1:4], own[4:], p.labels, p.layout, p.hidden, p.route)[:2]
        for ours, theirs in ((found[1], total), (found[0].square().sum(), per_task.square().sum())):
            for a, b in zip(
                torch.autograd.grad(ours, own, retain_graph=True),
                torch.autograd.grad(theirs, own, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="expected one derivative where it is compiled or called directly, got two"):
        torch.autograd.grad(ops.multi_head_mlp(*arguments(p, own), columns).sum(), own, create_graph=True)


@FUNCTIONS
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_to_one_graph(any_backend: str, function: Any, route: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()

    def step(p: Problem, x: Tensor, *parameters: Tensor) -> Tensor:
        depth = len(p.weights)
        w, b = parameters[:depth], parameters[depth:]
        if function is outputs:
            return multi_head_mlp(torch.tanh(x), w, b, layout, hidden, p.route).sin().sum()
        return multi_head_mlp_loss(torch.tanh(x), w, b, p.labels, layout, hidden, p.route)[0].square().sum()

    tasks = {name: SINGLE[name] for name in ("classes", "toxic")}  # compiling the reference takes long
    p = problem(9, 4, torch.float64, tasks, (5,), "gelu", route=route, dropout=0.2)
    layout, hidden = p.layout, p.hidden
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (9, 6):
            q = problem(n, 4, torch.float64, tasks, (5,), "gelu", route=route, dropout=0.2).but(hidden=hidden)
            results = []
            for f in (compiled, step):
                own = [t.clone().requires_grad_() for t in q.tensors]
                value = f(q, *own)
                results.append((value.detach(), *torch.autograd.grad(value, own)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("route", ROUTES)
def test_compiles_with_inductor(fused: None, route: str | None) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(20, SINGLE, hidden_channels=[9, 4], dropout=0.3)
    p = problem(33, 20, torch.float32, SINGLE, (9,), route=route)

    def step(x: Tensor) -> Tensor:
        return heads.loss(torch.tanh(x), p.labels, task=p.route).total.square()

    results = []
    with warnings.catch_warnings(), config.patch(force_disable_caches=True, fallback_random=True):
        warnings.simplefilter("ignore")
        for f in (torch.compile(step, fullgraph=True), step):
            torch.manual_seed(5)
            x = p.x.clone().requires_grad_()
            value = f(x)
            results.append((value.detach(), *torch.autograd.grad(value, [x, *heads.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_exports(fused: None) -> None:
    p = problem(6, 5, torch.float32, RAGGED, (4,))

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, *parameters: Tensor) -> Tensor:
            return multi_head_mlp(x, parameters[:2], parameters[2:], p.layout, p.hidden)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(), tuple(p.tensors))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "torch_mtl_pyg.multi_head_mlp.default" in called
    torch.testing.assert_close(program.module()(*p.tensors), outputs(p)(*p.tensors))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(any_backend: str, dtype: torch.dtype, route: str | None) -> None:
    p = problem(50, 16, torch.float32, SINGLE, (8,), "silu", route=route)
    own = [t.clone().requires_grad_() for t in p.tensors]
    with torch.autocast("cpu", dtype=dtype):
        out = outputs(p)(*own)
        per_task, total, *_ = multi_head_mlp_loss(own[0], own[1:3], own[3:], p.labels, p.layout, p.hidden, p.route)
    assert out.dtype == dtype and per_task.dtype == total.dtype == torch.float32
    exact = p.but(
        x=p.x.to(dtype).double(),
        weights=[w.to(dtype).double() for w in p.weights],
        biases=[b.to(dtype).double() for b in p.biases],
    )
    theirs = [t.requires_grad_() for t in exact.tensors]
    with torch.autocast("cpu", enabled=False):
        expected = losses(exact)(*theirs)[-1]
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(names_of(2, p.biases), torch.autograd.grad(total, own),
                          torch.autograd.grad(expected, theirs), strict=True):  # fmt: skip
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 16 * eps * b.norm(), name
    torch.testing.assert_close(out.double(), outputs(exact)(*theirs), rtol=16 * eps, atol=16 * eps)
    if any_backend == "fused":
        columns = p.layout.total if route is None else max(p.layout.widths)
        with torch.autocast("cpu", dtype=dtype):
            direct = torch.ops.torch_mtl_pyg.multi_head_mlp(*arguments(p, own), columns)
        assert torch.equal(direct, out)


def test_meta_tensors(fused: None) -> None:
    for route in ROUTES:
        p = problem(8, 6, torch.float32, RAGGED, (4, 3), route=route)
        q = p.but(
            x=p.x.to("meta"),
            weights=[w.to("meta") for w in p.weights],
            biases=[b.to("meta") for b in p.biases],
            route=None if p.route is None else p.route.to("meta"),
        )
        assert outputs(q)(*q.tensors).shape == (8, 19 if route else q.layout.total)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation_has_a_second_derivative(any_backend: str, act: str) -> None:
    """Against PyTorch's own, also where the slope jumps."""
    p = problem(9, 4, torch.float64, EQUAL, (5,), act)
    own = [t.clone().requires_grad_() for t in p.tensors]
    f = {"tanh": torch.tanh}.get(act) or getattr(torch.nn.functional, act)

    def plain(x: Tensor, w0: Tensor, w1: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
        h = f(torch.nn.functional.linear(x, w0, b0)).reshape(9, 6, 5)
        return torch.einsum("ntu,tcu->ntc", h, w1.reshape(6, 2, 5)).reshape(9, 12) + b1

    results = []
    for function in (outputs(p), plain):
        (first,) = torch.autograd.grad(function(*own).square().sum(), own[0], create_graph=True)
        results.append(torch.autograd.grad(first.sin().sum(), own, allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
