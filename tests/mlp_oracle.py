"""What heads with hidden layers have to be: one ``torch.nn.Sequential`` in float64 for each task.

The error model is that of ``accuracy.py``: the error of a result, relative to the magnitude of its terms, may exceed
that of PyTorch in the same dtype by a few roundings of the accumulator. Through the layers magnitudes are carried as
follows, with ``S`` those of the values and ``B`` those of the gradients:

- forward ``S(A) = S(H) |W|^T + |b|`` and ``S(H) = lip S(A)``: activations are 0 at 0, with slopes up to ``lip``;
- at the logits as ``loss_oracle.py`` has it: ``B = slope (1 + S)``;
- backward ``B(A) = lip B(A') |W| + S(A) |g| |W|``, since an error of ``A`` comes back through the curvature of the
  activation, at most 1; and ``B(W) = B(A)^T |H| + |g|^T S(H)``.

The slope of relu jumps: where a pre-activation is within the roundings of 0, either slope is right (``slack``).
A 16-bit embedding and 16-bit weights are exact inputs. The compiled op rounds nothing but what it stores; plain PyTorch
rounds every layer's values to 16 bits (``rounded``), and units whose sign that may change have slack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accuracy import ROUNDINGS, assert_accurate, roundoff
from loss_oracle import expected
from mlp_cases import Problem
from torch import Tensor, nn

import torch_mtl_pyg as mtl
from torch_mtl_pyg.labels import label_columns
from torch_mtl_pyg.ops.reference_mlp import keep_mask

MODULES = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU}
LIP = {"relu": 1.0, "gelu": 1.13, "silu": 1.1, "tanh": 1.0, "elu": 1.0}


class Mask(nn.Module):
    """Dropout with a given mask, scaled."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Terms(NamedTuple):
    """An exact result, the magnitude of its terms, and by how much a unit at a kink may change it."""

    exact: Tensor
    size: Tensor
    slack: Tensor


def rows_of(p: Problem, layer: int, task: int) -> slice:
    """The rows of a task in a packed layer."""
    if layer == len(p.weights) - 1:
        return p.layout.slices[p.layout.names[task]]
    width = p.weights[layer].shape[0] // len(p.tasks)
    return slice(task * width, (task + 1) * width)


def mask_of(p: Problem, layer: int, task: int) -> Tensor:
    """The dropout mask of a task's hidden layer, scaled: ``[N, h]``."""
    width = p.weights[layer].shape[0] // len(p.tasks)
    rows = torch.arange(p.x.shape[0])
    if p.hidden.dropout == 0.0:
        return torch.ones(len(rows), width, dtype=torch.float64)
    assert p.hidden.seed is not None
    seed = p.hidden.seed + torch.tensor([0, task])
    kept = keep_mask(seed, rows, 1, width, layer, p.hidden.dropout).double()
    return kept * (0.0 if p.hidden.dropout == 1.0 else 1 / (1 - p.hidden.dropout))


def head(p: Problem, task: int) -> nn.Sequential:
    """The head of a task in float64."""
    parts: list[nn.Module] = []
    for layer, weight in enumerate(p.weights):
        own = rows_of(p, layer, task)
        linear = nn.Linear(1, 1)
        linear.weight = nn.Parameter(weight[own].double())
        linear.bias = nn.Parameter(p.biases[layer][own].double()) if p.biases else None
        parts.append(linear)
        if layer < len(p.weights) - 1:
            parts += [MODULES[p.hidden.act](), Mask(mask_of(p, layer, task))]
    return nn.Sequential(*parts)


class Trace:
    """One head in float64, layer by layer, with magnitudes.

    Args:
        p: The inputs.
        task: The head.
        roundoff: How far a pre-activation may be from the exact one, over its magnitude: within that, units have slack.
    """

    def __init__(self, p: Problem, task: int, roundoff: float) -> None:
        self.act, self.lip = MODULES[p.hidden.act](), LIP[p.hidden.act]
        self.weights = [w[rows_of(p, layer, task)].double() for layer, w in enumerate(p.weights)]
        self.inputs: list[tuple[Tensor, Tensor]] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # pre-activations
        self.masks: list[Tensor] = []
        self.roundoff, self.jumps = roundoff, p.hidden.act == "relu"
        h, size = p.x.double(), p.x.double().abs()
        for layer, weight in enumerate(self.weights):
            bias = p.biases[layer][rows_of(p, layer, task)].double() if p.biases else torch.zeros(weight.shape[0])
            self.inputs.append((h, size))
            a, a_size = h @ weight.t() + bias, size @ weight.abs().t() + bias.abs()
            if layer == len(self.weights) - 1:
                self.out, self.size = a, a_size
                break
            self.before.append((a, a_size))
            self.masks.append(mask_of(p, layer, task))
            h, size = self.act(a) * self.masks[-1], self.lip * a_size * self.masks[-1]

    def backward(self, g: Tensor, size: Tensor, slack: Tensor) -> dict[str, Terms]:
        """Of ``x``, ``weight0``, ``bias0``, ``weight1``, ...; ``size``, ``slack``: of the gradient at the outputs."""
        found: dict[str, Terms] = {}
        for layer in reversed(range(len(self.weights))):
            h, h_size = self.inputs[layer]
            found[f"weight{layer}"] = Terms(g.t() @ h, size.t() @ h.abs() + g.abs().t() @ h_size, slack.t() @ h.abs())
            found[f"bias{layer}"] = Terms(g.sum(0), size.sum(0), slack.sum(0))
            w = self.weights[layer].abs()
            up, terms, g, slack = size @ w, g.abs() @ w, g @ self.weights[layer], slack @ w
            if layer == 0:
                found["x"] = Terms(g, up, slack)
                break
            (a, a_size), mask = self.before[layer - 1], self.masks[layer - 1]
            with torch.enable_grad():
                own = a.detach().requires_grad_()
                (derivative,) = torch.autograd.grad(self.act(own).sum(), own)
            kink = (a.abs() <= self.roundoff * a_size).double() if self.jumps else torch.zeros_like(a)
            g = g * derivative * mask
            size = (self.lip * up + a_size * terms) * mask
            slack = (self.lip * slack + kink * terms) * mask
        return found


def check_forward(p: Problem, out: Tensor, grad: Tensor, got: dict[str, Tensor], plain: dict[str, Tensor] | None,
                  rounds: bool = False) -> None:  # fmt: skip
    """Outputs ``[N, K]`` (routed ``[N, max C_t]``), and the gradients for the gradient ``grad`` of the outputs.

    Args:
        p: The inputs.
        out: The outputs under test.
        grad: Of their shape.
        got: ``x``, ``weight0``, ``bias0``, ...
        plain: The same, and ``out``, from PyTorch in the same dtype; or None.
        rounds: Whether every layer's values are rounded to 16 bits.
    """
    theirs = plain or {}
    assert out.dtype == p.x.dtype
    unit = _unit(p, rounds)
    layers = 2.0 * len(p.weights) if rounds else 0.0
    sums: dict[str, list[Terms]] = {}
    for task, columns in enumerate(p.layout.slices.values()):
        trace = Trace(p, task, unit)
        rows = torch.arange(p.x.shape[0]) if p.route is None else (p.route == task).nonzero()[:, 0]
        width = columns.stop - columns.start
        of_out = columns if p.route is None else slice(0, width)
        exact = head(p, task)(p.x.double()).detach()[rows]
        torch.testing.assert_close(exact, trace.out[rows])  # the oracle agrees with itself
        size = trace.size[rows]
        own = theirs["out"][rows, of_out] if theirs else None
        assert_accurate(out[rows, of_out], exact, size, own, size * layers if rounds else None)
        if p.route is not None:
            assert not out[rows, width:].any()
        g = torch.zeros(p.x.shape[0], width, dtype=torch.float64)
        g[rows] = grad[rows, of_out].double()
        for name, terms in trace.backward(g, g.abs(), torch.zeros_like(g)).items():
            sums.setdefault(name, []).append(terms)
    _compare(_packed(sums), got, theirs, layers)


def check_losses(p: Problem, got: dict[str, Tensor], weights: Tensor, plain: dict[str, Tensor] | None = None,
                 rounds: bool = False) -> None:  # fmt: skip
    """Losses, counts, gradients of ``weights @ per_task`` and Gramian, as ``loss_oracle.check`` has them."""
    theirs = plain or {}
    unit = _unit(p, rounds)
    layers = 2.0 * len(p.weights) if rounds else 0.0
    per_task, counts, sizes, jacobian = [], [], [], []
    sums: dict[str, list[Terms]] = {}
    for task, (name, own) in enumerate(p.tasks.items()):
        trace = Trace(p, task, unit)
        out = head(p, task)(p.x.double()).detach()
        rows = torch.arange(len(out)) if p.route is None else (p.route == task).nonzero()[:, 0]
        y = p.labels[name] if p.route is None else _own_labels(p, own, rows)
        e = expected(out[rows], {name: y}, {name: own})
        per_task.append(e.per_task[0])
        counts.append(e.count[0])
        gradient, unit_of_label = (torch.zeros_like(out).index_copy(0, rows, t) for t in (e.gradient, e.unit))
        slope = gradient.abs() + 2 * unit_of_label
        sizes.append((slope * (1 + trace.size)).sum() + per_task[-1].abs())
        v = float(weights[task])
        slack = slope * unit * (1 + trace.size) if rounds else torch.zeros_like(out)  # gradients at rounded logits
        of_one = trace.backward(gradient, slope * (1 + trace.size), slack)
        jacobian.append(of_one["x"])
        for key, terms in of_one.items():
            sums.setdefault(key, []).append(Terms(terms.exact * v, terms.size * abs(v), terms.slack * abs(v)))
    exact, size = torch.stack(per_task), torch.stack(sizes)
    assert torch.equal(got["count"], torch.stack(counts))
    rounded = size * layers if rounds else None
    eps = torch.finfo(p.x.dtype).eps / 2
    slack = torch.zeros_like(size) if rounded is None else rounded * eps
    assert_accurate(got["per_task"], exact, size, theirs.get("per_task"), slack=slack)
    fixed = torch.tensor([task.weight for task in p.tasks.values()], dtype=torch.float64)
    if "total" in got:
        assert_accurate(got["total"], fixed @ exact, fixed @ size, theirs.get("total"), slack=fixed @ slack)
    _compare(_packed(sums), got, theirs, layers)
    if "gramian" in got:
        exact, size, slack = (torch.stack([j[i].flatten() for j in jacobian]) for i in range(3))
        slack = slack + size * layers * eps
        about = slack @ exact.abs().t()
        about = about + about.t() + slack @ slack.t()
        assert_accurate(got["gramian"], exact @ exact.t(), size @ size.t(), theirs.get("gramian"), slack=about)


def _unit(p: Problem, rounds: bool) -> float:
    if rounds:
        return 2 * len(p.weights) * torch.finfo(p.x.dtype).eps
    return ROUNDINGS * len(p.weights) * roundoff(p.x.dtype)


def _own_labels(p: Problem, task: mtl.Task, rows: Tensor) -> Tensor | None:
    if task.loss is None:
        return None
    y = p.labels[rows]
    return y.unsqueeze(1) if y.dim() == 1 else y[:, : label_columns(task)]


def _packed(sums: dict[str, list[Terms]]) -> dict[str, Terms]:
    """The parts of the heads one below the other; those of ``x`` added."""
    packed = {}
    for name, parts in sums.items():
        join = (lambda t: torch.stack(t).sum(0)) if name == "x" else torch.cat
        packed[name] = Terms(*(join([part[i] for part in parts]) for i in range(3)))
    return packed


def _compare(terms: dict[str, Terms], got: dict[str, Tensor], theirs: dict[str, Tensor], layers: float) -> None:
    for name, (exact, size, slack) in terms.items():
        if name in got:
            rounded = size * layers if layers else None
            assert_accurate(got[name], exact, size, theirs.get(name), rounded, slack)


def names_of(depth: int, biases: Sequence[Tensor]) -> list[str]:
    """What the tensors of a problem are called in the results."""
    return ["x", *(f"weight{i}" for i in range(depth)), *(f"bias{i}" for i in range(len(biases)))]
