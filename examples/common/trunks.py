"""A trunk that PyG does not ship: APPNP on sparse inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import APPNP


class SparseInputAPPNP(nn.Module):
    """Two linear layers, then ten steps of personalised PageRank (Gasteiger et al., 2019, https://arxiv.org/abs/1810.05997).

    ``z = PPR(W2 dropout(relu(W1 dropout(x))))``. The propagation commutes with a linear head, so a head on this trunk
    is the APPNP model of the paper for its task.

    Shapes: ``x`` sparse COO ``[N, in_channels]``, coalesced; ``edge_index`` ``[2, E]``, the same one in every call
    since its normalisation is cached; result ``[N, hidden_channels]``.
    """

    def __init__(self, in_channels: int, hidden_channels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.lin1 = nn.Linear(in_channels, hidden_channels)
        self.lin2 = nn.Linear(hidden_channels, hidden_channels)
        self.propagate = APPNP(K=10, alpha=0.1, cached=True)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Embeds the nodes; in training mode each stored entry of ``x`` is dropped with probability ``dropout``."""
        values = F.dropout(x.values(), self.dropout, self.training)
        x = torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
        hidden = F.dropout(F.relu(self.lin1(x)), self.dropout, self.training)
        out: Tensor = self.propagate(self.lin2(hidden), edge_index)
        return out
