"""MoleculeNet's sets of molecules as one packed structure, from which batches are gathered without a loop.

PyG's ``DataLoader`` over a list of ``Data`` collates each batch molecule by molecule. Here all molecules lie behind
each other, and a batch is a few gathers (:meth:`Molecules.batch`), in about a quarter of the time: 1 ms for 128
molecules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, Dataset
from torch_geometric.datasets import MoleculeNet
from torch_geometric.utils.smiles import e_map, x_map

SPLITS = ("random", "scaffold")
PARTS = ("train", "val", "test")
_FIELDS = ("x", "edge_index", "edge_attr", "node_ptr", "edge_ptr", "y")
_KEYS = (*_FIELDS, "task_names", "atom_feature_dims", "bond_feature_dims", *(f"split_{name}" for name in SPLITS))

# PyG's MoleculeNet does not name its label columns; these are the ones of the file it reads.
TASKS = {
    "tox21": (
        *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
        *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
    )
}


@dataclass(frozen=True)
class Molecules:
    """All molecules of a set, behind each other: molecule ``i`` has the atoms ``node_ptr[i]:node_ptr[i + 1]``.

    Args:
        name: Name of the set, in lower case.
        x: ``[N, 9]`` int64, categories of the atoms.
        edge_index: ``[2, E]`` int64, both directions of every bond; atoms counted from 0 within their molecule.
        edge_attr: ``[E, 3]`` int64, categories of the bonds.
        node_ptr: ``[G + 1]`` int64.
        edge_ptr: ``[G + 1]`` int64, likewise for the bonds.
        y: ``[G, T]`` float32, NaN where a label is missing.
        task_names: The ``T`` names.
        atom_dims: How many categories each column of ``x`` has.
        bond_dims: How many categories each column of ``edge_attr`` has.
        part: ``[G]``: 0 training, 1 validation, 2 test.
        scale: ``[T]`` float64: what one unit of ``y`` is in the units of the file; None: the same.
    """

    name: str
    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor
    task_names: tuple[str, ...]
    atom_dims: tuple[int, ...]
    bond_dims: tuple[int, ...]
    part: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return self.y.shape[0]

    def to(self, device: torch.device) -> Molecules:
        """The same on another device."""
        return replace(self, **{field: getattr(self, field).to(device) for field in (*_FIELDS, "part")})

    def only(self, task: str) -> Molecules:
        """The same molecules with the labels of one task, those without a label left in."""
        column = self.task_names.index(task)
        one = slice(column, column + 1)
        scale = None if self.scale is None else self.scale[one]
        return replace(self, y=self.y[:, one], task_names=(task,), scale=scale)

    def standardised(self) -> Molecules:
        """The same molecules with labels ``(y - mean) / std``, both of the labels of the training molecules alone.

        Raises:
            ValueError: The labels of a task are all equal in training, or there are fewer than two.
        """
        columns = self.y[self.indices("train")].double().unbind(1)
        known = [column[~column.isnan()] for column in columns]
        for name, labels in zip(self.task_names, known, strict=True):
            if len(labels) < 2 or bool((labels == labels[0]).all()):
                raise ValueError(f"{self.name}: expected two different training labels of {name!r}, got fewer.")
        mean, std = (torch.stack([getattr(labels, f)() for labels in known]) for f in ("mean", "std"))
        return replace(self, y=((self.y.double() - mean) / std).float(), scale=std)

    def indices(self, part: str) -> Tensor:
        """The molecules of ``"train"``, ``"val"`` or ``"test"``."""
        return (self.part == PARTS.index(part)).nonzero()[:, 0]

    def batch(self, index: Tensor) -> Batch:
        """The molecules ``index``, in that order, as a PyG batch with ``x``, ``edge_index``, ``edge_attr``, ``y``."""
        nodes, node_ptr, owner = _rows(self.node_ptr, index)
        edges, _, edge_owner = _rows(self.edge_ptr, index)
        return Batch(
            x=self.x[nodes],
            edge_index=self.edge_index[:, edges] + node_ptr[edge_owner],
            edge_attr=self.edge_attr[edges],
            y=self.y[index],
            batch=owner,
            ptr=node_ptr,
        )

    def batches(self, index: Tensor, size: int, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of ``size`` molecules, the last one smaller.

        With ``shuffle`` in random order, for training: a last batch of one molecule, in which batch norm may have a
        single atom, is left out.
        """
        if shuffle is not None:
            index = index[torch.randperm(len(index), generator=shuffle).to(index.device)]
            index = index[: len(index) - (len(index) % size == 1)]
        for part in index.split(size):
            yield self.batch(part)


def _rows(ptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the molecules ``index``; where each one's rows start in the batch; which of them owns a row."""
    sizes = ptr[index + 1] - ptr[index]
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    owner = torch.repeat_interleave(sizes)
    rows = torch.arange(len(owner), device=ptr.device) + (ptr[index] - starts[:-1])[owner]
    return rows, starts, owner


def load_molecules(root: Path, name: str, split: str) -> Molecules:
    """Reads ``root/name/name.npz``; without it, PyG's ``MoleculeNet``, which needs the network once, and rdkit.

    Args:
        root: Folder of the sets.
        name: ``"tox21"``, ``"toxcast"`` or ``"qm8"``.
        split: ``"random"`` (80 / 10 / 10 %, always the same) or ``"scaffold"`` (molecules of one Bemis-Murcko scaffold
            stay together, the largest groups in training).

    Raises:
        ValueError: There is neither a readable npz nor a MoleculeNet; the message names both ways.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}.")
    path = root / name / f"{name}.npz"
    if path.is_file():
        return _from_npz(path, name, split)
    if name not in MoleculeNet.names:
        raise ValueError(f"{name}: expected the file {path}, which is not there; PyG's MoleculeNet has no such set.")
    try:
        return from_moleculenet(MoleculeNet(str(root), name), name, split)
    except Exception as error:  # whatever the download, the parser of SMILES or the disk raise
        raise ValueError(
            f"{name}: found neither the file {path} nor a way to make PyG's MoleculeNet in {root / name}, which needs "
            f"rdkit (pip install rdkit) and the network: {type(error).__name__}: {error}"
        ) from error


def _from_npz(path: Path, name: str, split: str) -> Molecules:
    # Read once: an NpzFile decompresses an array at every access.
    with np.load(path, allow_pickle=False) as file:
        missing = [key for key in _KEYS if key not in file]
        if missing:
            raise ValueError(f"{path}: expected the arrays {', '.join(_KEYS)}, got none named {', '.join(missing)}.")
        arrays = {key: file[key] for key in _KEYS}
    tensors = {key: torch.from_numpy(arrays[key]).long() for key in _FIELDS if key != "y"}
    return Molecules(
        name=name,
        **tensors,
        y=torch.from_numpy(arrays["y"]).float(),
        task_names=tuple(arrays["task_names"].tolist()),
        atom_dims=tuple(arrays["atom_feature_dims"].tolist()),
        bond_dims=tuple(arrays["bond_feature_dims"].tolist()),
        part=torch.from_numpy(arrays[f"split_{split}"]).long(),
    )


def from_moleculenet(dataset: Dataset, name: str, split: str) -> Molecules:
    """Packs a PyG data set whose molecules have the categories of PyG's ``from_smiles``, and ``smiles``."""
    whole = Batch.from_data_list(list(dataset))
    nodes = whole.ptr
    owner = whole.batch[whole.edge_index[0]]
    edges = torch.cat([nodes.new_zeros(1), torch.bincount(owner, minlength=len(dataset)).cumsum(0)])
    y = whole.y.float()
    columns = y.shape[1]
    return Molecules(
        name=name,
        x=whole.x.long(),
        edge_index=whole.edge_index - nodes[owner],
        edge_attr=whole.edge_attr.long(),
        node_ptr=nodes,
        edge_ptr=edges,
        y=y,
        task_names=TASKS.get(name, tuple(f"task {i}" for i in range(columns))),
        atom_dims=tuple(len(values) for values in x_map.values()),
        bond_dims=tuple(len(values) for values in e_map.values()),
        part=random_split(len(dataset)) if split == "random" else scaffold_split(whole.smiles),
    )


def random_split(count: int) -> Tensor:
    """80 / 10 / 10 % of ``count`` molecules at random, always the same."""
    part = torch.empty(count, dtype=torch.long)
    part[torch.from_numpy(np.random.default_rng(0).permutation(count))] = _parts_in_order(count)
    return part


def scaffold_split(smiles: Sequence[str]) -> Tensor:
    """80 / 10 / 10 % by Bemis-Murcko scaffold: whole groups, the largest first, into training, validation, then test.

    Raises:
        ImportError: There is no rdkit.
    """
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(smiles):
        groups[MurckoScaffoldSmiles(smiles=text, includeChirality=True)].append(i)
    part = torch.full((len(smiles),), 2)
    sizes, limits = [0, 0], (int(0.8 * len(smiles)), int(0.9 * len(smiles)))
    for group in sorted(groups.values(), key=lambda g: (-len(g), g[0])):
        if sizes[0] + len(group) <= limits[0]:
            place = 0
        elif sum(sizes) + len(group) <= limits[1]:
            place = 1
        else:
            continue
        part[torch.tensor(group)] = place
        sizes[place] += len(group)
    return part


def _parts_in_order(count: int) -> Tensor:
    train, held_out = int(0.8 * count), int(0.9 * count)
    place = torch.arange(count)
    return (place >= train).long() + (place >= held_out).long()
