"""Balancing on TorchJD, against TorchJD by hand."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mtl_pyg as mtl
from torch_mtl_pyg.balancing import Balancer, balanced_step, method_names, task_cosine

aggregation = pytest.importorskip("torchjd.aggregation", reason="balancing needs the extra [balancing]")
scalarization = pytest.importorskip("torchjd.scalarization")
autojac = pytest.importorskip("torchjd.autojac")
linalg = pytest.importorskip("torchjd.linalg")
Stateful = pytest.importorskip("torchjd").Stateful

pytestmark = [
    # Of the solver that NashMTL uses.
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP:UserWarning"),
]

TASKS = {
    "kind": mtl.Task(3, loss="cross_entropy"),
    "none": 2,
    "flag": mtl.Task(1, loss="bce", weight=2.0),
    "size": mtl.Task(1, loss="mse"),
    "mass": mtl.Task(1, loss="l1"),
}
BALANCED = [0, 2, 3, 4]
ABSENT = 3
PREFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

# Every method TorchJD exports, by the name of its class; and what those that need arguments are given.
EXPORTED = sorted(
    {name for name in aggregation.__all__ if name.endswith("Weighting") and name != "Weighting"}
    | {name for name in scalarization.__all__ if name != "Scalarizer"}
    | {"NashMTL"}
)
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "CAGradWeighting": lambda: {"c": 0.4},
    "COSMOS": lambda: {"lambda_": 0.1, "weights": PREFERENCE},
    "CRMOGMWeighting": lambda: {"weighting": aggregation.UPGradWeighting(PREFERENCE)},
    "Constant": lambda: {"weights": PREFERENCE},
    "ConstantWeighting": lambda: {"weights": PREFERENCE},
    "FairGradWeighting": lambda: {"alpha": 1.0},
    "KrumWeighting": lambda: {"n_byzantine": 0},
    # The gradients are of mean losses at an embedding, and small.
    "MoDoWeighting": lambda: {"gamma": 10.0, "rho": 0.01},
    "PBI": lambda: {"theta": 0.5, "weights": PREFERENCE, "reference": -PREFERENCE},
    "STCH": lambda: {"mu": 0.5, "weights": PREFERENCE},
    "UPGradWeighting": lambda: {"pref_vector": PREFERENCE},
}
WITH_MEMORY = {"CRMOGM", "DWA", "ExcessMTL", "FAMO", "GradVac", "MoDo", "NashMTL", "PCD", "SDMGrad"}
MEMORY = [name for name in EXPORTED if name.removesuffix("Weighting") in WITH_MEMORY]
MEMORYLESS = [name for name in EXPORTED if name not in MEMORY]


class Setting:
    """A trunk, heads and one batch in float64."""

    def __init__(self, tasks: dict[str, Any] = TASKS, rows: int = 24) -> None:
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh()).double()
        self.heads = mtl.MultiTaskHeads(8, tasks).double()
        self.inputs = torch.randn(rows, 5).double()
        labels = {"kind": torch.randint(0, 3, (rows,)), "flag": torch.rand(rows).round(), "size": torch.randn(rows)}
        self.y: dict[str, Tensor | None] = {**labels, "mass": torch.randn(rows)}
        self.y = {name: self.y[name] for name, task in self.heads.tasks.items() if task.loss is not None}

    def losses(
        self, gramian: bool = True, absent: tuple[str, ...] = (), inputs: Tensor | None = None
    ) -> mtl.TaskLosses:
        y = {name: None if name in absent else labels for name, labels in self.y.items()}
        return self.heads.loss(self.trunk(self.inputs if inputs is None else inputs), y, gramian=gramian)

    def balancer(self, name: str) -> Balancer:
        return Balancer(name, tasks=self.heads.tasks, **ARGUMENTS.get(name, dict)())

    def step(self, balancer: Balancer, absent: tuple[str, ...] = (), **kwargs: Any) -> mtl.TaskLosses:
        parameters = [*self.trunk.parameters(), *self.heads.parameters(), *balancer.parameters()]
        shared = self.trunk.parameters() if balancer.needs_shared else None
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        return balanced_step(balancer, lambda g: self.losses(g, absent), optimizer, shared=shared, **kwargs)

    def oppose(self) -> None:
        """Makes two tasks want the opposite of each other."""
        rows = self.heads.slices
        with torch.no_grad():
            self.heads.weight[rows["mass"]] = self.heads.weight[rows["size"]]
        self.y["size"], self.y["mass"] = torch.full((24,), 3.0), torch.full((24,), -3.0)

    def jacobian(self, at: Tensor | list[Tensor], losses: mtl.TaskLosses) -> Tensor:
        blocks = autojac.jac(losses.per_task, at, retain_graph=True, parallel_chunk_size=1)
        return torch.cat([block.flatten(1) for block in blocks], 1)


def weights_of(balancer: Balancer) -> Tensor:
    assert balancer.weights is not None
    return balancer.weights


def test_cosine() -> None:
    rows = torch.randn(2, 5, 7)
    rows[0, 3], rows[1, 2] = 0.0, rows[1, 1] * -3
    gramian = rows @ rows.mT
    cosines = task_cosine(gramian)
    expected = torch.nn.functional.cosine_similarity(rows.unsqueeze(1), rows.unsqueeze(2), dim=3)
    torch.testing.assert_close(cosines, expected)
    assert cosines.diagonal(dim1=1, dim2=2).tolist() == [[1.0, 1.0, 1.0, 0.0, 1.0], [1.0] * 5]
    assert not cosines[0, 3].any() and not cosines[0, :, 3].any()
    # Rounding does not lead out of [-1, 1], nor small norms to zero.
    vectors = (torch.randn(3).expand(64, 3) * torch.linspace(-1, 1, 64).unsqueeze(1)).half()
    for scale in (1.0, 1e-3, 1e-15):
        for dtype in (torch.float16, torch.float32, torch.float64):
            product = (vectors.double() @ vectors.double().mT * (scale if dtype != torch.float16 else 1.0)).to(dtype)
            result = task_cosine(product)
            assert result.abs().max() == 1.0 and result.dtype == dtype and result.abs().min() > 0.9
    assert task_cosine(torch.zeros(0, 0)).shape == (0, 0)
    broken = task_cosine(torch.tensor([[float("nan"), 1.0], [1.0, 2.0]]))
    assert broken.isnan().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("gramian", "error", "message"),
    [
        ([[1.0]], TypeError, "gramian: expected a tensor .*got list"),
        (torch.eye(2).long(), TypeError, "gramian: expected a floating-point tensor, got dtype torch.int64"),
        (torch.ones(3), ValueError, r"gramian: expected shape \[..., T, T\], got \[3\]"),
        (torch.ones(2, 3), ValueError, r"got \[2, 3\]"),
    ],
)
def test_bad_gramian(gramian: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task_cosine(gramian)


def test_every_method_has_a_name() -> None:
    assert set(method_names()) == {name.removesuffix("Weighting").lower() for name in EXPORTED}
    for name in ("upgrad", "UPGrad", "UPGradWeighting", "up_grad", "UP-grad"):
        assert type(Balancer(name).method) is aggregation.UPGradWeighting
    assert Balancer("upgrad").needs_gramian
    assert Balancer(aggregation.UPGrad()).name == "UPGrad"
    assert isinstance(Balancer("mean").method, scalarization.Mean)
    assert isinstance(Balancer("MeanWeighting").method, aggregation.MeanWeighting)
    assert not Balancer("uw", 3).needs_gramian
    assert not Balancer().needs_gramian
    for name in EXPORTED:
        found = Setting().balancer(name)._found
        assert found is not None and found.memory == (name in MEMORY)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_method_trains(name: str) -> None:
    setting = Setting()
    balancer = setting.balancer(name)
    before = [parameter.clone() for parameter in setting.trunk.parameters()]
    for absent in ((), (), ("size",), (), ("size",), ()):
        losses = setting.step(balancer, absent)
        balancer.end_epoch()
        assert not losses.per_task.requires_grad and not losses.total.requires_grad
        weights = weights_of(balancer)
        assert weights.shape == (5,) and not weights.requires_grad and weights.isfinite().all()
        assert weights[1] == 0.0 and weights.abs().sum() > 0.05
        if absent:
            assert weights[ABSENT] == 0.0 and not setting.heads.weight.grad[setting.heads.slices["size"]].any()  # type: ignore[index]
    assert any(not torch.equal(old, new) for old, new in zip(before, setting.trunk.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in balancer.parameters())


@pytest.mark.parametrize("name", MEMORYLESS)
def test_an_absent_task_is_not_seen(name: str) -> None:
    """The weights are those of TorchJD on the other tasks, and of its vectors their numbers."""
    setting, kept = Setting(), [0, 2, 4]
    arguments = {
        key: value[[0, 1, 3]] if isinstance(value, Tensor) else value
        for key, value in ARGUMENTS.get(name, dict)().items()
    }
    losses = setting.losses(absent=("size",))
    torch.manual_seed(2)
    scalar = setting.balancer(name)(losses)
    module = getattr(scalarization, name, None) or getattr(aggregation, name)
    if name in ("UW", "IMTLL"):
        arguments["shape"] = 3
    balancer = setting.balancer(name)
    torch.manual_seed(2)
    (stat,) = (
        [losses.per_task[kept].detach().requires_grad_()]
        if not balancer.needs_gramian
        else [losses.gramian[kept][:, kept]]
    )  # type: ignore[index]
    if balancer._found.scale_free:  # type: ignore[union-attr]
        stat = stat / stat.diagonal().mean()
    out = module(**arguments)(stat)
    torch.manual_seed(2)
    balancer(losses)
    if balancer.needs_gramian:
        torch.testing.assert_close(weights_of(balancer)[kept], out.detach().double(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scalar, (out @ losses.per_task[kept]).double())
    else:
        torch.testing.assert_close(scalar, out)
        (gradient,) = torch.autograd.grad(out, stat)
        torch.testing.assert_close(weights_of(balancer)[kept], gradient)


def test_what_a_method_with_memory_sees() -> None:
    seen: list[Tensor] = []

    class Weighs(aggregation.Weighting, Stateful):  # type: ignore[misc, name-defined]
        def forward(self, stat: Tensor, /) -> Tensor:
            seen.append(stat)
            return torch.ones(len(stat))

        def reset(self) -> None: ...

    class Scales(scalarization.Scalarizer, Stateful):  # type: ignore[misc, name-defined]
        def forward(self, values: Tensor, /) -> Tensor:
            seen.append(values.detach())
            return values.sum()

        update = forward

        def reset(self) -> None: ...

    setting, other = Setting(), Setting()
    other.inputs = other.inputs * 2
    steps = (setting.losses(absent=("mass",)), other.losses(absent=("size",)))
    first, second = (losses.gramian[BALANCED][:, BALANCED] for losses in steps)  # type: ignore[index]
    first[3, 3] = first.diagonal()[:3].mean()
    second[2, 2] = first[2, 2]
    for method in (Weighs(), aggregation.WeightedAggregator(Weighs())):
        balancer = Balancer(method, tasks=TASKS)
        for losses, expected in zip(steps, (first, second), strict=True):
            balancer(losses)
            got = seen.pop()
            torch.testing.assert_close(got if isinstance(method, Weighs) else got @ got.T, expected)
            assert isinstance(method, Weighs) or not torch.allclose(got, expected)
    balancer = Balancer(Scales(), tasks=TASKS)
    setting.step(balancer, ("mass",))
    before, after = seen
    assert before[3] == after[3] == before[:3].mean()
    assert (before != after)[:3].all()
    setting.step(balancer, ("size",))
    assert seen[2][2] == seen[3][2] == before[2]


@pytest.mark.parametrize("name", MEMORY)
def test_an_absent_task_does_not_take_over(name: str) -> None:
    """A zero row looks like a solved task: MoDo and SDMGrad would give it all the weight, FAMO nearly all.

    To ExcessMTL, a task that was absent first would look infinitely worse ever after.
    """
    setting, full = Setting(), Setting()
    balancer, other = setting.balancer(name), full.balancer(name)
    setting.step(balancer, ("size",) if "Excess" in name else ()), full.step(other)
    setting.step(balancer), full.step(other)
    for _ in range(12):
        setting.step(balancer, ("size",)), full.step(other)
        balancer.end_epoch(), other.end_epoch()
    kept = [0, 2, 4]
    share, shared = weights_of(balancer)[kept].sum(), weights_of(other)[kept].sum()
    assert 0.5 * shared < share < 2.0 * shared


def test_upgrad_conflicts_with_no_task() -> None:
    setting = Setting()
    x = setting.trunk(setting.inputs).detach().requires_grad_()
    setting.oppose()
    losses = setting.heads.loss(x, setting.y, gramian=True)
    # TorchJD's default of 1e-4 leaves conflicts of that size.
    projector = linalg.QuadprogProjector(reg_eps=1e-10)
    balancer = Balancer("upgrad", tasks=TASKS, projector=projector)
    balancer(losses)
    jacobian = setting.jacobian(x, losses)
    assert (jacobian @ jacobian[BALANCED].mean(0)).min() < -1e-3  # the mean does conflict
    assert (jacobian @ (weights_of(balancer) @ jacobian)).min() > -1e-9
    gramian = jacobian[BALANCED] @ jacobian[BALANCED].T
    expected = aggregation.UPGradWeighting(projector=projector)(gramian)
    torch.testing.assert_close(weights_of(balancer)[BALANCED], expected, rtol=1e-9, atol=1e-12)


def test_small_gradients_are_balanced_too() -> None:
    """TorchJD takes a Gramian of trace below 1e-4 for zero; with many rows, that of mean losses is."""
    setting = Setting()
    setting.oppose()
    losses = setting.losses()
    assert losses.gramian is not None
    tiny = mtl.TaskLosses(losses.names, losses.per_task, losses.total, losses.count, losses.gramian * 1e-9)
    for name in ("UPGradWeighting", "DualProjWeighting", "CAGradWeighting"):
        balancer = Balancer(name, tasks=TASKS, **({"c": 0.4} if name.startswith("CA") else {}))
        balancer(losses)
        expected = weights_of(balancer)
        balancer(tiny)
        torch.testing.assert_close(weights_of(balancer), expected, rtol=1e-6, atol=1e-9)
        assert expected[BALANCED].std() > 1e-3


def test_embedding_and_parameters() -> None:
    """An orthonormal linear trunk has the same Gramian at its weights; any other, one that is bounded by it."""
    setting, rows = Setting(rows=6), 6
    basis = torch.linalg.qr(torch.randn(rows, rows).double())[0]
    for inputs, same in ((basis, True), (basis * torch.linspace(0.2, 3.0, rows).unsqueeze(1), False)):
        trunk = nn.Linear(rows, 8, bias=False).double()
        losses = setting.heads.loss(trunk(inputs), setting.y, gramian=True)
        at_embedding, at_weights = (Balancer("mgda", tasks=TASKS, epsilon=1e-9, max_iters=10**4) for _ in range(2))
        at_embedding(losses), at_weights(losses, shared=trunk.parameters())
        close = torch.allclose(weights_of(at_embedding), weights_of(at_weights), rtol=1e-3, atol=1e-4)
        assert close == same
        jacobian = setting.jacobian(list(trunk.parameters()), losses)
        largest = torch.linalg.matrix_norm(inputs, 2) ** 2
        assert torch.linalg.eigvalsh(largest * losses.gramian - jacobian @ jacobian.T).min() > -1e-9  # type: ignore[operator]


def test_torchjd_backward_on_per_task() -> None:
    setting = Setting({name: task for name, task in TASKS.items() if name != "none"})
    x = setting.trunk(setting.inputs)
    losses = setting.heads.loss(x, setting.y)
    expected = setting.jacobian(list(setting.trunk.parameters()), losses)
    heads = list(setting.heads.parameters())
    # The heads are one op: its graph is walked once per task.
    autojac.mtl_backward(losses.per_task.unbind(), features=x, tasks_params=[heads] * 4, retain_graph=True)
    jacobian = torch.cat([p.jac.flatten(1) for p in setting.trunk.parameters()], 1)  # type: ignore[attr-defined]
    torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-12)
    weights = autojac.jac_to_grad(setting.trunk.parameters(), aggregation.UPGrad())
    balancer = Balancer("upgrad")
    balancer(losses, shared=setting.trunk.parameters())
    torch.testing.assert_close(weights_of(balancer), weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", EXPORTED)
def test_one_task(name: str) -> None:
    setting = Setting({"size": TASKS["size"]})
    arguments = {
        key: value[:1] if isinstance(value, Tensor) else value for key, value in ARGUMENTS.get(name, dict)().items()
    }
    if name == "CRMOGMWeighting":
        arguments = {"weighting": aggregation.UPGradWeighting()}
    balancer = Balancer(name, tasks=setting.heads.tasks, **arguments)
    if name in ("KrumWeighting", "NashMTL"):
        # Krum compares three; with one, the solver of TorchJD's NashMTL loses a dimension.
        with pytest.raises(ValueError, match=r"at least 3 rows|Scalar operands"):
            setting.step(balancer)
        return
    for _ in range(3):
        setting.step(balancer)
        assert weights_of(balancer).shape == (1,) and weights_of(balancer).item() > 0.01


def test_no_labels_at_all() -> None:
    for name in ("upgrad", "uw", "famo", "dwa", "none"):
        setting = Setting()
        balancer = Balancer(name, tasks=TASKS)
        setting.step(balancer, ("kind", "flag", "size", "mass"))
        assert not weights_of(balancer).any()
        assert not any(p.grad.any() for p in setting.trunk.parameters())  # type: ignore[union-attr]
        assert balancer._last is None and not any(p.any() for p in balancer.parameters())


def test_none_is_the_total() -> None:
    for balancer in (Balancer(), Balancer("None", tasks=TASKS)):
        setting, other = Setting(), Setting()
        setting.step(balancer)
        other.losses(False).total.backward()
        for parameter, expected in zip(setting.trunk.parameters(), other.trunk.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad)  # type: ignore[arg-type]
    assert weights_of(balancer).tolist() == [1.0, 0.0, 2.0, 1.0, 1.0]


def test_learned_weights_of_uw() -> None:
    setting = Setting()
    balancer = Balancer("uw", tasks=TASKS)
    for _ in range(5):
        setting.step(balancer, ("size",))
    (log_variance,) = balancer.parameters()
    assert log_variance.shape == (4,) and log_variance[2] == 0.0
    assert log_variance[[0, 1, 3]].abs().min() > 0.005


def test_famo_sees_the_losses_again() -> None:
    setting, by_hand = Setting(), scalarization.FAMO(4, lr=0.1)
    balancer = Balancer("famo", tasks=TASKS, lr=0.1)
    assert balancer.needs_update
    before = setting.step(balancer)
    by_hand(before.per_task[BALANCED].detach())
    by_hand.update(setting.losses().per_task[BALANCED].detach())
    torch.testing.assert_close(balancer.method._w, by_hand._w, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]
    assert by_hand._w.abs().min() > 0.01


def test_dwa_needs_the_end_of_epochs() -> None:
    setting, balancer = Setting(), Balancer("dwa", tasks=TASKS, temperature=0.1)
    averages = []
    for _ in range(2):
        averages.append(setting.step(balancer).per_task[BALANCED].detach())
        assert weights_of(balancer)[BALANCED].eq(1.0).all()
        balancer.end_epoch()
    setting.step(balancer)
    expected = 4 * torch.softmax(averages[1] / averages[0] / 0.1, 0)
    torch.testing.assert_close(weights_of(balancer)[BALANCED], expected)


def test_excess_mtl_keeps_sums_at_parameters() -> None:
    setting, by_hand = Setting(), aggregation.ExcessMTLWeighting()
    balancer = Balancer("excessmtl", tasks=TASKS)
    assert balancer.needs_shared and not balancer.needs_gramian
    for _ in range(3):
        jacobian = setting.jacobian(list(setting.trunk.parameters()), setting.losses())
        setting.step(balancer)
        torch.testing.assert_close(weights_of(balancer)[BALANCED], by_hand(jacobian[BALANCED]))
    with pytest.raises(ValueError, match="shared: expected parameters, since ExcessMTLWeighting"):
        balancer(setting.losses())


@pytest.mark.parametrize("name", ["MoDoWeighting", "SDMGradWeighting"])
def test_independent_batches(name: str) -> None:
    setting, by_hand = Setting(), getattr(aggregation, name)(**ARGUMENTS.get(name, dict)())
    balancer, shared = setting.balancer(name), list(setting.trunk.parameters())
    first, second = (setting.losses(False, inputs=torch.randn(24, 5).double()) for _ in range(2))
    optimizer = torch.optim.SGD(shared, lr=0.0)
    pair = (lambda _: first, lambda _: second)
    for _ in range(2):
        balanced_step(balancer, setting.losses, optimizer, shared=shared, independent=pair)
        product = setting.jacobian(shared, first) @ setting.jacobian(shared, second).T
        expected = by_hand(product[BALANCED][:, BALANCED])
        torch.testing.assert_close(weights_of(balancer)[BALANCED], expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="independent: expected None"):
        Balancer("upgrad", tasks=TASKS)(setting.losses(), shared, (first, second))


def test_gradient_accumulation() -> None:
    setting, balancer = Setting(), Balancer("upgrad", tasks=TASKS)
    parts, weights = [setting.inputs, setting.inputs.flip(0)], []
    for inputs in parts:
        balancer(setting.losses(inputs=inputs)).div(2).backward()
        weights.append(weights_of(balancer))
    got = setting.trunk[0].weight.grad
    setting.trunk.zero_grad()
    sum((setting.losses(inputs=i).per_task * w).sum() / 2 for i, w in zip(parts, weights, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(got, setting.trunk[0].weight.grad)
    assert not torch.equal(weights[0], weights[1])


def test_clip_and_scaler() -> None:
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        setting = Setting()
        setting.step(Balancer("sum", tasks=TASKS), scaler=scaler, clip=0.01)
        grads = [p.grad.flatten() for p in [*setting.trunk.parameters(), *setting.heads.parameters()]]  # type: ignore[union-attr]
        torch.testing.assert_close(torch.cat(grads).norm().item(), 0.01, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["UW", "IMTLL", *(name for name in MEMORY if name != "NashMTL")])
def test_state_dict(name: str) -> None:
    setting = Setting()
    balancer = setting.balancer(name)
    for absent in ((), ("size",), ()):
        setting.step(balancer, absent)
        balancer.end_epoch()
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    other, fresh = setting.balancer(name), setting.balancer(name)
    other.load_state_dict(torch.load(file))
    twin, balancer = copy.deepcopy((setting, balancer))
    for absent in (("size",), ()):
        torch.manual_seed(5)
        setting.step(balancer, absent)
        torch.manual_seed(5)
        twin.step(other, absent)
        assert torch.equal(weights_of(balancer), weights_of(other))
    fresh.load_state_dict(setting.balancer(name).state_dict())  # of one never called
    other.load_state_dict(fresh.state_dict())
    assert weights_of(other).equal(weights_of(balancer))  # the last ones, for logging, are not part of it
    setting.step(other)
    with pytest.raises(ValueError, match="expected the state of none"):
        Balancer().load_state_dict(balancer.state_dict(), strict=False)


def test_not_finite() -> None:
    class Odd(aggregation.Weighting):  # type: ignore[misc, name-defined]
        def forward(self, stat: Tensor, /) -> Tensor:
            return stat.diagonal() / 0.0

    setting = Setting()
    with pytest.raises(ValueError, match="Odd: weights: expected finite numbers, got inf for the task 'kind'"):
        setting.step(Balancer(Odd(), tasks=TASKS))
    setting.inputs[0, 0] = float("nan")
    for name in ("upgrad", "uw"):
        with pytest.raises(ValueError, match="losses: expected finite numbers, got nan for the task 'kind'"):
            setting.step(Balancer(name, tasks=TASKS))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "upgrade"}, ValueError, "method: expected one of none, alignedmtl, .*, uw, got 'upgrade'"),
        ({"method": "config"}, ValueError, "'config' combines gradients without weights"),
        ({"method": nn.ReLU()}, TypeError, "method: expected a name, a Weighting or Scalarizer.*got ReLU"),
        ({"method": 3}, TypeError, "got int"),
        ({"method": "cagrad"}, TypeError, "CAGradWeighting.*does not fit.*missing a required argument: 'c'"),
        ({"method": "uw"}, TypeError, "UW.*missing a required argument: 'shape'"),
        ({"method": None, "c": 1}, TypeError, "method: expected a name where arguments are given, got None"),
        ({"method": "uw", "tasks": nn.ReLU()}, TypeError, "tasks: expected a dict such as heads.tasks, got ReLU"),
        ({"method": "uw", "tasks": {"a": 2}}, ValueError, "tasks: expected at least one with a loss"),
    ],
)
def test_bad_method(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Balancer(**arguments)


def test_bad_losses() -> None:
    setting, balancer = Setting(), Balancer("upgrad", tasks=TASKS)
    with pytest.raises(ValueError, match=r"losses.gramian: expected a matrix, since UPGradWeighting needs it"):
        balancer(setting.losses(False))
    with pytest.raises(TypeError, match="losses: expected TaskLosses, got dict"):
        balancer(dict(setting.losses()))
    with pytest.raises(ValueError, match=r"losses: expected the tasks \['kind'.*got \['size'\]"):
        balancer(Setting({"size": TASKS["size"]}).losses())
    with pytest.raises(ValueError, match="shared: expected at least one parameter"):
        balancer(setting.losses(), shared=[])
    with pytest.raises(TypeError, match="balancer: expected a Balancer, got str"):
        balanced_step("uw", setting.losses, torch.optim.SGD(setting.trunk.parameters()))  # type: ignore[arg-type]
    keeps = Balancer("gradvac")
    keeps(setting.losses())
    with pytest.raises(ValueError, match=r"the tasks of the last call.*reset"):
        keeps(Setting({"size": TASKS["size"]}).losses())
    keeps.reset()
    keeps(Setting({"size": TASKS["size"]}).losses())


def test_without_torchjd() -> None:
    code = """
import sys
import torch_mtl_pyg, torch_mtl_pyg.balancing
assert not any(name.split(".")[0] == "torchjd" for name in sys.modules)
sys.modules["torchjd"] = None
torch_mtl_pyg.balancing.Balancer()
try:
    torch_mtl_pyg.balancing.Balancer("upgrad")
except ImportError as error:
    assert "torch_mtl_pyg[balancing]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
