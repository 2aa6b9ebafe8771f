"""MultiTaskHeads: against one linear layer per task, on both backends."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate, linear_terms
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE, Linear, Sequential

import torch_mtl_pyg as mtl

TASKS: dict[str, mtl.Task | int] = {
    "subject": mtl.Task(7, loss="cross_entropy", label_smoothing=0.1),
    "toxic": mtl.Task(1, loss="bce", pos_weight=4.0),
    "degree": mtl.Task(1, loss="huber", delta=1.0, weight=0.5),
    "other": 5,
}
RAGGED = {f"t{i}": 1 + i * 7 % 19 for i in range(40)}


def modules(in_channels: int, tasks: dict[str, Any], bias: bool = True) -> dict[str, nn.Linear]:
    return {
        name: nn.Linear(in_channels, task if isinstance(task, int) else task.out_channels, bias=bias)
        for name, task in tasks.items()
    }


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
        ({"hidden_channels": 64}, ValueError, "hidden_channels: expected None, since heads are linear, got 64"),
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


def train_step(heads: mtl.MultiTaskHeads, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    sum(o.square().mean() for o in heads(x).values()).backward()
    optimizer.step()


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
        heads.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(heads(x, task=index), other(x, task=index))
        train_step(heads, torch.optim.SGD(heads.parameters(), lr=0.1), x)
        assert not torch.equal(heads.weight[3], other.weight[3]) or assign


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
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(6, {"a": 3, "b": 1})

    @torch.compile(backend="eager")
    def step(x: Tensor) -> float:
        loss = heads(x)["a"].sum()
        loss.backward()
        return loss.item()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(5, 6)
        assert step(x) == pytest.approx(heads(x)["a"].sum().item(), rel=1e-5)
