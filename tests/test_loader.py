"""MultiTaskLoader: shares, order, what batches hold, workers, bad input."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from model_common import graph
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN

import torch_mtl_pyg as mtl


def dataset(size: int, first: int = 0) -> list[Data]:
    """Graphs that know their number."""
    return [Data(x=torch.full((1 + i % 3, 2), float(first + i)), number=first + i) for i in range(size)]


SETS = {"big": dataset(50), "small": dataset(7, 100), "one": dataset(1, 200)}


def numbers(loader: mtl.MultiTaskLoader) -> list[dict[str, list[int]]]:
    return [{name: part.number.tolist() for name, part in batch.items()} for batch in loader]


def counted(batches: list[dict[str, list[int]]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update({name: len(part) for name, part in batch.items()})
    return counts


@pytest.mark.parametrize("shuffle", [False, True])
def test_proportional_takes_each_sample_once_an_epoch(shuffle: bool) -> None:
    loader = mtl.MultiTaskLoader(SETS, batch_size=10, shuffle=shuffle)
    for _ in range(3):
        batches = numbers(loader)
        assert len(batches) == len(loader) == 6
        assert [sum(map(len, b.values())) for b in batches] == [10] * 5 + [8]
        for name, samples in SETS.items():
            seen = [i for batch in batches for i in batch.get(name, ())]
            assert sorted(seen) == [data.number for data in samples]
            assert (seen == sorted(seen)) is (not shuffle or len(samples) == 1)
        # In every batch as near to its share as whole samples allow.
        assert {len(batch["big"]) for batch in batches[:-1]} <= {8, 9}
        assert {len(batch["small"]) for batch in batches[:-1]} <= {1, 2}


@pytest.mark.parametrize(
    ("sampling", "temperature", "powers"),
    [("temperature", 2.0, 0.5), ("temperature", 1.0, 1.0), ("temperature", 50.0, 0.02), ("round_robin", 2.0, 0.0)],
)
def test_shares_over_many_epochs(sampling: Any, temperature: float, powers: float) -> None:
    loader = mtl.MultiTaskLoader(SETS, 9, sampling, temperature)
    weights = {name: len(samples) ** powers for name, samples in SETS.items()}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert loader.shares == pytest.approx(shares)
    total: Counter[str] = Counter()
    taken = 0
    for _ in range(20):
        for batch in numbers(loader):
            total += counted([batch])
            taken += sum(map(len, batch.values()))
            for name, share in shares.items():  # at the end of each batch, over all epochs
                assert abs(total[name] - taken * share) < 1 + 1e-9
    assert taken == 20 * 58


def test_round_robin_deals_in_turn() -> None:
    loader = mtl.MultiTaskLoader(SETS, 1, "round_robin")
    names = [next(iter(batch)) for _ in range(2) for batch in loader]
    assert names == [("big", "small", "one")[i % 3] for i in range(2 * 58)], "also over the end of an epoch"


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_many_tasks_and_small_batches(batch_size: int) -> None:
    sets = {f"t{i}": dataset(1 + i * i % 23, 100 * i) for i in range(30)}
    n = sum(map(len, sets.values()))
    loader = mtl.MultiTaskLoader(sets, batch_size, shuffle=False)
    for _ in range(2):
        total: Counter[str] = Counter()
        for batch in numbers(loader):
            total += counted([batch])
            for name, samples in sets.items():
                assert total[name] - total.total() * len(samples) / n < 1
        assert total == {name: len(samples) for name, samples in sets.items()}


def test_data_sets_go_on_and_start_over() -> None:
    """One that is through starts over in a new order; one that is not goes on in the next epoch."""
    loader = mtl.MultiTaskLoader(SETS, 4, "round_robin")
    epochs = [[i for b in numbers(loader) for i in b.get("small", ())] for _ in range(7)]
    run = [i for epoch in epochs for i in epoch]
    passes = [run[i : i + 7] for i in range(0, len(run) - 6, 7)]
    assert all(sorted(one) == list(range(100, 107)) for one in passes)
    assert len({tuple(one) for one in passes}) > len(passes) // 2, "reshuffled"
    loader = mtl.MultiTaskLoader(SETS, 4, "round_robin", shuffle=False)
    big = [i for _ in range(5) for b in numbers(loader) for i in b.get("big", ())]
    assert big == [i % 50 for i in range(len(big))] and len(big) > 50


@pytest.mark.parametrize("sampling", ["proportional", "temperature", "round_robin"])
def test_reproducible(sampling: Any) -> None:
    def two_epochs(seed: int) -> list[Any]:
        loader = mtl.MultiTaskLoader(SETS, 8, sampling, generator=torch.Generator().manual_seed(seed))
        return numbers(loader) + numbers(loader)

    assert two_epochs(3) == two_epochs(3) != two_epochs(4)
    torch.manual_seed(5)
    first = numbers(mtl.MultiTaskLoader(SETS, 8, sampling))
    torch.manual_seed(5)
    assert first == numbers(mtl.MultiTaskLoader(SETS, 8, sampling))


def test_a_loop_that_is_left_early_does_not_change_the_next() -> None:
    def second(leave: bool) -> list[Any]:
        loader = mtl.MultiTaskLoader(SETS, 8, "temperature", generator=torch.Generator().manual_seed(3))
        for _ in loader:
            if leave:
                break
        return numbers(loader)

    assert second(True) == second(False)


def test_drop_last() -> None:
    loader = mtl.MultiTaskLoader(SETS, 10, drop_last=True)
    assert len(loader) == len(list(loader)) == 5
    assert len(mtl.MultiTaskLoader(SETS, 58, drop_last=True)) == 1
    assert len(mtl.MultiTaskLoader(SETS, 1000)) == 1


def test_batches_are_those_of_pyg() -> None:
    loader = mtl.MultiTaskLoader(SETS, 12, shuffle=False, follow_batch=["x"], exclude_keys=["number"])
    assert isinstance(loader, DataLoader)
    batch = next(iter(loader))
    assert list(batch) == [name for name in SETS if name in batch], "in the order of the data sets"
    count = batch["big"].num_graphs
    expected = Batch.from_data_list(SETS["big"][:count], follow_batch=["x"], exclude_keys=["number"])
    assert isinstance(batch["big"], Batch) and "number" not in batch["big"]
    for key in ("x", "batch", "ptr", "x_batch"):
        assert torch.equal(batch["big"][key], expected[key])


def test_one_graph_is_no_batch() -> None:
    """It keeps its level, and comes once, though it may be drawn more often."""
    data = graph(6, 2, 8)
    loader = mtl.MultiTaskLoader({"graph": data, "other": dataset(4)}, 4, "round_robin")
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for batch in batches:
        one = batch["graph"]
        assert type(one) is Data and one.x is data.x
        one.x = torch.zeros(1)  # as data.to(device) does
    assert data.x.shape == (6, 2)
    both = list(mtl.MultiTaskLoader({"a": data, "b": data}, 2))
    assert [list(batch) for batch in both] == [["a", "b"]]


def test_trains_a_model() -> None:
    tasks = {name: mtl.Task(1, loss="mse") for name in SETS}
    model = mtl.MultiTaskModel(GCN(2, 8, 2), mtl.MultiTaskHeads(8, tasks))
    for samples in SETS.values():
        for data in samples:
            data.y, data.edge_index = torch.randn(1), torch.zeros(2, 0, dtype=torch.int64)
    for batch in mtl.MultiTaskLoader(SETS, 16, "temperature"):
        losses = model.loss(batch)
        assert losses.count.tolist() == [batch[name].num_graphs if name in batch else 0 for name in SETS]
        losses.total.backward()


def test_workers() -> None:
    def batches(workers: int) -> list[Any]:
        generator = torch.Generator().manual_seed(3)
        options = {"num_workers": workers, "persistent_workers": bool(workers)}
        loader = mtl.MultiTaskLoader(SETS, 20, "temperature", generator=generator, **options)
        return numbers(loader) + numbers(loader)

    assert batches(2) == batches(0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"datasets": [dataset(3)]}, TypeError, "datasets: expected a dict from task to data set, got list"),
        ({"datasets": {}}, ValueError, "datasets: expected at least one"),
        ({"datasets": {0: dataset(3)}}, TypeError, "datasets: expected names that are strings, got 0"),
        ({"datasets": {"a": []}}, ValueError, r"datasets\['a'\]: expected at least one sample"),
        ({"datasets": {"a": 3}}, TypeError, r"datasets\['a'\]: expected a data set with a length, or a Data, got int"),
        ({"datasets": {"a": torch.ones(3)}}, TypeError, r"datasets\['a'\]: .*got Tensor"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int, got float"),
        ({"batch_size": 59, "drop_last": True}, ValueError, "batch_size: expected at most 58.*got 59"),
        ({"sampling": "random"}, ValueError, "sampling: expected one of proportional.*got 'random'"),
        ({"sampling": 1}, TypeError, "sampling: expected one of"),
        ({"temperature": 3.0}, ValueError, "temperature: is an option of the sampling 'temperature'"),
        ({"sampling": "temperature", "temperature": 0.0}, ValueError, "temperature: expected a finite number gr"),
        ({"sampling": "temperature", "temperature": "2"}, TypeError, "temperature: expected a number, got str"),
        ({"sampling": "temperature", "temperature": 1e-3}, ValueError, "temperature: expected one that leaves each"),
        ({"shuffle": 1}, TypeError, "shuffle: expected a bool, got int"),
        ({"drop_last": None}, TypeError, "drop_last: expected a bool, got NoneType"),
        ({"sampler": [1]}, TypeError, "sampler: expected none, since the loader has its own"),
        ({"collate_fn": list}, TypeError, "collate_fn: expected none"),
        ({"num_workers": -1}, ValueError, "num_workers"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtl.MultiTaskLoader(**{"datasets": SETS, "batch_size": 4, **change})
