"""MultiTaskHeads: against one linear layer per task, on both backends."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate, linear_terms
from heads_common import RAGGED, TASKS, modules
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE, Sequential

import torch_mtl_pyg as mtl


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("tasks", (TASKS, RAGGED, {"one": 1}), ids=("mixed", "ragged", "one"))
def test_equals_one_linear_per_task(any_backend: str, tasks: dict[str, Any], bias: bool) -> None:
    mods = modules(24, tasks, bias)
    for module in mods.values():
        module.double()
    heads = mtl.MultiTaskHeads.from_modules(mods)
    x = torch.randn(31, 24, dtype=torch.float64, requires_grad=True)
    out = heads(x)
    assert list(out) == list(tasks)
    expected = {name: module(x) for name, module in mods.items()}
    for name in tasks:
        torch.testing.assert_close(out[name], expected[name])
        torch.testing.assert_close(heads.packed(x)[:, heads.slices[name]], expected[name])
    (gx,) = torch.autograd.grad(sum(o.sin().sum() for o in out.values()), x, retain_graph=True)
    (expected_gx,) = torch.autograd.grad(sum(o.sin().sum() for o in expected.values()), x, retain_graph=True)
    torch.testing.assert_close(gx, expected_gx)
    sum(o.sin().sum() for o in out.values()).backward()
    sum(o.sin().sum() for o in expected.values()).backward()
    for name, module in mods.items():
        torch.testing.assert_close(heads.weight.grad[heads.slices[name]], module.weight.grad)
        if bias:
            torch.testing.assert_close(heads.bias.grad[heads.slices[name]], module.bias.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(any_backend: str, dtype: torch.dtype) -> None:
    heads = mtl.MultiTaskHeads(50, RAGGED).to(dtype)
    x = torch.randn(77, 50).to(dtype)
    with torch.no_grad():
        packed = heads.packed(x)
        same = nn.functional.linear(x, heads.weight, heads.bias)
        assert packed.dtype == dtype
        assert_accurate(packed, *linear_terms(x, heads.weight, heads.bias), same)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (1, 1000), (1000, 1), (1000, 3), (3, 1000)])
@pytest.mark.parametrize("rows", (0, 1, 9))
def test_few_and_many_tasks(any_backend: str, count: int, width: int, rows: int) -> None:
    heads = mtl.MultiTaskHeads(13, {f"task {i}": width for i in range(count)})
    x = torch.randn(rows, 13)
    out = heads(x)
    assert len(out) == count
    torch.testing.assert_close(
        torch.cat(list(out.values()), dim=1), nn.functional.linear(x, heads.weight, heads.bias), rtol=1e-5, atol=1e-5
    )


def test_outputs_are_views_of_one_buffer(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, TASKS)
    out = heads(torch.randn(5, 8))
    pointers = {o.untyped_storage().data_ptr() for o in out.values()}
    assert len(pointers) == 1
    assert all(o.stride() == (heads.out_channels, 1) for o in out.values())
    with torch.no_grad():
        assert len({o.untyped_storage().data_ptr() for o in heads(torch.randn(5, 8)).values()}) == 1


def test_one_task_alone(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(8, TASKS)
    x = torch.randn(5, 8, requires_grad=True)
    for index, name in enumerate(TASKS):
        for task in (name, index):
            torch.testing.assert_close(heads(x, task=task), heads(x)[name])
            if any_backend == "fused":  # an element is the same chain of sums whatever lies beside it
                assert torch.equal(heads(x, task=task), heads(x)[name])
    heads(x, task="degree").sum().backward()
    rows = heads.slices["degree"]
    assert heads.weight.grad[rows].abs().min() > 0
    assert torch.equal(heads.bias.grad, torch.zeros(14).index_fill_(0, torch.arange(14)[rows], 5.0))


def test_attributes_of_a_subclass_are_asked(any_backend: str) -> None:
    """As Pyro's modules are, which draw parameters where they are read."""

    class Drawn(mtl.MultiTaskHeads):
        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            return value * 0 + 2 if name == "weight" else value

    heads = Drawn(3, {"a": 2}, bias=False)
    assert torch.equal(heads(torch.ones(1, 3))["a"], torch.full((1, 2), 6.0))


def test_rows_routed_to_their_task(any_backend: str) -> None:
    tasks = {**TASKS, "never": 3}
    heads = mtl.MultiTaskHeads(8, tasks).double()
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 4, (50,))
    out = heads(x, task=index)
    assert out.shape == (50, 7)
    copy_of_heads, x2 = copy.deepcopy(heads), x.detach().clone().requires_grad_()
    expected = torch.zeros(50, 7, dtype=torch.float64)
    for t, name in enumerate(tasks):
        rows = index == t
        width = copy_of_heads.tasks[name].out_channels
        part = copy_of_heads(x2[rows], task=name)
        torch.testing.assert_close(out[rows][:, :width], part)
        assert not out[rows][:, width:].any()
        expected = expected.masked_scatter(rows[:, None] & (torch.arange(7) < width), part)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(heads.weight.grad, copy_of_heads.weight.grad)
    assert not heads.weight.grad[heads.slices["never"]].any()
    assert heads(x[:0], task=index[:0]).shape == (0, 7)
    few = x.detach()[:6].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: heads(x, task=index[:6]), (few,))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("subjekt", ValueError, "task: expected one of 'subject', 'toxic', 'degree', 'other', got 'subjekt'"),
        (4, IndexError, r"task: expected an index in \[0, 4\), got 4"),
        (-1, IndexError, r"task: expected an index in \[0, 4\), got -1"),
        (1.0, TypeError, "task: expected an int, got float"),
        (True, TypeError, "task: expected an int, got bool"),
        (["subject"], TypeError, "task: expected an int, got list"),
        (torch.zeros(3), TypeError, "task: expected int64 indices, got torch.float32"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "task: expected int64 indices, got torch.int32"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "task: expected int64 indices, got torch.bool"),
        (torch.tensor(1), ValueError, r"task: expected shape \[3\], one index per row of x, got \[\]"),
        (torch.zeros(4, dtype=torch.long), ValueError, r"task: expected shape \[3\].*got \[4\]"),
        (torch.zeros(3, 1, dtype=torch.long), ValueError, r"task: expected shape \[3\].*got \[3, 1\]"),
        (torch.tensor([0, 4, 1]), IndexError, r"task: expected indices in \[0, 4\), got 4 in row 1"),
        (torch.tensor([0, 3, -1]), IndexError, r"task: expected indices in \[0, 4\), got -1 in row 2"),
        (torch.zeros(3, dtype=torch.long, device="meta"), ValueError, "task: expected the device of x, cpu, got meta"),
    ],
)
def test_bad_task(any_backend: str, task: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads(8, TASKS)(torch.randn(3, 8), task=task)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 7), ValueError, r"x: expected shape \[N, 8\], got \[3, 7\]"),
        (torch.randn(8), ValueError, r"x: expected shape \[N, 8\], got \[8\]"),
        (torch.randn(2, 3, 8), ValueError, r"x: expected shape \[N, 8\], got \[2, 3, 8\]"),
        (torch.randn(3, 8).double(), TypeError, "x: expected the dtype of weight, torch.float32, got torch.float64"),
        (torch.zeros(3, 8, dtype=torch.long), TypeError, "x: expected one of the dtypes .* got int64"),
        (torch.zeros(3, 8, device="meta"), ValueError, "x: expected the device of weight, cpu, got meta"),
        ([[0.0] * 8], TypeError, r"x: expected a tensor \[N, 8\], got list"),
        (None, TypeError, r"x: expected a tensor \[N, 8\], got NoneType"),
    ],
)
@pytest.mark.parametrize("task", (None, "toxic", torch.zeros(3, dtype=torch.long)), ids=("all", "one", "routed"))
def test_bad_x(any_backend: str, x: Any, error: type[Exception], message: str, task: Any) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads(8, TASKS)(x, task=task)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels: expected at least 1, got 0"),
        ({"in_channels": 8.0}, TypeError, "in_channels: expected an int, got float"),
        ({"tasks": {}}, ValueError, "tasks: expected at least one task"),
        ({"tasks": {"a": 0}}, ValueError, r"tasks\['a'\]: out_channels: expected at least 1, got 0"),
        ({"tasks": [1, 2]}, TypeError, "tasks: expected a dict"),
        ({"hidden_channels": 0}, ValueError, "hidden_channels: expected widths of at least 1, got 0"),
        ({"hidden_channels": []}, ValueError, "hidden_channels: expected None or at least one width, got none"),
        ({"hidden_channels": "64"}, TypeError, "hidden_channels: expected an int, got str"),
        ({"hidden_channels": 8, "act": "prelu"}, ValueError, "act: expected one of relu, gelu, silu, tanh, elu"),
        ({"dropout": 1.5}, ValueError, r"dropout: expected a number in \[0, 1\], got 1.5"),
        ({"act": 3}, TypeError, "act: expected the name of an activation, got int"),
        ({"act": "nonsense"}, ValueError, "act: expected the name of an activation, got 'nonsense'"),
        ({"dropout": "x"}, TypeError, "dropout: expected a number, got str"),
        ({"bias": None}, TypeError, "bias: expected a bool, got NoneType"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskHeads(**{"in_channels": 8, "tasks": {"a": 1}, **arguments})


def test_duplicate_names_cannot_be_added() -> None:
    heads = mtl.MultiTaskHeads(4, {"a": 1})
    with pytest.raises(ValueError, match="name: expected one not in use, got 'a'"):
        heads.add_task("a", 2)


def test_initial_values_are_those_of_linear() -> None:
    heads = mtl.MultiTaskHeads(100, {"a": 300, "b": 300})
    for name in heads.tasks:
        rows = heads.weight[heads.slices[name]]
        assert rows.abs().max() <= 0.1
        assert 0.05 < rows.std() < 0.065  # uniform in +-0.1: 0.1 / sqrt(3) = 0.058
    before = heads.weight.clone()
    torch.manual_seed(3)
    heads.reset_parameters()
    first = heads.weight.clone()
    torch.manual_seed(3)
    heads.reset_parameters()
    assert torch.equal(heads.weight, first) and not torch.equal(first, before)


def test_repr_names_the_tasks() -> None:
    heads = mtl.MultiTaskHeads(128, TASKS)
    assert repr(heads) == "MultiTaskHeads(128, tasks={subject: 7, toxic: 1, degree: 1, other: 5}, bias=True)"


# ---- In a model.


def test_in_pyg_models(any_backend: str) -> None:
    edge_index = torch.randint(0, 20, (2, 60))
    x = torch.randn(20, 5)
    model = Sequential(
        "x, edge_index",
        [
            (GraphSAGE(5, 16, num_layers=2), "x, edge_index -> x"),
            (mtl.MultiTaskHeads(16, TASKS), "x -> out"),
        ],
    )
    out = model(x, edge_index)
    assert {name: tuple(o.shape) for name, o in out.items()} == {
        "subject": (20, 7), "toxic": (20, 1), "degree": (20, 1), "other": (20, 5),
    }  # fmt: skip
    sum(o.square().mean() for o in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("task", (None, "toxic", "routed"))
def test_compiles_to_one_graph(any_backend: str, task: str | None) -> None:
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(6, TASKS).double()
    heads.freeze("degree")

    def run(x: Tensor, index: Tensor) -> Tensor:
        out = heads(torch.tanh(x), task=index if task == "routed" else task)
        return sum(o.sin().sum() for o in out.values()) if isinstance(out, dict) else out.sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        x, index = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (9,))
        gradients = torch.autograd.grad(compiled(x, index), (x, heads.weight))
    for ours, expected in zip(gradients, torch.autograd.grad(run(x, index), (x, heads.weight)), strict=True):
        torch.testing.assert_close(ours, expected)
    if task == "routed":
        with pytest.raises(RuntimeError, match=r"task: expected indices in \[0, 4\)"):
            compiled(x, torch.full((9,), 4))


def test_autocast(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, TASKS)
    x = torch.randn(9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = heads(x)
        routed = heads(x, task=torch.randint(0, 4, (9,)))
    assert all(o.dtype == torch.bfloat16 for o in out.values()) and routed.dtype == torch.bfloat16
    sum(o.float().sum() for o in out.values()).backward()
    assert heads.weight.grad.dtype == torch.float32


# ---- The backward reads each head's gradient where it lies.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_any_layout_and_of_some_heads(any_backend: str, dtype: torch.dtype) -> None:
    widths = [1, 7, 3, 200, 2, 16, 1, 33, 5]
    heads = mtl.MultiTaskHeads(40, {f"t{i}": w for i, w in enumerate(widths)}).to(dtype)
    n = 431
    grads: list[Tensor | None] = [torch.randn(n, w).to(dtype) for w in widths]
    grads[1] = torch.randn(7, n).to(dtype).t()
    grads[2] = torch.ones(1, 1, dtype=dtype).expand(n, 3)
    grads[3] = torch.randn(2 * n, 400).to(dtype)[::2, ::2]
    grads[5] = torch.randn(n, 1).to(dtype).expand(n, 16)
    for used in (range(9), (1, 2, 3, 5), (3,), (0, 8)):
        x = torch.randn(n, 40).to(dtype).requires_grad_()
        heads.zero_grad()
        out = list(heads(x).values())
        torch.autograd.backward([out[i] for i in used], [grads[i] for i in used])
        whole = torch.cat([g if i in used else torch.zeros_like(g) for i, g in enumerate(grads)], dim=1)
        g = whole.double()
        with torch.no_grad():
            w = heads.weight.double()
            assert_accurate(x.grad, g @ w, g.abs() @ w.abs(), whole @ heads.weight)
            assert_accurate(heads.weight.grad, g.t() @ x.double(), g.t().abs() @ x.double().abs(), whole.t() @ x)
            assert_accurate(heads.bias.grad, g.sum(0), g.abs().sum(0), whole.sum(0))


def test_second_derivative_through_the_heads(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(4, {"a": 2, "b": 1, "c": 3}).double()

    def outputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(heads, {"weight": weight, "bias": bias}, x).values())

    arguments = tuple(
        t.detach().requires_grad_() for t in (torch.randn(3, 4, dtype=torch.float64), heads.weight, heads.bias)
    )
    assert torch.autograd.gradcheck(outputs, arguments)
    assert torch.autograd.gradgradcheck(outputs, arguments)
    assert torch.autograd.gradgradcheck(lambda *a: outputs(*a)[1:], arguments)


def test_threads_do_not_change_training(fused: None) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            heads = mtl.MultiTaskHeads(65, RAGGED)
            x = torch.randn(3000, 65, requires_grad=True)
            out = heads(x)
            torch.autograd.backward(list(out.values()), [torch.randn_like(o) for o in out.values()])
            results.append((heads.weight.grad, heads.bias.grad, x.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_tape_keeps_no_packed_gradient(fused: None) -> None:
    """In-place changes of one output are refused, as for torch.split: they would change the others' buffer."""
    out = mtl.MultiTaskHeads(4, {"a": 2, "b": 1})(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        out["a"].mul_(2)


# ---- Found by trying to break it.


def test_batched_gradients(any_backend: str) -> None:
    """How Jacobians are computed at once: one vmap over the backward."""
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1, "c": 4}).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    losses = torch.stack([o.pow(2).mean() for o in heads(x).values()])
    inputs = (x, heads.weight, heads.bias)
    batched = torch.autograd.grad(losses, inputs, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        one = torch.autograd.grad(losses[i], inputs, retain_graph=True)
        for all_of, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(all_of[i], expected)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(heads.packed, x, vectorize=True), jacobian(heads.packed, x))


def test_checkpointing(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    x = torch.randn(5, 6, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(lambda x: heads(torch.tanh(x)), x, use_reentrant=False)
    (got,) = torch.autograd.grad(out["a"].sum(), x)
    (expected,) = torch.autograd.grad(heads(torch.tanh(x))["a"].sum(), x)
    torch.testing.assert_close(got, expected)


def test_forward_mode(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    x, tangent = torch.randn(5, 6), torch.randn(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.forward_ad.dual_level():
            out = heads(torch.autograd.forward_ad.make_dual(x, tangent))
            got = torch.autograd.forward_ad.unpack_dual(out["a"]).tangent
    torch.testing.assert_close(got, tangent @ heads.weight[:3].t())


def test_a_row_meets_its_own_head_only(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
    x = torch.randn(4, 6)
    x[1] = float("inf")
    x.requires_grad_()
    with torch.no_grad():
        heads.weight[0] = float("nan")
    index = torch.tensor([1, 0, 1, 1])
    heads(x, task=index)[index == 1].sum().backward()
    assert heads.weight.grad[3].isfinite().all()
    assert x.grad[index == 1].isfinite().all()


def test_first_use_in_a_compiled_function_with_a_graph_break() -> None:
    """In a process of its own: Dynamo traces such a function twice, and both traces must find the same backend."""
    code = """
import torch, torch_mtl_pyg as mtl
heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})
@torch.compile(backend="eager")
def step(x):
    loss = heads(x)["a"].sum()
    loss.backward()
    return loss.item()
x = torch.randn(5, 6)
torch.testing.assert_close(torch.tensor(step(x)), heads(x)["a"].sum().detach())
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr[-2000:]
