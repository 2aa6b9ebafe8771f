"""A wide matrix of labels, which is checked several columns at a time, against the same labels one column at a time."""

from __future__ import annotations

import pytest
import torch

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import LabelError

# 19 columns: whole vectors of every instruction set, and a rest; every kind of range within a vector.
KINDS = ("bce", "mse", "cross_entropy", "poisson_nll", "huber", "l1", "weighted")


def tasks(count: int = 19) -> dict[str, mtl.Task]:
    made = {}
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        if kind == "weighted":
            made[f"t{i}"] = mtl.Task(3, loss="cross_entropy", class_weight=(1.0, 2.0, 0.5))
        else:
            made[f"t{i}"] = mtl.Task(4 if kind == "cross_entropy" else 1, loss=kind)
    return made


def labels(n: int, missing: float) -> torch.Tensor:
    y = torch.stack(
        [
            torch.rand(n)
            if KINDS[i % 7] == "bce"
            else torch.randint(0, 3, (n,)).float()
            if KINDS[i % 7] in ("cross_entropy", "weighted", "poisson_nll")
            else torch.randn(n)
            for i in range(19)
        ],
        1,
    )
    return y.masked_fill_(torch.rand_like(y) < missing, float("nan"))


@pytest.mark.parametrize("missing", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("view", ("contiguous", "rows apart", "columns apart", "float64"))
def test_matrix_equals_columns(fused: None, missing: float, view: str) -> None:
    torch.manual_seed(0)
    n = 333
    heads, x, y = mtl.MultiTaskHeads(8, tasks()), torch.randn(n, 8), labels(n, missing)
    y[:5, 2] = -100  # a number that stands for a missing class, and for a missing bce label
    y[:3, 0] = -100
    matrix = {
        "contiguous": y,
        "rows apart": torch.cat((y, y), 1)[:, :19],
        "columns apart": y.t().contiguous().t(),
        "float64": y.double(),
    }[view]
    whole, single = heads.loss(x, matrix), heads.loss(x, {f"t{i}": y[:, i] for i in range(19)})
    assert whole.count.equal(single.count)
    # The integers show that the counts are those of the labels, not of each other.
    present = ~y.isnan()
    present[:, [i for i in range(19) if KINDS[i % 7] in ("bce", "cross_entropy", "weighted")]] &= (
        y[:, [i for i in range(19) if KINDS[i % 7] in ("bce", "cross_entropy", "weighted")]] != -100
    )
    assert whole.count.equal(present.sum(0))
    assert torch.equal(whole.per_task, single.per_task)


@pytest.mark.parametrize("column", range(19))
@pytest.mark.parametrize("row", (0, 200, 332))
def test_a_wrong_label_names_its_task(fused: None, column: int, row: int) -> None:
    torch.manual_seed(1)
    heads, x, y = mtl.MultiTaskHeads(8, tasks()), torch.randn(333, 8), labels(333, 0.3)
    bad = {"bce": 1.5, "cross_entropy": 4.0, "weighted": 0.5, "poisson_nll": -1.0}.get(KINDS[column % 7], float("inf"))
    y[row, column] = bad
    with pytest.raises(LabelError, match=rf"t{column}.*{bad:g}"):
        heads.loss(x, y)


def test_classes_beyond_what_float32_can_count(fused: None) -> None:
    """Between 2^22 and 2^24 the quick check cannot tell whole numbers; at 2^24 + 1 the bound itself is no float32."""
    n, wide = 2, 2**24 + 2
    names = {"wide": mtl.Task(wide, loss="cross_entropy")} | {f"t{i}": mtl.Task(1, loss="mse") for i in range(7)}
    heads = mtl.MultiTaskHeads(1, names)
    y = torch.zeros(n, 8)
    for value in (5_000_001.0, 2.0**24):
        y[0, 0] = value
        assert heads.loss(torch.ones(n, 1), y).count[0] == n
    for value in (4_194_304.5, 2.0**24 + 2):
        y[0, 0] = value
        with pytest.raises(LabelError, match="wide"):
            heads.loss(torch.ones(n, 1), y)


@pytest.mark.parametrize("routed", (False, True))
def test_integer_classes_beyond_what_float32_can_count(fused: None, routed: bool) -> None:
    """They would be rounded to their neighbours on the way."""
    heads = mtl.MultiTaskHeads(1, {"wide": mtl.Task(2**24 + 2, loss="cross_entropy")})
    labels, rows = torch.tensor([2**24 + 1]), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"expected at most 16777217 classes .* got 16777218 for task 0"):
        heads.loss(torch.ones(1, 1), labels if routed else {"wide": labels}, rows if routed else None)
    if not routed:
        exact = heads.double().loss(torch.ones(1, 1).double(), {"wide": labels}).total
        logits = (heads.weight + heads.bias.unsqueeze(1)).t()
        torch.testing.assert_close(exact, torch.nn.functional.cross_entropy(logits, labels))
