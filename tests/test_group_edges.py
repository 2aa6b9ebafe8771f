"""The op group_edges: values, layouts, determinism, what PyTorch knows of it, bad input."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require_fused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_mtl_pyg import backend
from torch_mtl_pyg.ops import group_edges, reference_graph

DTYPES = (torch.int64, torch.int32)
# Edges, keys: around the limits of a few keys (1024), a few edges (2^14), buckets (2^12 edges, 2^10 of them), and
# shares of the threads (2^14 edges).
SHAPES = (
    *((e, 7) for e in (1, 2, 3, 511, 512, 513, 514, 1025, 16383, 16384, 32769, 50000)),
    *((70000, k) for k in (1, 2, 1023, 1024, 1025, 1026, 2047, 2048, 2049, 4097, 65536, 65537, 300001)),
    *((16384, k) for k in (1025, 16384, 16385)),
    *((16385, k) for k in (1025, 16384, 16385)),
    (3, 2_000_003),
    (200_000, 3_000_017),
)
SKEWS = ("uniform", "power", "hub", "last", "sorted", "nearly sorted", "reversed", "constant")


def keys(e: int, num_keys: int, skew: str, dtype: torch.dtype = torch.int64) -> Tensor:
    uniform = torch.randint(num_keys, (e,))
    few = torch.rand(e) < 0.1
    hub = num_keys // 2
    key = {
        "uniform": lambda: uniform,
        "power": lambda: (num_keys ** torch.rand(e, dtype=torch.float64)).long().clamp(max=num_keys - 1),
        "hub": lambda: torch.where(few, uniform, hub),
        "last": lambda: torch.where(few, uniform, num_keys - 1),
        "sorted": lambda: uniform.sort()[0],
        "nearly sorted": lambda: torch.cat([uniform[:-1].sort()[0], uniform[-1:]]),
        "reversed": lambda: uniform.sort(descending=True)[0],
        "constant": lambda: torch.full((e,), hub),
    }[skew]()
    return key.to(dtype)


def oracle(key: Tensor, other: Tensor, num_keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, o = key.numpy().astype(np.int64), other.numpy().astype(np.int64)
    perm = np.argsort(k, kind="stable")
    ptr = np.concatenate([[0], np.cumsum(np.bincount(k, minlength=num_keys))])
    return ptr, o[perm], perm


def check(key: Tensor, other: Tensor, num_keys: int, num_others: int) -> tuple[Tensor, Tensor, Tensor]:
    result = group_edges(key, other, num_keys, num_others)
    for ours, expected in zip(result, oracle(key, other, num_keys), strict=True):
        assert ours.dtype == torch.int64 and ours.is_contiguous()
        np.testing.assert_array_equal(ours.numpy(), expected)
    return result


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skew", SKEWS)
def test_values(any_backend: str, skew: str, dtype: torch.dtype) -> None:
    for e, num_keys in SHAPES:
        result = check(keys(e, num_keys, skew, dtype), other := torch.randint(99, (e,)).to(dtype), num_keys, 99)
        assert torch.equal(result[1], other[result[2]].long())


@pytest.mark.parametrize("skew", SKEWS)
def test_equal_at_any_number_of_threads(fused: None, threads: Any, skew: str) -> None:
    for e, num_keys in ((10_000, 900), (150_000, 900), (150_000, 5000), (400_000, 70_000), (40_000, 2_000_000)):
        key, other = keys(e, num_keys, skew), torch.randint(num_keys, (e,))
        expected = reference_graph.group_edges(key, other, num_keys)
        for count in (1, 2, 3, 5, 16):
            threads(count)
            result = group_edges(key, other, num_keys, num_keys)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), (e, num_keys, count)


@settings(max_examples=150, deadline=None)
@given(
    e=st.one_of(st.integers(1, 50), st.integers(1, 60_000)),
    num_keys=st.one_of(st.integers(1, 50), st.integers(1, 60_000)),
    num_others=st.sampled_from((1, 2, 1000, 2**31, 2**40, 2**62)),
    skew=st.sampled_from(SKEWS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", "rows", "columns", "slices", "expanded")),
    seed=st.integers(0, 2**31),
)
def test_any_edges(
    e: int, num_keys: int, num_others: int, skew: str, dtype: torch.dtype, layout: str, seed: int
) -> None:
    require_fused()
    torch.manual_seed(seed)
    key = keys(e, num_keys, skew, dtype)
    num_others = min(num_others, torch.iinfo(dtype).max)
    other = torch.randint(num_others, (e,)).to(dtype)
    if layout == "rows":
        key, other = torch.stack([key, other])
    elif layout == "columns":
        key, other = torch.stack([key, other], 1).t()
        assert key.stride() == (2,)
    elif layout == "slices":
        key, other = key.repeat_interleave(3)[1::3], other.repeat_interleave(2)[::2]
    elif layout == "expanded":
        key, other = key[:1].expand(e), other[:1].expand(e)
    with backend.use_backend("fused"):
        check(key, other, num_keys, num_others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_keys", (0, 1, 5, 100_000))
@pytest.mark.parametrize("num_others", (0, 3))
def test_no_edges(any_backend: str, num_keys: int, num_others: int, dtype: torch.dtype) -> None:
    nothing = torch.empty(0, dtype=dtype)
    ptr, index, perm = group_edges(nothing, nothing, num_keys, num_others)
    assert torch.equal(ptr, torch.zeros(num_keys + 1, dtype=torch.int64))
    assert index.shape == perm.shape == (0,) and index.dtype == perm.dtype == torch.int64


def test_edges_too_wide_for_one_word(fused: None, threads: Any) -> None:
    """Position, other end and key within a bucket take more than 64 bits."""
    for count in (1, 3):
        threads(count)
        for skew in SKEWS:
            e, num_keys = 300_000, 40_000
            check(keys(e, num_keys, skew), torch.randint(2**62, (e,)), num_keys, 2**62)
    others = torch.tensor([2**63 - 2, 0, 2**63 - 2, 5])
    check(torch.tensor([60_000, 59_999, 0, 60_000]), others, 60_001, 2**63 - 1)


def test_arguments_are_left_alone(any_backend: str) -> None:
    key, other = keys(70_000, 3000, "uniform"), torch.randint(9, (70_000,))
    copies = key.clone(), other.clone()
    first = group_edges(key, other, 3000, 9)
    assert torch.equal(key, copies[0]) and torch.equal(other, copies[1])
    again = group_edges(first[1], first[1], 9, 9)
    assert torch.equal(first[1], other[first[2]]) and again[0][-1] == 70_000
    ordered = key.sort()[0]
    _, index, _ = group_edges(ordered, other, 3000, 9)
    assert torch.equal(index, other) and index.data_ptr() != other.data_ptr()


def test_large_graph(fused: None) -> None:
    e, num_keys = 5_000_000, 2_000_000
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 2**30:
        pytest.skip(f"needs 1 GiB of free memory, there are {free / 2**30:.1f}")
    key, other = torch.randint(num_keys, (e,)), torch.arange(e)
    ptr, index, perm = group_edges(key, other, num_keys, e)
    assert torch.equal(index, perm)
    grouped = key[perm]
    # Sorted, stable, and with the right numbers: only one permutation is.
    step = grouped.diff()
    assert (step >= 0).all() and (perm.diff()[step == 0] > 0).all()
    assert torch.equal(ptr[1:] - ptr[:-1], torch.bincount(key, minlength=num_keys)) and ptr[0] == 0
    seen = torch.zeros(e, dtype=torch.bool)
    seen[perm] = True
    assert seen.all()


# ---- What PyTorch knows of the op.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(fused: None, dtype: torch.dtype) -> None:
    for e, num_keys in ((0, 0), (0, 4), (9, 4), (3000, 1500)):
        key, other = keys(e, max(1, num_keys), "uniform", dtype), torch.randint(5, (e,)).to(dtype)
        torch.library.opcheck(torch.ops.torch_mtl_pyg.group_edges.default, (key, other, num_keys, 5))
        torch.library.opcheck(torch.ops.torch_mtl_pyg.group_edges.default, (key.sort()[0], other, num_keys, 5))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_to_one_graph(any_backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def degrees(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
        ptr, index, perm = group_edges(edge_index[1], edge_index[0], num_nodes, num_nodes)
        return ptr.diff() * 2, index + 1, perm

    compiled = torch.compile(degrees, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for e, n in ((30, 9), (50, 7), (70, 8)):
        edge_index = torch.randint(n, (2, e))
        for ours, expected in zip(compiled(edge_index, n), degrees(edge_index, n), strict=True):
            assert torch.equal(ours, expected)


def test_one_graph_for_every_size(fused: None) -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(group_edges, fullgraph=True, dynamic=True, backend=counter)
    for e, n in ((30, 9), (50, 7), (70, 8)):
        key = torch.randint(n, (e,))
        assert torch.equal(compiled(key, key, n, n)[0], group_edges(key, key, n, n)[0])
    assert counter.frame_count == 1


def test_compiles_with_inductor(fused: None) -> None:
    torch._dynamo.reset()
    from torch._inductor import config

    key, other = torch.randint(50, (400,)), torch.randint(60, (400,))

    def degrees(key: Tensor, other: Tensor) -> Tensor:
        ptr, index, perm = group_edges(key, other, 50, 60)
        return (index * perm).float().sum() + ptr.diff().float().square().sum()

    with warnings.catch_warnings(), config.patch(force_disable_caches=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(degrees, fullgraph=True)
        torch.testing.assert_close(compiled(key, other), degrees(key, other))
        with pytest.raises(RuntimeError, match=r"edge_index: expected key in \[0, 50\), got 50 at edge 3"):
            compiled(torch.where(torch.arange(400) == 3, 50, key), other)


def test_exports(fused: None) -> None:
    class Group(torch.nn.Module):
        def forward(self, key: Tensor, other: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return group_edges(key, other, x.shape[0], x.shape[0])

    key, x = torch.randint(9, (40,)), torch.randn(9, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edges, nodes = torch.export.Dim("edges"), torch.export.Dim("nodes")
        program = torch.export.export(Group(), (key, key, x), dynamic_shapes=({0: edges}, {0: edges}, {0: nodes}))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "torch_mtl_pyg.group_edges.default" in called
    key, x = torch.randint(12, (30,)), torch.randn(12, 2)
    for ours, expected in zip(program.module()(key, key, x), group_edges(key, key, 12, 12), strict=True):
        assert torch.equal(ours, expected)


def test_meta_tensors(any_backend: str) -> None:
    key = torch.randint(4, (9,), device="meta")
    ptr, index, perm = group_edges(key, key, 4, 4)
    assert ptr.shape == (5,) and index.shape == perm.shape == (9,)
    assert ptr.dtype == index.dtype == perm.dtype == torch.int64 and perm.is_meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_nothing_is_missing(any_backend: str, dtype: torch.dtype) -> None:
    """PyTorch's own sort is the compiled form there: no warning, and no error with the fused backend."""
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        key = torch.empty(9, dtype=dtype, device="cuda")
        ptr, index, perm = group_edges(key, key, 4, 4)
    assert ptr.shape == (5,) and index.shape == perm.shape == (9,)
    assert all(t.dtype == torch.int64 and t.device.type == "cuda" for t in (ptr, index, perm))


def test_inside_transforms_of_torch_func(any_backend: str) -> None:
    """The edges are the same for every element of a batch."""
    key, other = torch.randint(4, (9,)), torch.randint(5, (9,))

    def total(x: Tensor) -> Tensor:
        ptr, index, _ = group_edges(key, other, 4, 5)
        return (x[index] * ptr[1]).sum()

    x = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.stack([total(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(total)(x), expected)
    torch.testing.assert_close(torch.func.grad(total)(x[0]).dot(x[0]), expected[0])


# ---- Bad input.

BAD_VALUES = (-1, 2**40, -(2**63), 2**63 - 1)


@pytest.mark.parametrize("skew", ("uniform", "sorted"))
@pytest.mark.parametrize(("e", "num_keys"), ((9, 4), (40_000, 4), (40_000, 5000), (10, 100_000)))
def test_ends_out_of_range(any_backend: str, threads: Any, e: int, num_keys: int, skew: str) -> None:
    for count in (1, 3):
        threads(count)
        for edge in (0, e // 2, e - 1):
            for value in (*BAD_VALUES, num_keys):
                key, other = keys(e, num_keys, skew), torch.randint(6, (e,))
                key[edge] = value
                with pytest.raises(IndexError, match=rf"key: .* \[0, {num_keys}\), got {value} at edge {edge}\."):
                    group_edges(key, other, num_keys, 6)
            for value in (*BAD_VALUES, 6):
                key, other = keys(e, num_keys, skew), torch.randint(6, (e,))
                other[edge] = value
                with pytest.raises(IndexError, match=rf"other: .* \[0, 6\), got {value} at edge {edge}\."):
                    group_edges(key, other, num_keys, 6)


def test_the_first_bad_edge_is_named(any_backend: str) -> None:
    key, other = keys(50_000, 3000, "uniform", torch.int32), torch.randint(6, (50_000,), dtype=torch.int32)
    key[[777, 40_000]], other[[778, 49_999]] = -3, 9
    with pytest.raises(IndexError, match=r"key: expected values in \[0, 3000\), got -3 at edge 777\."):
        group_edges(key, other, 3000, 6)
    other[777] = 7
    with pytest.raises(IndexError, match=r"key: .* got -3 at edge 777\."):
        group_edges(key, other, 3000, 6)
    other[5] = -(2**31)
    with pytest.raises(IndexError, match=r"other: .* got -2147483648 at edge 5\."):
        group_edges(key, other, 3000, 6)


@pytest.mark.parametrize(("num_keys", "num_others"), ((0, 4), (4, 0), (0, 0)))
def test_edges_without_nodes(any_backend: str, num_keys: int, num_others: int) -> None:
    with pytest.raises(IndexError, match=r"expected values in \[0, 0\), got 3 at edge 0"):
        group_edges(torch.tensor([3, 3]), torch.tensor([3, 3]), num_keys, num_others)


BAD: list[tuple[str, type[Exception], str, Any]] = [
    ("key no tensor", TypeError, r"key: expected a tensor \[E\], got list", lambda k, o: ([1], o, 4, 4)),
    ("other no tensor", TypeError, r"other: expected a tensor \[3\], got list", lambda k, o: (k, [1], 4, 4)),
    ("key float", TypeError, r"key: expected int64 or int32, got float32", lambda k, o: (k.float(), o, 4, 4)),
    ("other bool", TypeError, r"other: expected int64 or int32, got bool", lambda k, o: (k, o.bool(), 4, 4)),
    ("dtypes", TypeError, r"other: expected the dtype of key, torch.int64", lambda k, o: (k, o.int(), 4, 4)),
    ("sparse", TypeError, r"key: expected a dense", lambda k, o: (k.to_sparse(), o, 4, 4)),
    ("key 2-D", ValueError, r"key: expected shape \[E\], got \[1, 3\]", lambda k, o: (k[None], o, 4, 4)),
    ("key 0-D", ValueError, r"key: expected shape \[E\], got \[\]", lambda k, o: (k[0], o, 4, 4)),
    ("lengths", ValueError, r"other: expected shape \[3\], got \[2\]", lambda k, o: (k, o[1:], 4, 4)),
    ("devices", ValueError, r"other: expected the device of key, cpu, got meta",
     lambda k, o: (k, o.to("meta"), 4, 4)),
    ("num_keys", ValueError, r"num_keys: expected a size of at least 0, got -1", lambda k, o: (k, o, -1, 4)),
    ("num_others", ValueError, r"num_others: expected a size of at least 0, got -1", lambda k, o: (k, o, 4, -1)),
    ("num_keys float", TypeError, r"num_keys: expected an integer, got float", lambda k, o: (k, o, 4.0, 4)),
    ("num_others bool", TypeError, r"num_others: expected an integer, got bool", lambda k, o: (k, o, 4, True)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(any_backend: str, error: type[Exception], message: str, change: Any) -> None:
    with pytest.raises(error, match=message):
        group_edges(*change(torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("key: expected int64 or int32", lambda k, o: (k.float(), o, 4, 4)),
        ("other: expected the dtype of key", lambda k, o: (k, o.int(), 4, 4)),
        ("key: expected a CPU vector", lambda k, o: (k[None], o, 4, 4)),
        ("other: expected a CPU vector", lambda k, o: (k, o[0], 4, 4)),
        ("other: size of dimension 0: expected 3, got 2", lambda k, o: (k, o[1:], 4, 4)),
        ("num_keys: expected a size of at least 0, got -1", lambda k, o: (k, o, -1, 4)),
        ("num_keys: expected a size", lambda k, o: (k, o, 2**63 - 1, 4)),
        ("num_others: expected a size of at least 0, got -1", lambda k, o: (k, o, 4, -1)),
        (r"edge_index: expected key in \[0, 3\), got 3 at edge 2", lambda k, o: (k, o, 3, 4)),
        (r"edge_index: expected other in \[0, 2\), got 2 at edge 1", lambda k, o: (k, o, 4, 2)),
        (r"edge_index: expected key in \[0, 4\), got -1 at edge 0", lambda k, o: (k - 1, o, 4, 4)),
    ],
)
def test_direct_calls_stay_in_bounds(fused: None, message: str, change: Any) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_mtl_pyg.group_edges(*change(torch.tensor([0, 1, 3]), torch.tensor([1, 2, 0])))
