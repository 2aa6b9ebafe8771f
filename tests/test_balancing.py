"""Balancing on TorchJD, against TorchJD by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancing_common import (
    ABSENT,
    ARGUMENTS,
    BALANCED,
    EXPORTED,
    MEMORY,
    MEMORYLESS,
    TASKS,
    Setting,
    Stateful,
    aggregation,
    autojac,
    linalg,
    scalarization,
    weights_of,
)
from torch import Tensor, nn

import torch_mtl_pyg as mtl
from torch_mtl_pyg.balancing import Balancer, method_names, task_cosine

pytestmark = [
    # Of the solver that NashMTL uses.
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP:UserWarning"),
]


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
