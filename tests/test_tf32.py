"""Products of float32 on tensor cores where the setting of the library allows it, in emulation."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch, torch_mtl_pyg as mtl
mtl.use_backend("fused")
torch.manual_seed(0)
heads = mtl.MultiTaskHeads(40, {"a": mtl.Task(5, loss="cross_entropy"), "b": mtl.Task(3, loss="mse")})
x = torch.randn(70, 40, requires_grad=True)
y = {"a": torch.randint(0, 5, (70,)), "b": torch.randn(70, 3)}

def step():
    out = heads.packed(x)
    total = heads.loss(x, y).total
    return [out.detach(), total.detach(), *torch.autograd.grad(out.sum() + total, (x, heads.weight, heads.bias))]

exact = step()
torch.ops.torch_mtl_pyg.allow_tf32(True)
rounded = step()
torch.ops.torch_mtl_pyg.allow_tf32(False)
assert all(torch.equal(a, b) for a, b in zip(exact, step()))
errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded)]
print(max(errors), min(errors))
"""


def test_tf32_is_used_only_where_it_is_allowed() -> None:
    environment = {**os.environ, "TORCH_MTL_PYG_EMULATE": "cuda", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    largest, smallest = map(float, done.stdout.split())
    # Ten bits are kept of each factor: 2^-11 of relative error for each, of which sums of random signs keep less.
    assert 1e-5 < largest < 2**-10
    assert smallest > 0
