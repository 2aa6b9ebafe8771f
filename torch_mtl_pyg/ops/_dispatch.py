"""Where an op runs: on the compiled library, or on the reference; and what autocast does to its arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from .. import backend
from ._checks import check_floating, check_same

# Devices the compiled library has kernels for, as it says itself once loaded. "meta" tensors only need shapes.
FUSED_DEVICES: tuple[str, ...] = ("cpu", "meta")

LIBRARY = torch.library.Library("torch_mtl_pyg", "FRAGMENT")
# Tensors of torch.autograd.grad(..., is_grads_batched=True).
is_batched = torch._C._functorch.is_legacy_batchedtensor

_warned: set[tuple[str, str]] = set()


def register() -> None:
    """Asks the compiled library for its devices."""
    global FUSED_DEVICES
    FUSED_DEVICES = (*torch.ops.torch_mtl_pyg.devices().split(","), "meta")


def register_shapes(op: str, kernel: Callable[..., Any]) -> None:
    """Registers what an op returns for tensors that have a shape alone: those of the device meta, and fake ones.

    PyTorch takes this kernel wherever one tensor is on that device, so that a mixture would get memory without values.
    """

    def checked(*args: Any) -> Any:
        results = kernel(*args)
        if any(t.device.type != "meta" for t in tree_leaves(results)):
            _refuse_mixture(op, args)
        return results

    LIBRARY.impl(op, checked, "Meta")


def _refuse_mixture(op: str, args: Sequence[Any]) -> None:
    parameters = getattr(torch.ops.torch_mtl_pyg, op).default._schema.arguments
    for parameter, arg in zip(parameters, args, strict=False):
        for t in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(t, Tensor) and t.device.type != "meta":
                raise ValueError(f"{parameter.name}: expected the device of the others, meta, got {t.device}.")


def runs_fused(device: str, op: str) -> bool:
    """Whether an op on tensors of this type of device runs on the compiled library.

    Raises:
        RuntimeError: The backend is ``"fused"``, and the library cannot be loaded or has no kernels for this device.
    """
    if not backend.resolve():
        return False
    if device in FUSED_DEVICES and (device != "cuda" or _has_cuda_kernels(op)):
        if device == "cuda":
            _follow_tf32()
        return True
    message = f"torch_mtl_pyg has no compiled kernels of {op} for the device {device!r}"
    if backend.choice() == "fused":
        raise RuntimeError(f'x: {message}, and the backend "fused" was asked for.')
    if (device, op) not in _warned:
        _warned.add((device, op))
        warnings.warn(f"{message}: plain PyTorch computes it there.", RuntimeWarning, stacklevel=3)
    return False


# Dynamo takes the answer as a constant: a loaded library keeps its kernels. PyTorch takes 5 microseconds to give it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_cuda_kernels(op: str) -> bool:
    known = _cuda_kernels.get(op)
    if known is None:
        known = bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_mtl_pyg::{op}", "CUDA"))
        _cuda_kernels[op] = known
    return known


# Asked of a loaded library alone, so that no answer is one of before.
_cuda_kernels: dict[str, bool] = {}


# As PyTorch has it now; while something is compiled, as it has it then: a change makes Dynamo compile again.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _follow_tf32() -> bool:
    """Tells the compiled library whether products of float32 may be those of tf32."""
    global _tf32
    allowed = bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    if allowed is not _tf32:
        torch.ops.torch_mtl_pyg.allow_tf32(allowed)
        _tf32 = allowed
    return allowed


_tf32 = False


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_to(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments as a matrix product takes them under autocast: floating point, but for float64, in its dtype."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Checks the arguments, casts them under autocast, and tells whether the compiled op computes them."""
    check_floating("weight", weight, 2, "[K, D]")
    check_floating("x", x, 2, "[N, {}]", weight, 1)
    if bias is not None:
        check_floating("bias", bias, 1, "[{}]", weight, 0)
    device = x.device.type
    if autocasts(device):
        x, weight, bias = autocast_to(device, x, weight, bias)  # type: ignore[assignment]
    check_same("x", x, "weight", weight)
    if bias is not None:
        check_same("bias", bias, "weight", weight)
    return x, weight, bias, runs_fused(device, op) and not transformed()


def is_plain_call(x: Any, op: str) -> bool:
    """Whether the compiled op can be called at once: nothing is traced, cast or transformed around the call.

    Such a call leaves the checks to the op, and only when that raises are the arguments looked at, by `prepare`. A
    subclass of Tensor may be one without values, such as a fake one, for which no kernel checks anything.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN_TENSORS:
        return False
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else ""
    return (
        device != ""
        and x.layout is torch.strided
        and not torch.is_autocast_enabled(device)
        and runs_fused(device, op)
        and not transformed()
    )


# What a compiled op, or Python on the way to it, raises at an argument that it refuses.
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether values are more than values: in a transform of torch.func, or with forward-mode tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_gramian_in_transform(*tensors: Tensor | None) -> None:
    """A Gramian comes from a gradient that is taken inside of the call, which ``torch.func.vmap`` cannot follow.

    Raises:
        ValueError: One of the tensors has a dimension of ``vmap``.
    """
    if any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in tensors):
        raise ValueError("gramian: expected False inside of torch.func.vmap, got True.")


def records(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd has to know of the op."""
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
