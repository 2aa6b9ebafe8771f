"""What the tests of the graph layers share."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import GCNConv

import torch_mtl_pyg as mtl

with warnings.catch_warnings():  # PyTorch warns of the first ones: that they are new, and not checked
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0])

TASKS: dict[str, Any] = {"subject": mtl.Task(7, loss="cross_entropy"), "toxic": 1, "degree": mtl.Task(2, loss="mse")}


def graph(n: int = 17, edges: int = 60, seed: int = 0, num_dst: int | None = None) -> Tensor:
    """``[2, E]``: random, with a hub, an edge that occurs three times, loops (one twice), and nodes without edges."""
    generator = torch.Generator().manual_seed(seed)
    m = n if num_dst is None else num_dst
    source = torch.randint(0, max(1, n - 2), (edges,), generator=generator)
    target = torch.randint(0, max(1, m - 2), (edges,), generator=generator)
    hub = torch.arange(min(n, m))
    pairs = [torch.stack((source, target)), torch.stack((hub, torch.ones_like(hub)))]
    pairs.append(torch.tensor([[2, 2, 2, 3, 3, 4], [0, 0, 0, 3, 3, 4]]))
    edge_index = torch.cat(pairs, dim=1)
    return edge_index[:, torch.randperm(edge_index.shape[1], generator=generator)]


def without_duplicates(edge_index: Tensor) -> Tensor:
    return torch.unique(edge_index, dim=1).contiguous()


def adj_t(edge_index: Tensor, n: int, weight: Tensor | None = None, num_dst: int | None = None) -> Tensor:
    """The transposed adjacency matrix, dense. Edges are different from each other."""
    values = torch.ones(edge_index.shape[1], dtype=torch.float64) if weight is None else weight
    return torch.zeros(num_dst or n, n, dtype=values.dtype).index_put((edge_index[1], edge_index[0]), values)


def formats(edge_index: Tensor, n: int, num_dst: int | None = None) -> dict[str, Any]:
    """The same graph in every format; edges are different from each other. Matrices hold float64 ones."""
    m = num_dst or n
    size = (n, m)
    by_row = edge_index[:, torch.argsort(edge_index[0], stable=True)].contiguous()
    by_col = edge_index[:, torch.argsort(edge_index[1], stable=True)].contiguous()
    dense = adj_t(edge_index, n, num_dst=num_dst)
    return {
        "tensor": edge_index,
        "tensor by row": by_row,
        "tensor by col": by_col,
        "int32": edge_index.int(),
        "strided": torch.stack((edge_index.t().contiguous(), edge_index.t() + 1), dim=-1)[..., 0].t(),
        "EdgeIndex": EdgeIndex(edge_index),
        "EdgeIndex of a size": EdgeIndex(edge_index, sparse_size=size),
        "EdgeIndex by row": EdgeIndex(by_row, sparse_size=size, sort_order="row"),
        "EdgeIndex by col": EdgeIndex(by_col, sparse_size=size, sort_order="col"),
        "EdgeIndex int32": EdgeIndex(by_col.int(), sparse_size=size, sort_order="col"),
        "coo": dense.to_sparse_coo(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
    }


def check_grouping(grouping: Any, key: Tensor, other: Tensor, num_keys: int) -> None:
    """Against a loop over the edges."""
    ptr, index, perm = grouping
    assert ptr.dtype == index.dtype == torch.int64 and ptr.shape == (num_keys + 1,)
    places = list(range(len(key))) if perm is None else perm.tolist()
    for k in range(num_keys):
        mine = [e for e, own in enumerate(key.tolist()) if own == k]
        begin, end = int(ptr[k]), int(ptr[k + 1])
        assert places[begin:end] == mine
        assert index[begin:end].tolist() == other[mine].tolist()
    assert sorted(places) == list(range(len(key)))


def assert_same_training(
    conv: mtl.MultiTaskConv,
    singles: dict[str, Any],
    x: Any,
    edge_index: Any,
    edge_weight: Tensor | None = None,
    size: Any = None,
    **tolerance: float,
) -> None:
    """Outputs and all gradients of a layer are those of one PyG layer per task.

    ``x`` is a tensor, or a pair.
    """
    pair = isinstance(x, tuple)
    leaves = [t.detach().clone().requires_grad_() for t in (x if pair else (x,)) if t is not None]
    if edge_weight is not None:
        edge_weight = edge_weight.detach().clone().requires_grad_()
    inputs = leaves + ([] if edge_weight is None else [edge_weight])
    given = (leaves[0], leaves[1] if len(leaves) > 1 else None) if pair else leaves[0]
    extra = {} if edge_weight is None else {"edge_weight": edge_weight}
    sized = {} if size is None else {"size": size}
    out = conv(given, edge_index, **extra, **sized)
    expected = {name: single(given, edge_index, **extra, **sized) for name, single in singles.items()}
    assert list(out) == list(singles)
    for name in out:
        torch.testing.assert_close(out[name], expected[name], **tolerance)
    conv.zero_grad()
    mine = torch.autograd.grad(
        sum(o.sin().sum() for o in out.values()), [*inputs, *conv.parameters()], allow_unused=True
    )
    own = [p for single in singles.values() for p in single.parameters()]
    theirs = torch.autograd.grad(sum(o.sin().sum() for o in expected.values()), [*inputs, *own], allow_unused=True)
    for a, b in zip(mine[: len(inputs)], theirs[: len(inputs)], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)
    gradient_of = {id(p): g for p, g in zip(own, theirs[len(inputs) :], strict=True)}
    gradients = dict(zip((name for name, _ in conv.named_parameters()), mine[len(inputs) :], strict=True))
    for i, (name, single) in enumerate(singles.items()):
        parts = (
            {"weight": single.lin.weight, "bias": single.bias}
            if isinstance(single, GCNConv)
            else {
                "weight": single.lin_l.weight,
                "bias": single.lin_l.bias,
                "weight_root": single.lin_r.weight if single.root_weight else None,
            }
        )
        for kind, parameter in parts.items():
            if parameter is None:
                continue
            got = gradients[f"{kind}.{i}"] if f"{kind}.{i}" in gradients else gradients[kind][conv.slices[name]]
            torch.testing.assert_close(got, gradient_of[id(parameter)], **tolerance)
