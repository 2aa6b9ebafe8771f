"""The op multi_head_linear: values, derivatives, determinism, registrations, bad input."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from accuracy import DTYPES, assert_accurate, linear_terms
from conftest import examples, require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_mtl_pyg import backend
from torch_mtl_pyg.ops import multi_head_linear

WIDTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 33, 48, 49, 97, 193, 385, 1000)
SHAPES = (  # N, D, K: around the edges of panels (8, 16, 32 wide), tiles (192 rows) and blocks (384 deep)
    *((19, 33, k) for k in WIDTHS),
    *((n, 17, 21) for n in (0, 1, 2, 5, 6, 7, 12, 13, 191, 193, 385, 777)),
    *((23, d, 19) for d in (1, 2, 3, 4, 8, 15, 31, 64, 127, 255, 257, 383, 385, 769, 2048)),
    (1, 1, 1),
    (3, 2048, 1000),
    (513, 256, 24),
    (1100, 300, 409),
)


def inputs(n: int, d: int, k: int, dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(n, d), torch.randn(k, d) / d**0.5, torch.randn(k)
    return tuple(t.to(dtype).requires_grad_(requires_grad) for t in (x, weight, bias))  # type: ignore[return-value]


def check_values(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> None:
    """Forward and all gradients against float64, through autograd."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = multi_head_linear(x, weight, bias)
    y.backward(grad)
    with torch.no_grad():
        assert y.dtype == x.dtype and y.is_contiguous()
        f = torch.nn.functional.linear
        assert_accurate(y, *linear_terms(x, weight, bias), f(x, weight, bias))
        g = grad.double()
        assert_accurate(x.grad, g @ weight.double(), g.abs() @ weight.double().abs(), grad @ weight)
        assert_accurate(weight.grad, g.t() @ x.double(), g.t().abs() @ x.double().abs(), grad.t() @ x)
        if bias is not None:
            assert_accurate(bias.grad, g.sum(0), g.abs().sum(0), grad.sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for n, d, k in SHAPES if dtype != torch.float16 else SHAPES[::2]:  # PyTorch's float16 products are slow
        x, weight, bias = inputs(n, d, k, dtype)
        check_values(x, weight, bias if k % 2 else None, torch.randn(n, k).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_reference(dtype: torch.dtype) -> None:
    with backend.use_backend("reference"):
        for n, d, k in SHAPES[::5]:
            x, weight, bias = inputs(n, d, k, dtype)
            check_values(x, weight, bias, torch.randn(n, k).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(isa: str, dtype: torch.dtype) -> None:
    n, d, k = 205, 70, 45
    x, weight, bias = inputs(n, d, k, dtype)
    grad = torch.randn(n, k).to(dtype)
    variants: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [
        (x.t().contiguous().t(), weight, bias, grad),
        (x, weight.t().contiguous().t(), bias, grad),
        (x, weight, bias, grad.t().contiguous().t()),
        (torch.randn(2 * n, 3 * d).to(dtype)[::2, ::3], weight, bias, grad),
        (x[:1].expand(n, d), weight, bias, grad),
        # One value everywhere, and small integers: otherwise all roundings would go the same way.
        tuple(
            torch.full((1,) * len(s), v, dtype=dtype).expand(s)
            for v, s in ((3, (n, d)), (2, (k, d)), (1, (k,)), (2, (n, k)))
        ),  # type: ignore[list-item]
        (x.as_strided((n, d), (1, 2)), weight, bias, grad[:, :1].expand(n, k)),
        (x.flip(0), weight[3:], bias[3:], torch.randn(n, k).to(dtype)[:, 3:]),
        (torch.randn(n * d + 1).to(dtype)[1:].view(n, d), weight, torch.randn(2 * k).to(dtype)[::2], grad),
    ]
    for variant in variants:
        check_values(*variant)


@settings(max_examples=examples(60), deadline=None)
@given(
    n=st.integers(0, 420),
    d=st.integers(1, 420),
    k=st.integers(1, 420),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(n: int, d: int, k: int, dtype: torch.dtype, transposed: bool, with_bias: bool, seed: int) -> None:
    require_fused()
    torch.manual_seed(seed)
    with backend.use_backend("fused"):
        x, weight, bias = inputs(n, d, k, dtype)
        if transposed:
            x = x.t().contiguous().t()
        check_values(x, weight, bias if with_bias else None, torch.randn(n, k).to(dtype))


def test_bitwise_equal_at_any_number_of_threads(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for n, d, k in ((5000, 64, 21), (1031, 300, 400), (513, 256, 1234), (7, 2048, 1000), (40000, 8, 3)):
                x, weight, bias = inputs(n, d, k, dtype)
                grad = torch.randn(n, k).to(dtype)
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    y = multi_head_linear(x, weight, bias)
                    results.append(
                        (y, *torch.ops.torch_mtl_pyg.multi_head_linear_backward([grad], x, weight, True, True, True))
                    )
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), (dtype, n, d, k)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    x, weight, bias = inputs(501, 130, 77, torch.float32)
    y = multi_head_linear(x, weight, bias)
    for rows in (slice(0, 1), slice(3, 200), slice(499, 501)):
        assert torch.equal(multi_head_linear(x[rows], weight, bias), y[rows])
    for columns in (slice(0, 1), slice(8, 40), slice(70, 77)):
        assert torch.equal(multi_head_linear(x, weight[columns], bias[columns]), y[:, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_rows(isa: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(40, 20, 9, dtype)
    x[7, 3], x[21, 0] = float("nan"), float("inf")
    y = multi_head_linear(x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert y[7].isnan().all()
    assert torch.equal(y[21].double(), expected[21])
    others = [i for i in range(40) if i not in (7, 21)]
    assert y[others].isfinite().all()
    dw = torch.ops.torch_mtl_pyg.multi_head_linear_backward([torch.ones(40, 9, dtype=dtype)], x, weight, 0, 1, 0)[1]
    assert dw[:, 3].isnan().all() and (dw[:, 0] == float("inf")).all() and dw[:, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_conversions_are_exact(isa: str, dtype: torch.dtype) -> None:
    """Every value of a 16-bit type comes back through a head that is the identity."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[~every.isnan()].unsqueeze(1)
    y = multi_head_linear(x, torch.ones(1, 1, dtype=dtype))
    # The bfloat16 products of AVX-512 read and give subnormals as zero.
    subnormal = (x.abs() < torch.finfo(dtype).smallest_normal) & (x != 0)
    same = (y == x) | (subnormal & (y == 0) if isa == "avx512_bf16" and dtype == torch.bfloat16 else False)
    assert same.all(), x[~same]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounding_is_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Sums in float32 that lie between two values of the stored type."""
    ulp = torch.finfo(dtype).eps
    big = torch.finfo(dtype).max
    x = torch.tensor(
        [[1.0, ulp / 2], [1.0 + ulp, ulp / 2], [1.0, ulp * 0.75], [big, big], [-1.0, -ulp / 2]], dtype=dtype
    )
    y = multi_head_linear(x, torch.ones(1, 2, dtype=dtype)).flatten()
    assert torch.equal(y, x.float().sum(1).to(dtype))


def test_more_than_2_31_elements(fused: None) -> None:
    n, k = 2**21 + 3, 1030
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 7 * 2**30:
        pytest.skip(f"needs 7 GiB of free memory, there are {free / 2**30:.1f}")
    x = (torch.arange(n) % 251).to(torch.bfloat16).unsqueeze(1)
    weight = (torch.arange(k) % 8).to(torch.bfloat16).unsqueeze(1)
    y = multi_head_linear(x, weight)
    assert y.numel() > 2**31
    for rows in (slice(0, 3), slice(2**31 // k - 2, 2**31 // k + 2), slice(n - 3, n)):
        assert torch.equal(y[rows].float(), (x[rows].float() @ weight.float().t()).bfloat16().float())
    dx, dw, db = torch.ops.torch_mtl_pyg.multi_head_linear_backward([y], x, weight, True, True, True)
    rows = slice(n - 5, n)
    assert torch.allclose(dx[rows].float(), y[rows].float() @ weight.float(), rtol=2**-7)
    tail = y[:, -2:].double()
    assert torch.allclose(dw[-2:].double(), tail.t() @ x.double(), rtol=2**-7)
    assert torch.allclose(db[-2:].double(), tail.sum(0), rtol=2**-7)


@pytest.mark.parametrize("shape", [(5, 4, 0), (0, 4, 0), (5, 0, 3), (0, 0, 0)])
def test_sizes_of_zero(any_backend: str, shape: tuple[int, int, int]) -> None:
    n, d, k = shape
    x, weight, bias = torch.randn(n, d), torch.randn(k, d), torch.randn(k)
    for t in (x, weight, bias):
        t.requires_grad_()
    y = multi_head_linear(x, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(n, d))
    assert torch.equal(weight.grad, torch.zeros(k, d))
    assert torch.equal(bias.grad, torch.full((k,), float(n)))
    if any_backend == "fused" and k == 0:
        dx = torch.ops.torch_mtl_pyg.multi_head_linear_backward([], x.detach(), weight.detach(), True, True, True)[0]
        assert torch.equal(dx, torch.zeros(n, d))


# ---- Derivatives.


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("n", (1, 5))
def test_gradients_of_first_and_second_order(any_backend: str, n: int) -> None:
    arguments = (double(n, 4), double(7, 4), double(7))
    assert torch.autograd.gradcheck(multi_head_linear, arguments)
    assert torch.autograd.gradgradcheck(multi_head_linear, arguments)
    assert torch.autograd.gradgradcheck(lambda x, w: multi_head_linear(x, w), arguments[:2])


def test_gradients_of_the_registered_ops(fused: None) -> None:
    ops = torch.ops.torch_mtl_pyg
    arguments = (double(3, 4), double(7, 4), double(7))
    assert torch.autograd.gradcheck(ops.multi_head_linear, arguments)
    assert torch.autograd.gradgradcheck(ops.multi_head_linear, arguments)
    backward_arguments = (double(3, 2), double(3, 5), double(3, 4), double(7, 4))
    for needs in ((True, True, True), (True, False, True), (False, True, False), (False, False, True)):

        def backward(*tensors: Tensor, needs: tuple[bool, ...] = needs) -> tuple[Tensor, ...]:
            results = ops.multi_head_linear_backward(list(tensors[:-2]), *tensors[-2:], *needs)
            return tuple(r for r, need in zip(results, needs, strict=True) if need)

        assert torch.autograd.gradcheck(backward, backward_arguments)
        assert torch.autograd.gradgradcheck(backward, backward_arguments)


def test_third_derivative(any_backend: str) -> None:
    x, weight = double(2, 3), double(4, 3)

    def scalar(x: Tensor, weight: Tensor) -> Tensor:
        return multi_head_linear(x, weight).pow(3).sum()

    def second(x: Tensor, weight: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(scalar(x, weight), x, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        return again

    assert torch.autograd.gradcheck(second, (x, weight))


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_the_gradients_asked_for(any_backend: str, wanted: int) -> None:
    tensors = inputs(9, 6, 5, torch.float64)
    for i, t in enumerate(tensors):
        t.requires_grad_(bool(wanted >> i & 1))
    multi_head_linear(*tensors).sin().sum().backward()
    copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    torch.nn.functional.linear(*copies).sin().sum().backward()
    for t, copy in zip(tensors, copies, strict=True):
        assert (t.grad is None) == (copy.grad is None)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, copy.grad)


def test_no_graph_without_need(any_backend: str) -> None:
    x, weight, bias = inputs(4, 3, 2, torch.float32, requires_grad=True)
    with torch.no_grad():
        assert not multi_head_linear(x, weight, bias).requires_grad
    assert not multi_head_linear(x.detach(), weight.detach(), bias.detach()).requires_grad
    with torch.inference_mode():
        assert multi_head_linear(x, weight, bias).is_inference()


def test_saved_tensors_are_checked_for_changes(any_backend: str) -> None:
    x, weight, bias = inputs(4, 3, 2, torch.float32, requires_grad=True)
    y = multi_head_linear(x, weight, bias).sum()
    with torch.no_grad():
        weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_transforms_of_torch_func(any_backend: str) -> None:
    x, weight, bias = inputs(4, 3, 2, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return multi_head_linear(x, weight, bias).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and jvp loads it
        torch.testing.assert_close(
            torch.func.grad(loss)(x), torch.autograd.functional.jacobian(loss, x), check_stride=False
        )
        many = torch.randn(5, 4, 3, dtype=torch.float64)
        stacked = torch.stack([multi_head_linear(one, weight, bias) for one in many])
        torch.testing.assert_close(torch.func.vmap(lambda one: multi_head_linear(one, weight, bias))(many), stacked)
        torch.testing.assert_close(
            torch.func.jvp(loss, (x,), (x,))[1], (torch.func.grad(loss)(x) * x).sum(), check_stride=False
        )


# ---- What PyTorch knows of the ops.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fused: None, dtype: torch.dtype) -> None:
    ops = torch.ops.torch_mtl_pyg
    for n, d, k in ((3, 4, 7), (0, 4, 7), (1, 1, 1)):
        x, weight, bias = inputs(n, d, k, dtype, requires_grad=True)
        grad = torch.randn(n, k).to(dtype).requires_grad_()
        torch.library.opcheck(ops.multi_head_linear.default, (x, weight, bias))
        torch.library.opcheck(ops.multi_head_linear.default, (x.detach(), weight, None))
        torch.library.opcheck(ops.multi_head_linear_backward.default, ([grad], x, weight, True, True, True))
        torch.library.opcheck(ops.multi_head_linear_backward.default, ([grad], x, weight, False, True, False))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_to_one_graph(any_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.relu(multi_head_linear(x * 2, weight, bias)).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (5, 9):
        ours, expected = inputs(n, 4, 3, torch.float64, requires_grad=True), None
        expected = [t.detach().clone().requires_grad_() for t in ours]
        compiled(*ours).backward()
        step(*expected).backward()
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_compiles_with_inductor(fused: None) -> None:
    torch._dynamo.reset()
    x, weight, bias = inputs(33, 20, 11, torch.float32, requires_grad=True)

    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.sigmoid(multi_head_linear(torch.tanh(x), weight, bias)).square().sum()

    # Inductor's cache on disk knows an op by its name alone: it would return a graph made for an earlier schema.
    from torch._inductor import config

    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        value = torch.compile(step, fullgraph=True)(x, weight, bias)
        value.backward()
    copies = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    expected = step(*copies)
    expected.backward()
    torch.testing.assert_close(value, expected)
    for t, copy in zip((x, weight, bias), copies, strict=True):
        torch.testing.assert_close(t.grad, copy.grad, rtol=1e-4, atol=1e-5)


def test_exports(fused: None) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return multi_head_linear(x, weight)

    x, weight, _ = inputs(6, 5, 4, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(), (x, weight), dynamic_shapes=({0: torch.export.Dim("n")}, None))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "torch_mtl_pyg.multi_head_linear.default" in called
    torch.testing.assert_close(program.module()(x[:3], weight), multi_head_linear(x[:3], weight))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(any_backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(8, 6, 5, torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = multi_head_linear(x, weight, bias)
        z = torch.nn.functional.linear(x, weight, bias)
        mixed = multi_head_linear(x.to(dtype), weight, bias)
        assert multi_head_linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert y.dtype == z.dtype == mixed.dtype == dtype
    torch.testing.assert_close(y, z, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    if any_backend == "fused":
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(torch.ops.torch_mtl_pyg.multi_head_linear(x, weight, bias), y)


def test_meta_tensors(fused: None) -> None:
    x, weight, bias = (t.to("meta") for t in inputs(8, 6, 5, torch.float32))
    assert multi_head_linear(x, weight, bias).shape == (8, 5)


# ---- Bad input.

BAD: list[tuple[str, type[Exception], str, Any]] = [
    ("x no tensor", TypeError, r"x: expected a tensor \[N, 4\], got list", lambda x, w, b: ([1.0], w, b)),
    ("x 1-D", ValueError, r"x: expected shape \[N, 4\], got \[4\]", lambda x, w, b: (x[0], w, b)),
    ("x 3-D", ValueError, r"x: expected shape \[N, 4\], got \[1, 3, 4\]", lambda x, w, b: (x[None], w, b)),
    ("x too narrow", ValueError, r"x: expected shape \[N, 4\], got \[3, 3\]", lambda x, w, b: (x[:, :3], w, b)),
    ("x int64", TypeError, r"x: expected one of the dtypes .*, got int64", lambda x, w, b: (x.long(), w, b)),
    ("x complex", TypeError, r"x: .*got complex64", lambda x, w, b: (x.cfloat(), w, b)),
    ("x sparse", TypeError, r"x: expected a dense", lambda x, w, b: (x.to_sparse(), w, b)),
    ("x nested", TypeError, r"x: expected a dense", lambda x, w, b: (torch.nested.nested_tensor([x, x]), w, b)),
    ("weight 1-D", ValueError, r"weight: expected shape \[K, D\], got \[4\]", lambda x, w, b: (x, w[0], b)),
    ("weight dtype", TypeError, r"x: expected the dtype of weight, torch.float64", lambda x, w, b: (x, w.double(), b)),
    ("bias dtype", TypeError, r"bias: expected the dtype of weight, torch.float32, got torch.float16",
     lambda x, w, b: (x, w, b.half())),
    ("bias length", ValueError, r"bias: expected shape \[7\], got \[6\]", lambda x, w, b: (x, w, b[:6])),
    ("bias 2-D", ValueError, r"bias: expected shape \[7\], got \[1, 7\]", lambda x, w, b: (x, w, b[None])),
    ("devices", ValueError, r"x: expected the device of weight, meta, got cpu", lambda x, w, b: (x, w.to("meta"), b)),
    ("bias device", ValueError, r"bias: expected the device of weight, cpu, got meta",
     lambda x, w, b: (x, w, b.to("meta"))),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(("error", "message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    with pytest.raises(error, match=message):
        multi_head_linear(*change(*inputs(3, 4, 7, torch.float32)))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("weight: size of dimension 1: expected 4, got 3", lambda g, x, w: (g, x, w[:, :3])),
        ("grads: size of dimension 0: expected 3, got 2", lambda g, x, w: (g[:2], x, w)),
        ("grads: sum of the sizes of dimension 1: expected 7, got 6", lambda g, x, w: (g[:, :6], x, w)),
        ("grads: expected the dtype of x", lambda g, x, w: (g.double(), x, w)),
        ("x: expected float32", lambda g, x, w: (g, x.long(), w)),
        ("weight: expected a matrix, got 1 dimensions", lambda g, x, w: (g, x, w[0])),
    ],
)
def test_direct_calls_stay_in_bounds(fused: None, message: str, change: Any) -> None:
    x, weight, _ = inputs(3, 4, 7, torch.float32)
    grad, *others = change(torch.randn(3, 7), x, weight)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_mtl_pyg.multi_head_linear_backward([grad], *others, True, True, True)
