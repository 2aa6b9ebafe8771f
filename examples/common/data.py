"""The graphs of the demo, each with three node-level tasks: scikit-learn's digits, and Planetoid's Cora."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import index_to_mask, to_undirected

from .tasks import NodeTask, standardise
from .trunks import SparseInputAPPNP

PLANETOID_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")


@dataclass(frozen=True)
class MultiTaskGraph:
    """A graph, its tasks, and how to train on it.

    Args:
        name: Name of the data set.
        data: ``x`` ``[N, F]``, ``edge_index`` ``[2, E]`` and the boolean ``train_mask``, ``val_mask``, ``test_mask``.
        tasks: Task name to task; all tasks share the masks.
        trunk: Makes the GNN trunk: ``trunk() (x, edge_index) -> [N, hidden]``.
        hidden: Width of the shared embedding.
        lr: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        epochs: Number of training epochs unless the user says otherwise.
    """

    name: str
    data: Data
    tasks: dict[str, NodeTask]
    trunk: Callable[[], nn.Module]
    hidden: int
    lr: float
    weight_decay: float
    epochs: int


def left_half_graph(images: NDArray[np.float64], k: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and edges from the left half of each image; the right half is never looked at.

    Args:
        images: ``[N, 8, 8]``, intensities 0 to 16.
        k: Nearest neighbours of a node, by Euclidean distance of the left halves.

    Returns:
        ``x`` ``[N, 32]`` in 0 to 1 and the undirected ``edge_index`` ``[2, E]``.
    """
    left = images[:, :, :4].reshape(len(images), 32)
    # Without an argument, kneighbors leaves each point out of its own neighbours.
    # The tree's distances of whole numbers are exact, so ties do not depend on the number of threads.
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="kd_tree").fit(left).kneighbors(return_distance=False)
    source = torch.from_numpy(neighbours).reshape(-1)
    target = torch.arange(len(images)).repeat_interleave(k)
    return torch.from_numpy(left / 16).float(), to_undirected(torch.stack([source, target]), num_nodes=len(images))


def has_hole(image: NDArray[np.float64]) -> bool:
    """Whether ink encloses background: pixels below half intensity that no 4-connected path joins to the outside."""
    background = np.pad(image < 8, 1, constant_values=True)
    return bool(ndimage.label(background)[1] > 1)


def digits(seed: int) -> MultiTaskGraph:
    """1,797 handwritten digits of 8 x 8 pixels; a node sees the left half, the tasks are about the whole or the right.

    Args:
        seed: Draws the split, stratified by digit: 10 % train, 20 % validation, 70 % test.
    """
    images, digit = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    x, edge_index = left_half_graph(images)
    nodes = np.arange(len(images))
    train, rest = train_test_split(nodes, train_size=0.1, stratify=digit, random_state=seed)
    val, test = train_test_split(rest, train_size=2 / 9, stratify=digit[rest], random_state=seed)
    masks = [index_to_mask(torch.from_numpy(part), len(images)) for part in (train, val, test)]
    hole = torch.tensor([has_hole(image) for image in images], dtype=torch.float)
    ink = standardise(torch.from_numpy(images[:, :, 4:].mean(axis=(1, 2))), masks[0])
    return MultiTaskGraph(
        name="digits",
        data=Data(x=x, edge_index=edge_index, train_mask=masks[0], val_mask=masks[1], test_mask=masks[2]),
        tasks={
            "digit": NodeTask("multi-class", torch.from_numpy(digit), 1.0, "which digit, 0 to 9"),
            "hole": NodeTask("binary", hole, 1.0, "whether the ink encloses background, anywhere in the whole image"),
            "ink": NodeTask("regression", ink, 1.0, "mean intensity of the right half"),
        },
        trunk=lambda: GraphSAGE(32, hidden_channels=64, num_layers=2, out_channels=64, dropout=0.5),
        hidden=64,
        lr=0.01,
        weight_decay=5e-4,
        epochs=100,
    )


def planetoid_files(name: str) -> list[str]:
    """The raw files of Planetoid's ``name``."""
    return [f"{name}/raw/ind.{name.lower()}.{part}" for part in PLANETOID_PARTS]


def read_planetoid(root: Path, name: str) -> Data:
    """``"Cora"`` or ``"CiteSeer"`` from the raw files below ``root``, which is only read.

    PyG writes its processed file beside the raw ones, so they are copied to a temporary folder first.

    Raises:
        ValueError: If a raw file is missing; the message lists the files looked for.
    """
    files = planetoid_files(name)
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        wanted = "\n".join(f"  {root / file}{'  (missing)' if file in missing else ''}" for file in files)
        raise ValueError(f"root must hold the raw files of Planetoid's {name}; looked for\n{wanted}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{name}/raw").mkdir(parents=True)
        for file in files:
            shutil.copyfile(root / file, Path(folder) / file)
        return Planetoid(folder, name)[0]


def cora(root: Path) -> MultiTaskGraph:
    """2,708 papers with their words and citations, in the public split (140 train, 500 validation, 1,000 test).

    The two structural targets are computed from the citation graph without self-loops, duplicate or directed edges.
    """
    data = read_planetoid(root, "Cora")
    n = data.num_nodes
    adjacency = torch.zeros(n, n)
    adjacency[data.edge_index[0], data.edge_index[1]] = 1
    adjacency.fill_diagonal_(0)
    in_triangle = ((adjacency @ adjacency) * adjacency).sum(dim=1) > 0
    degree = standardise(torch.log1p(adjacency.sum(dim=1)), data.train_mask)
    # Row-normalised word counts, kept sparse: 1.3 % of the 2708 x 1433 entries are set.
    data.x = (data.x / data.x.sum(dim=1, keepdim=True).clamp(min=1)).to_sparse().coalesce()
    return MultiTaskGraph(
        name="cora",
        data=data,
        tasks={
            "subject": NodeTask("multi-class", data.y, 1.0, "which of 7 research topics"),
            "triangle": NodeTask("binary", in_triangle.float(), 0.1, "whether two papers linked to it are linked too"),
            "degree": NodeTask("regression", degree, 0.1, "log(1 + number of linked papers)"),
        },
        trunk=lambda: SparseInputAPPNP(1433, hidden_channels=32, dropout=0.5),
        hidden=32,
        lr=0.02,
        weight_decay=5e-4,
        epochs=100,
    )
