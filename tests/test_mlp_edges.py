"""Corners of heads with hidden layers, routed rows and models that once were wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require_fused
from torch import Tensor, nn
from torch.func import grad, vmap
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCN

import torch_mtl_pyg as mtl

NO_EDGES = torch.zeros(2, 0, dtype=torch.int64)
INTEGERS = torch.tensor([0, -100, 2, -100])


def mean_square(out: Tensor, y: Tensor) -> Tensor:
    assert out.shape[0] == y.shape[0]
    return (out - y.reshape(out.shape)).square().mean()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int16), ids=str)
def test_a_mask_leaves_missing_integers_missing(any_backend: str, dtype: torch.dtype) -> None:
    tasks = {"a": mtl.Task(3, loss="cross_entropy", ignore_index=-1), "b": mtl.Task(1, loss="mse")}
    model = mtl.MultiTaskModel(GCN(4, 4, 1), mtl.MultiTaskHeads(4, tasks, hidden_channels=6))
    data, y, route = Data(x=torch.randn(4, 4), edge_index=NO_EDGES), INTEGERS.to(dtype), torch.tensor([0, 1, 0, 1])
    plain = model.loss(data, y, task=route)
    assert plain.count.tolist() == [2, 0]
    same = model.loss(data, y, task=route, mask=torch.ones(4, dtype=torch.bool))
    assert torch.equal(plain.per_task, same.per_task) and torch.equal(plain.count, same.count)
    half = model.loss(data, y, task=route, mask=torch.tensor([True, True, False, False]))
    assert half.count.tolist() == [1, 0]


@pytest.mark.parametrize("hidden", (None, 5))
def test_a_routed_callable_reads_its_own_columns(any_backend: str, hidden: int | None) -> None:
    tasks = {"a": mtl.Task(3, loss="cross_entropy"), "e": mtl.Task(1, loss=mean_square)}
    heads = mtl.MultiTaskHeads(4, tasks, hidden_channels=hidden)
    x, nan = torch.randn(4, 4), float("nan")
    losses = heads.loss(x, torch.tensor([[1.0, nan, nan]] * 4), task=torch.tensor([0, 1, 1, 0]))
    assert losses.count.tolist() == [2, 2]
    torch.testing.assert_close(losses["e"], (heads(x[1:3], task="e") - 1.0).square().mean())


def test_a_callable_without_rows(any_backend: str) -> None:
    tasks = {"a": mtl.Task(3, loss="cross_entropy"), "e": mtl.Task(1, loss=mean_square)}
    heads = mtl.MultiTaskHeads(4, tasks, hidden_channels=6)
    x = torch.randn(4, 4, requires_grad=True)
    losses = heads.loss(x, torch.tensor([0.0, 1.0, 0.0, 1.0]), task=torch.zeros(4, dtype=torch.int64), gramian=True)
    losses.total.backward()
    assert losses.count.tolist() == [4, 0] and losses["e"] == 0.0 and x.grad is not None
    empty = heads.loss(x[:0], {"a": torch.zeros(0, dtype=torch.int64), "e": torch.zeros(0)})
    assert empty.count.tolist() == [0, 0]


class WithNumbers(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return x + z.unsqueeze(1)


class WithPairs(nn.Module):
    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        return x.index_add(0, pairs[1], x[pairs[0]])


class PairData(Data):
    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self.num_nodes if key == "pairs" else super().__inc__(key, value, *args, **kwargs)

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return 1 if key == "pairs" else super().__cat_dim__(key, value, *args, **kwargs)


def test_fields_stay_with_their_graph() -> None:
    heads = mtl.MultiTaskHeads(4, {"a": mtl.Task(1, loss="mse"), "b": mtl.Task(1, loss="mse")})
    numbers = {n: Data(x=torch.zeros(2, 4), z=torch.ones(count)) for n, count in (("a", 1), ("b", 3))}
    with pytest.raises(ValueError, match=r"data\['a'\]\.z: expected 2 entries, one per node, got 1"):
        mtl.MultiTaskModel(WithNumbers(), heads)(numbers)
    edges = torch.tensor([[0, 1], [1, 0]])
    weights = {
        n: Data(x=torch.zeros(2, 4), edge_index=edges, edge_weight=torch.ones(c)) for n, c in (("a", 3), ("b", 1))
    }
    with pytest.raises(ValueError, match=r"data\['a'\]\.edge_weight: expected 2 entries, one per edge, got 3"):
        mtl.MultiTaskModel(GCN(4, 4, 1), heads)(weights)
    model = mtl.MultiTaskModel(WithPairs(), heads)
    pairs = {n: PairData(x=torch.randn(c, 4), pairs=torch.tensor([[0], [1]])) for n, c in (("a", 4), ("b", 3))}
    joint = model(pairs)
    for name, data in pairs.items():
        torch.testing.assert_close(joint[name], model(data, task=name))


def test_several_columns_of_one_task() -> None:
    model = mtl.MultiTaskModel(GCN(4, 4, 1), mtl.MultiTaskHeads(4, {"p": mtl.Task(3, loss="mse")}))
    data = Data(x=torch.randn(2, 4), edge_index=NO_EDGES, y=torch.randn(2, 3))
    assert torch.equal(model.loss(data).total, model.loss(data, task="p").total)
    assert model.loss(data).count.tolist() == [6]


def test_names_are_checked_for_one_task_too() -> None:
    model = mtl.MultiTaskModel(GCN(4, 4, 1), mtl.MultiTaskHeads(4, {"a": mtl.Task(1, loss="mse"), "b": 2}))
    data, y = Data(x=torch.randn(3, 4), edge_index=NO_EDGES), torch.randn(3)
    for arguments in ({"y": {"a": y, "zz": y}}, {"y": y, "mask": {"zz": torch.ones(3, dtype=torch.bool)}}):
        with pytest.raises(ValueError, match="expected one of 'a', 'b', got 'zz'"):
            model.loss(data, task="a", **arguments)  # type: ignore[arg-type]


class Pooled(nn.Module):
    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        return x.new_zeros(int(batch.max()) + 1, 4).index_add(0, batch, x)


def test_a_trunk_that_pools_says_what_to_do() -> None:
    parts = {n: Batch.from_data_list([Data(x=torch.randn(c, 4)) for c in (2, 3)]) for n in ("a", "b")}
    model = mtl.MultiTaskModel(Pooled(), mtl.MultiTaskHeads(4, {"a": 3, "b": 1}), pool=None)
    with pytest.raises(ValueError, match='level="graph"'):
        model(parts)
    tasks = {"a": mtl.Task(3, level="graph"), "b": mtl.Task(1, level="graph")}
    assert mtl.MultiTaskModel(Pooled(), mtl.MultiTaskHeads(4, tasks), pool=None)(parts)["b"].shape == (2, 1)


@pytest.mark.parametrize("hidden", (None, 5))
def test_losses_inside_transforms(any_backend: str, hidden: int | None) -> None:
    tasks = {"a": mtl.Task(3, loss="cross_entropy"), "b": mtl.Task(1, loss="mse")}
    heads = mtl.MultiTaskHeads(4, tasks, hidden_channels=hidden).double()
    x, y = torch.randn(4, 4, dtype=torch.float64), {"a": torch.tensor([0, 1, 2, 0]), "b": torch.randn(4).double()}

    def one(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return heads.loss(x[None], {name: v[None] for name, v in y.items()}).total

    for i, (value, gradient) in enumerate(zip(vmap(one)(x, y), vmap(grad(one))(x, y), strict=True)):
        own = x[i : i + 1].clone().requires_grad_()
        expected = heads.loss(own, {name: v[i : i + 1] for name, v in y.items()}).total
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, own)[0][0])
    assert grad(lambda a: heads.loss(a, y, gramian=True).total)(x).shape == x.shape


def test_numbers_that_overflow() -> None:
    require_fused()
    op = torch.ops.torch_mtl_pyg.multi_head_mlp
    integers = torch.tensor([[0, 2**62, -100, -1]] * 4 + [[0, 10, -100, -1]])
    for weights in ([torch.randn(15, 4), torch.randn(10, 3)], [torch.randn(10, 4)]):
        with pytest.raises(RuntimeError, match="width"):
            op(torch.randn(5, 4), weights, [], None, integers, None, 0, 0.0, 10)
    huge = [torch.randn(1, 1).expand(2**62, 1), torch.randn(1, 1).expand(1, 2**62)]
    with pytest.raises(RuntimeError, match="elements"):
        op(torch.randn(3, 1), huge, [], None, torch.tensor([[0, 1, -1, -1]]), None, 0, 0.0, 1)


def test_too_many_layers_and_wrong_dropout() -> None:
    with pytest.raises(ValueError, match="hidden_channels: expected at most 62 layers, got 70"):
        mtl.MultiTaskHeads(4, {"a": 2}, hidden_channels=[4] * 70)
    with pytest.raises(TypeError, match="dropout: expected a number, got Tensor"):
        mtl.MultiTaskHeads(4, {"a": 2}, hidden_channels=4, dropout=torch.zeros(2))  # type: ignore[arg-type]
