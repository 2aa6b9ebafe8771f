"""The part of gpu_check.py for what people put around a step: torch.compile, autocast, a gradient scaler, streams,
threads, a GPU that is not the current one, other weights in the backward.

Each case takes losses and the gradients of the embedding, weights and biases, and compares them with float64.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor

import torch_mtl_pyg as mtl

Expect = Callable[[str, Tensor, Tensor, torch.dtype], None]
# One way of computing linear heads and one of those with hidden layers.
TASKS: dict[str, mtl.Task] = {
    "many": mtl.Task(16, loss="cross_entropy"),
    "few": mtl.Task(3, loss="cross_entropy", weight=0.5),
    "mse": mtl.Task(1, loss="mse"),
}
CASES: tuple[tuple[int, int, list[int] | None], ...] = ((700, 64, None), (300, 40, [16]))
Results = tuple[Tensor, ...]


class Case:
    """Heads, inputs and labels, and the exact results of a step: losses, total, gradients."""

    def __init__(self, n: int, d: int, hidden: list[int] | None, device: torch.device, rounded: torch.dtype) -> None:
        torch.manual_seed(0)
        self.what = f"{n} x {d}, hidden {hidden}"
        self.heads = mtl.MultiTaskHeads(d, TASKS, hidden_channels=hidden).to(device)
        self.x = torch.randn(n, d, device=device)
        with torch.no_grad():  # of values that the type of the case holds: their rounding is no error of the kernels
            for t in (self.x, *self.heads.parameters()):
                t.copy_(t.to(rounded))
        self.x.requires_grad_()
        y = {"many": torch.randint(0, 16, (n,)), "few": torch.randint(0, 3, (n,)), "mse": torch.randn(n)}
        y["many"][torch.rand(n) < 0.3] = -100
        y["mse"][torch.rand(n) < 0.3] = torch.nan
        self.y = {name: labels.to(device) for name, labels in y.items()}
        heads, x = copy.deepcopy(self.heads).double(), self.x.detach().double().requires_grad_()
        with mtl.use_backend("reference"):
            losses = heads.loss(x, self.y)
            self.exact = (losses.per_task.detach(), losses.total.detach(), *self.gradients(losses.total, heads, x))
            self.of_first = self.gradients(heads.loss(x, self.y).per_task[0], heads, x)

    @staticmethod
    def gradients(loss: Tensor, heads: mtl.MultiTaskHeads, x: Tensor) -> Results:
        """Of the embedding and all parameters."""
        return torch.autograd.grad(loss, (x, *heads.parameters()))

    def step(self) -> Results:
        """Losses, total, and the gradients of the total."""
        losses = self.heads.loss(self.x, self.y)
        return losses.per_task, losses.total, *self.gradients(losses.total, self.heads, self.x)

    def expect(self, way: str, got: Results, dtype: torch.dtype, check: Expect, exact: Results | None = None) -> None:
        """Each result against its exact one."""
        for i, (a, b) in enumerate(zip(got, self.exact if exact is None else exact, strict=True)):
            check(f"{self.what}, {way}, result {i}", a.detach().double(), b.to(a.device), dtype)

    def expect_same(self, way: str, got: Results, wanted: Results) -> None:
        """Bit for bit."""
        if not all(torch.equal(a, b.to(a.device)) for a, b in zip(got, wanted, strict=True)):
            raise SystemExit(f"{self.what}, {way}: not the same as without")


def compiled(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """The step up to its total, without a graph break."""
    compiler = "inductor" if case.x.is_cuda else "aot_eager"  # the op sees no difference, and the second one is quick
    torch._dynamo.reset()

    def total(x: Tensor) -> Tensor:
        return case.heads.loss(x, case.y).total

    loss = torch.compile(total, fullgraph=True, backend=compiler)(case.x)
    got = (loss, *case.gradients(loss, case.heads, case.x))
    torch._dynamo.reset()
    case.expect("torch.compile", got, dtype, check, case.exact[1:])


def autocast(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """Parameters of float32, products of 16-bit numbers, gradients of float32."""
    with torch.autocast(case.x.device.type, dtype):
        out = case.heads.packed(case.x)
        losses = case.heads.loss(case.x, case.y)
    if out.dtype != dtype:
        raise SystemExit(f"{case.what}, autocast: outputs of {out.dtype} instead of {dtype}")
    got = (losses.per_task, losses.total, *case.gradients(losses.total, case.heads, case.x))
    if any(g.dtype != torch.float32 for g in got):
        raise SystemExit(f"{case.what}, autocast: gradients of {[g.dtype for g in got]} instead of float32")
    case.expect(f"autocast to {dtype}", got, dtype, check)


def scaled(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """A loss scale of 2^16, which float16 needs."""
    scaler = torch.amp.GradScaler(case.x.device.type)
    optimizer = torch.optim.SGD([case.x, *case.heads.parameters()], lr=0.0)
    optimizer.zero_grad()
    with torch.autocast(case.x.device.type, dtype):
        losses = case.heads.loss(case.x, case.y)
    scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    grads = tuple(p.grad for p in (case.x, *case.heads.parameters()) if p.grad is not None)
    case.expect("gradient scaler", (losses.per_task, losses.total, *grads), dtype, check)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() != 65536.0:
        raise SystemExit(
            f"{case.what}, gradient scaler: a scale of {scaler.get_scale()}, so that numbers were infinite"
        )
    optimizer.zero_grad()


def of_one_task(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """Through `per_task`, for which gradients are computed anew."""
    grads = case.gradients(case.heads.loss(case.x, case.y).per_task[0], case.heads, case.x)
    case.expect("gradients of one task", grads, dtype, check, case.of_first)


def in_threads(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """Four at once, each with its own step."""
    wanted, got = case.step(), [()] * 4

    def work(i: int) -> None:
        got[i] = case.step()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for results in got:
        case.expect_same("threads", results, wanted)


def on_stream(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """A stream that waits for nothing but its own inputs."""
    wanted, side = case.step(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = case.step()
    torch.cuda.current_stream().wait_stream(side)
    case.expect_same("stream", got, wanted)


def on_second(case: Case, check: Expect, dtype: torch.dtype) -> None:
    """Tensors of another GPU than the current one."""
    wanted, other = case.step(), copy.copy(case)
    other.heads, other.x = copy.deepcopy(case.heads).to("cuda:1"), case.x.detach().to("cuda:1").requires_grad_()
    other.y = {name: y.to("cuda:1") for name, y in case.y.items()}
    case.expect_same("second GPU", other.step(), wanted)


# The dtype whose errors the results may have, and the comparison.
Way = tuple[torch.dtype, Callable[[Case, Expect, torch.dtype], None]]
WAYS: tuple[Way, ...] = (
    *((torch.float32, compiled), (torch.bfloat16, autocast), (torch.float16, autocast), (torch.float16, scaled)),
    *((torch.float32, of_one_task), (torch.float32, in_threads)),
)


def check(device: torch.device, expect: Expect) -> int:
    """All ways of both cases; returns their number."""
    ways = [*WAYS]
    if device.type == "cuda":
        ways.append((torch.float32, on_stream))
        if torch.cuda.device_count() > 1:
            ways.append((torch.float32, on_second))
    for n, d, hidden in CASES:
        for dtype, compare in ways:
            compare(Case(n, d, hidden, device, dtype), expect, dtype)
    return len(CASES) * len(ways)
