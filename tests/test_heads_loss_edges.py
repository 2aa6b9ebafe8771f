"""heads.loss where calls meet modes, devices and unusual labels."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import LabelError

Task = mtl.Task
PLAIN: dict[str, Any] = {"a": Task(1, "mse", weight=2.0), "b": Task(3, "cross_entropy")}


def labels(n: int = 5) -> dict[str, Tensor]:
    return {"a": torch.randn(n), "b": torch.randint(0, 3, (n,))}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_gradients_of_any_strides(any_backend: str, dtype: torch.dtype) -> None:
    heads = mtl.MultiTaskHeads(4, PLAIN).to(dtype)
    x, y = torch.randn(5, 4, dtype=dtype, requires_grad=True), labels()
    expected = torch.autograd.grad(heads.loss(x, y)["a"] + heads.loss(x, y)["b"], x)[0]
    torch.testing.assert_close(torch.autograd.grad(heads.loss(x, y).per_task.sum(), x)[0], expected)
    strided = torch.ones(4, dtype=dtype)[::2]
    torch.testing.assert_close(torch.autograd.grad(heads.loss(x, y).per_task, x, strided)[0], expected)


def test_first_call_in_another_mode(any_backend: str) -> None:
    x, y = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), labels()
    weight = torch.randn(4, 4, dtype=torch.float64)

    def fresh() -> mtl.MultiTaskHeads:
        heads = mtl.MultiTaskHeads(4, PLAIN, bias=False).double()
        with torch.no_grad():
            heads.weight.copy_(weight)
        return heads

    expected = fresh().loss(x, y).total
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (torch.inference_mode(), torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True)):
        if isinstance(mode, FakeTensorMode) and any_backend == "reference":
            continue  # reads values of labels, which a fake has not
        heads = fresh()
        with mode:
            inside = heads.loss(x.detach(), y).total
        if not isinstance(mode, FakeTensorMode):
            assert torch.equal(inside, expected)
        again = heads.loss(x, y).total
        assert torch.equal(again, expected) and type(again) is Tensor
        again.backward()


def test_callable_in_the_gramian_without_gradients(any_backend: str) -> None:
    tasks = {"a": Task(1, lambda o, y: F.mse_loss(o[:, 0], y)), "b": Task(1, "mse")}
    heads, x = mtl.MultiTaskHeads(4, tasks), torch.randn(5, 4)
    y = {"a": torch.randn(5), "b": torch.randn(5)}
    expected = heads.loss(x, y, gramian=True).gramian
    assert expected[0, 0] > 0
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(heads.loss(x, y, gramian=True).gramian, expected)
    heads.requires_grad_(False)
    torch.testing.assert_close(heads.loss(x, y, gramian=True).gramian, expected)
    broken = {"a": Task(1, lambda o, y: (o[:, 0] * float("nan") * y).mean()), "b": Task(1, "mse")}
    product = mtl.MultiTaskHeads(4, broken).loss(x, y, gramian=True).gramian
    assert product[0, 0].isnan() and product[1, 1].isfinite()


def test_matrix_with_a_callable_and_a_task_without_loss(any_backend: str) -> None:
    tasks = {"a": Task(1, lambda o, y: F.mse_loss(o[:, 0], y)), "b": Task(1, "mse"), "n": 5}
    heads, x, y = mtl.MultiTaskHeads(4, tasks), torch.randn(5, 4), torch.randn(5, 3)
    y[:, 2] = torch.nan
    assert heads.loss(x, y).count.tolist() == [5, 5, 0]
    y[1, 2] = 0.0
    with pytest.raises(ValueError, match=r"y\['n'\]: expected no labels"):
        heads.loss(x, y)


@pytest.mark.parametrize("columns", (1, 3))
def test_what_a_routed_callable_gets(any_backend: str, columns: int) -> None:
    shapes = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        shapes.append(tuple(y.shape))
        return F.l1_loss(out.sum(1), y.reshape(len(y), -1).sum(1))

    heads = mtl.MultiTaskHeads(4, {"a": Task(3, loss), "b": Task(1, "mse")})
    y = torch.randn(6) if columns == 1 else torch.randn(6, columns)
    heads.loss(torch.randn(6, 4), y, task=torch.tensor([0, 1, 0, 1, 0, 1]))
    heads.loss(torch.randn(6, 4), y, task="a")
    assert [shape[1:] for shape in shapes] == [y.shape[1:]] * 2


def test_routed_uint8(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(4, {"a": Task(3, "cross_entropy"), "b": Task(4, "cross_entropy")})
    y, idx = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    x = torch.randn(4, 4)
    assert torch.equal(heads.loss(x, y.to(torch.uint8), task=idx).per_task, heads.loss(x, y, task=idx).per_task)


def test_one_task_without_labels_has_every_derivative(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(4, {"a": Task(3, "mse")})
    x = torch.randn(5, 4, requires_grad=True)
    (g,) = torch.autograd.grad(heads.loss(x, {"a": None}).total, x, create_graph=True)
    assert torch.equal(g, torch.zeros(5, 4))
    per_task = heads.loss(x, {"a": None}).per_task
    (g,) = torch.autograd.grad(per_task, x, torch.ones(2, 1), is_grads_batched=True)
    assert torch.equal(g, torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("message", "y"),
    [
        ("y: expected labels that need no gradient", torch.zeros(5, 2, requires_grad=True)),
        (r"y\['a'\]: expected labels that need no", {"a": torch.zeros(5, requires_grad=True), "b": torch.zeros(5)}),
        (r"y\['a'\]: expected shape \[5\] or \[5, 1\], got \[0\]", {"a": torch.empty(0), "b": torch.zeros(5)}),
        ("y: expected the device of x, cpu, got meta", torch.zeros(5, 2, device="meta")),
        (r"y\['b'\]: expected the device of x", {"a": torch.zeros(5), "b": torch.zeros(5, device="meta")}),
    ],
)
def test_refused_on_both_backends(any_backend: str, message: str, y: Any) -> None:
    with pytest.raises(ValueError, match=message):
        mtl.MultiTaskHeads(4, PLAIN).loss(torch.randn(5, 4), y)


def test_shapes_of_no_rows_and_of_one_task(any_backend: str) -> None:
    with pytest.raises(ValueError, match=r"y\['a'\]: expected shape"):
        mtl.MultiTaskHeads(4, PLAIN).loss(torch.randn(0, 4), {"a": torch.zeros(7, 9), "b": torch.zeros(0)})
    one = mtl.MultiTaskHeads(4, {"a": Task(1, "mse")})
    assert one.loss(torch.randn(5, 4), torch.zeros(5, 1)).count.tolist() == [5]
    with pytest.raises(ValueError, match=r"y: expected shape \[5, 1\]"):
        one.loss(torch.randn(5, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="y: expected a dict"):
        mtl.MultiTaskHeads(4, {"a": Task(3, "mse")}).loss(torch.randn(5, 4), torch.zeros(5, 1))
    with pytest.raises(TypeError, match="gramian: expected a bool, got str"):
        one.loss(torch.randn(5, 4), torch.zeros(5, 1), gramian="x")  # type: ignore[arg-type]


def test_a_dict_is_not_changed(any_backend: str) -> None:
    y = collections.defaultdict(lambda: torch.zeros(5), {"a": torch.zeros(5), "c": torch.zeros(5)})
    with pytest.raises(ValueError, match="y: expected one of 'a', 'b', got 'c'"):
        mtl.MultiTaskHeads(4, PLAIN).loss(torch.randn(5, 4), y)
    assert set(y) == {"a", "c"}


def test_infinite_logits_of_two_classes(any_backend: str) -> None:
    z = torch.tensor([[float("inf"), 0.0]])
    heads = mtl.MultiTaskHeads(1, {"a": Task(2, "cross_entropy")}, bias=False)
    for row, y in ((z, 0), (z.flip(1), 0), (-z, 1), (-z, 0), (z - z, 0)):
        with torch.no_grad():
            heads.weight.copy_(row.t())
        got = heads.loss(torch.ones(1, 1), {"a": torch.tensor([y])}).total
        torch.testing.assert_close(got, F.cross_entropy(row, torch.tensor([y])), equal_nan=True)


def test_ignore_index_that_the_labels_round(any_backend: str) -> None:
    heads = mtl.MultiTaskHeads(4, {"a": Task(3, "cross_entropy", ignore_index=-999)})
    y = torch.tensor([0.0, 1.0, -999.0, 2.0]).bfloat16()  # -1000
    assert heads.loss(torch.randn(4, 4), {"a": y}).count.tolist() == [3]


def test_backward_in_autocast_and_scaled_half(fused: None) -> None:
    heads = mtl.MultiTaskHeads(64, PLAIN)
    x, y, w = torch.randn(50, 64, requires_grad=True), labels(50), torch.tensor([1.5, 0.5])
    (expected,) = torch.autograd.grad(heads.loss(x, y).per_task @ w, x)
    scalar = (heads.loss(x, y).per_task * w).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(scalar, x)
    torch.testing.assert_close(got, expected)
    small, xs = heads.bfloat16(), x.detach().bfloat16().requires_grad_()
    (whole,) = torch.autograd.grad(small.loss(xs, y).total, xs)
    (third,) = torch.autograd.grad(small.loss(xs, y).total / 3, xs)
    ratio = (third.double() * 3 / whole.double())[whole != 0]
    assert abs(float(ratio.mean()) - 1) < 5e-4


def test_second_derivatives_where_compiled_are_an_error(fused: None) -> None:
    torch._dynamo.reset()
    heads, y = mtl.MultiTaskHeads(4, PLAIN), labels()
    x = torch.randn(5, 4, requires_grad=True)
    compiled = torch.compile(lambda x: heads.loss(x, y).total, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="expected one derivative where it is compiled or called directly"):
        torch.autograd.grad(compiled(x), x, create_graph=True)


def test_compiled_errors_name_no_source(fused: None) -> None:
    torch._dynamo.reset()
    heads = mtl.MultiTaskHeads(4, PLAIN)
    compiled = torch.compile(lambda x, y: heads.loss(x, y).total, backend="aot_eager", fullgraph=True)
    y = {**labels(), "b": torch.full((5,), 3)}
    with pytest.raises(RuntimeError, match=r"^targets: expected classes in \[0, 3\) for task 1, got 3 in row 0"):
        compiled(torch.randn(5, 4), y)
    with pytest.raises(LabelError):
        heads.loss(torch.randn(5, 4), y)


def test_direct_calls_give_the_gramian_alone(fused: None) -> None:
    from torch_mtl_pyg.ops.loss_table import loss_table

    heads = mtl.MultiTaskHeads(4, PLAIN)
    t = loss_table(heads.layout)
    arguments = (torch.randn(5, 4), heads.weight.detach(), None, list(labels().values()), t.integers, t.reals, t.weight)
    with pytest.raises(RuntimeError, match="need_gramian: expected no gradients together with the Gramian"):
        torch.ops.torch_mtl_pyg.multi_head_loss(*arguments, True, True, False, True)


@pytest.mark.parametrize("hidden", (None, 4))
def test_labels_of_three_dimensions_are_refused(any_backend: str, hidden: int | None) -> None:
    """On the way to the op three dimensions stand for no labels."""
    heads = mtl.MultiTaskHeads(
        4, {"a": mtl.Task(3, loss="cross_entropy"), "b": mtl.Task(2, loss="mse")}, hidden_channels=hidden
    )
    a = torch.zeros(5, dtype=torch.long)
    for b in (torch.zeros(5, 2, 1), torch.zeros(0, 0, 0)):
        with pytest.raises(ValueError, match=r"^y\['b'\]: expected shape \[5, 2\]"):
            heads.loss(torch.randn(5, 4), {"a": a, "b": b})


@pytest.mark.parametrize("hidden", (None, 4))
def test_errors_stand_alone(fused: None, hidden: int | None) -> None:
    """What the op itself says of an argument that is explained later is noise."""
    heads = mtl.MultiTaskHeads(4, {"a": mtl.Task(3, loss="cross_entropy"), "b": 2}, hidden_channels=hidden)
    x = torch.randn(5, 4)
    for call in (
        lambda: heads(x[:, :3]),
        lambda: heads.packed(x[:, :3]),
        lambda: heads.loss(x, {"a": torch.tensor([0, 1, 2, 3, 0])}),
        lambda: heads.loss(x, {"a": torch.zeros(4, dtype=torch.long)}),
    ):
        with pytest.raises(ValueError, match=r"^[xy]") as caught:
            call()
        assert caught.value.__context__ is None
