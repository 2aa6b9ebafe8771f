"""Balanced training steps: special batches, learned methods, saving, errors."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from balancing_common import (
    ARGUMENTS,
    BALANCED,
    EXPORTED,
    MEMORY,
    TASKS,
    Setting,
    aggregation,
    scalarization,
    weights_of,
)
from torch import Tensor, nn

from torch_mtl_pyg.balancing import Balancer, balanced_step

pytestmark = [
    # Of the solver that NashMTL uses.
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP:UserWarning"),
]


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
    for other in (None, "mean", "upgrad"):  # which would not look at them
        with pytest.raises(ValueError, match="independent: expected None, since it is for MoDo and SDMGrad"):
            Balancer(other, tasks=TASKS)(setting.losses(), independent=(first, second))


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
