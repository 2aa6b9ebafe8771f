"""A GINE trunk for molecules: categories of atoms and bonds in, one embedding per molecule out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.nn import MLP, GINEConv, global_mean_pool

import torch_mtl_pyg as mtl


class CategorySum(nn.Module):
    """Sum over the columns of one embedding per category, as OGB encodes atoms and bonds.

    PyG's own ``AtomEncoder`` is this too, but asks for the package ogb and fixes the categories.

    Args:
        dims: How many categories each column has.
        channels: Size of the embedding.
    """

    offsets: Tensor

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(sum(dims), channels, mode="sum")
        nn.init.normal_(self.bag.weight, std=len(dims) ** -0.5)  # so that the sum has unit variance
        self.register_buffer("offsets", torch.tensor([0, *dims[:-1]]).cumsum(0), persistent=False)

    def forward(self, categories: Tensor) -> Tensor:
        """``[n, columns]`` int64 to ``[n, channels]``."""
        out: Tensor = self.bag(categories + self.offsets)
        return out


class GINE(nn.Module):
    """GINE layers (Hu et al. 2020, arXiv:1905.12265) with batch norm and residual connections, then a mean over atoms.

    Args:
        atom_dims: How many categories each column of ``x`` has.
        bond_dims: How many categories each column of ``edge_attr`` has.
        channels: Width of all layers and of the embedding.
        layers: Number of layers.
        dropout: Probability with which an element of the embedding is dropped in training.
    """

    def __init__(
        self, atom_dims: Sequence[int], bond_dims: Sequence[int], channels: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.atoms = CategorySum(atom_dims, channels)
        self.bonds = nn.ModuleList(CategorySum(bond_dims, channels) for _ in range(layers))
        self.convs = nn.ModuleList(
            GINEConv(MLP([channels, channels, channels], norm="batch_norm"), train_eps=True) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(layers))
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, batch_size: int) -> Tensor:
        """``[G, channels]`` for the ``G = batch_size`` molecules, of which ``batch`` tells each atom its own."""
        h = self.atoms(x)
        for bonds, conv, norm in zip(self.bonds, self.convs, self.norms, strict=True):
            h = h + F.relu(norm(conv(h, edge_index, bonds(edge_attr))))
        return F.dropout(global_mean_pool(h, batch, batch_size), self.dropout, self.training)


class MoleculeModel(nn.Module):
    """A GINE trunk and the heads of all tasks on its embedding."""

    def __init__(self, trunk: GINE, channels: int, tasks: Mapping[str, mtl.Task]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = mtl.MultiTaskHeads(channels, tasks)

    def embed(self, batch: Batch) -> Tensor:
        """The embedding ``[G, channels]`` of the molecules of a batch."""
        out: Tensor = self.trunk(batch.x, batch.edge_index, batch.edge_attr, batch.batch, batch.num_graphs)
        return out

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs ``[G, C_t]`` by task name."""
        out: dict[str, Tensor] = self.heads(self.embed(batch))
        return out
