"""TorchJD's methods: found by name, made, and what each is fed."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn


class Method(NamedTuple):
    """A method of TorchJD, and how it is used.

    Attributes:
        module: The ``Scalarizer`` or ``Weighting``.
        name: Of the class the user chose.
        feed: What ``module`` takes: ``"losses"`` ``[T]``, ``"gramian"`` ``[T, T]``, ``"factor"``: some matrix that has
            this Gramian, ``"jacobian"`` ``[T, P]``.
        memory: Whether it keeps numbers per task between calls, apart from parameters.
        scale_free: Whether it divides by the trace of the Gramian, unless that lies below an absolute bound.
        two_batches: Whether its matrix may come from two independent batches.
    """

    module: nn.Module
    name: str
    feed: str
    memory: bool
    scale_free: bool
    two_batches: bool


def method_names() -> list[str]:
    """The names that :class:`Balancer` takes for TorchJD's methods, as the installed version has them.

    Raises:
        ImportError: TorchJD is not installed.
    """
    return sorted({_key(cls.__name__.removesuffix("Weighting")) for cls in _classes().values()})


def resolve(method: object, args: tuple[Any, ...], kwargs: dict[str, Any], tasks: int | None) -> Method:
    """Finds or makes a method. ``tasks`` is their number, where it is known.

    Raises:
        ImportError: TorchJD, or a package that this method needs, is not installed.
        TypeError: ``method`` is nothing of TorchJD, or arguments came with an instance, or do not fit the class.
        ValueError: There is no method of this name, or it does not weight tasks.
    """
    aggregation, scalarization = torchjd()
    if isinstance(method, str):
        method = _make(method, args, kwargs, tasks)
    elif args or kwargs:
        raise TypeError("method: expected a name where arguments are given, got an instance.")
    name, feed = type(method).__name__, "gramian"
    if isinstance(method, aggregation.GramianWeightedAggregator):
        method = method.gramian_weighting
    elif isinstance(method, aggregation.WeightedAggregator):
        # Its weighting takes the Jacobian. Where it uses inner products of the rows alone, any matrix that has them
        # gives the same weights.
        method, feed = method.weighting, "factor"
    if isinstance(method, scalarization.Scalarizer):
        feed = "losses"
    elif not isinstance(method, aggregation.Weighting):
        if isinstance(method, aggregation.Aggregator):
            raise ValueError(f"method: {name} combines gradients without weights; see torchjd.autojac.jac_to_grad.")
        raise TypeError(
            "method: expected a name, a Weighting or Scalarizer of TorchJD or None, got "
            f"{method if isinstance(method, type) else type(method).__name__}."
        )
    parts = list(method.modules())
    # A diagonal metric: it sees the coordinates, not only the inner products.
    if any(isinstance(part, aggregation.ExcessMTLWeighting) for part in parts):
        feed = "jacobian"
    return Method(
        method,
        name,
        feed,
        memory=any(_has_memory(part) for part in parts),
        scale_free=any(hasattr(p, "norm_eps") or hasattr(getattr(p, "projector", None), "norm_eps") for p in parts),
        two_batches=any(isinstance(p, (aggregation.MoDoWeighting, aggregation.SDMGradWeighting)) for p in parts),
    )


def torchjd() -> tuple[ModuleType, ModuleType]:
    """TorchJD's ``aggregation`` and ``scalarization``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from torchjd import aggregation, scalarization
    except ImportError as error:
        raise ImportError("Balancing needs TorchJD: pip install 'torch_mtl_pyg[balancing]'.") from error
    return aggregation, scalarization


def is_stateful(module: nn.Module) -> bool:
    """Whether TorchJD can reset it."""
    from torchjd import Stateful

    return isinstance(module, Stateful)


def _has_memory(module: nn.Module) -> bool:
    if not is_stateful(module):
        return False
    # UW and IMTL-L have parameters, and nothing else. DWA and FAMO are told of more than the losses of a step.
    _, scalarization = torchjd()
    return not isinstance(module, scalarization.Scalarizer) or any(
        callable(getattr(module, name, None)) for name in ("update", "step")
    )


def _classes() -> dict[str, type[nn.Module]]:
    """Names as :func:`_key` writes them, to classes. ``"mean"`` is the scalarizer, which needs no Gramian."""
    aggregation, scalarization = torchjd()
    found: dict[str, type[nn.Module]] = {}
    bases = (aggregation.WeightedAggregator, aggregation.GramianWeightedAggregator)
    for module, base in (
        (aggregation, aggregation.WeightedAggregator),
        (aggregation, aggregation.Weighting),
        (scalarization, scalarization.Scalarizer),
    ):
        for name in module.__all__:
            cls = getattr(module, name)
            if issubclass(cls, base) and not inspect.isabstract(cls) and cls not in bases:
                found[_key(name)] = cls
                found[_key(name.removesuffix("Weighting"))] = cls
    return found


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _make(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tasks: int | None) -> nn.Module:
    cls = _classes().get(_key(name))
    if cls is None:
        aggregation, _ = torchjd()
        if _key(name) in {_key(other) for other in aggregation.__all__}:
            raise ValueError(f"method: {name!r} combines gradients without weights; see torchjd.autojac.jac_to_grad.")
        raise ValueError(f"method: expected one of none, {', '.join(method_names())}, got {name!r}.")
    signature = inspect.signature(cls)
    if tasks is not None:
        given = signature.bind_partial(*args, **kwargs).arguments
        for size in ("shape", "n_tasks"):
            if size in signature.parameters and size not in given:
                kwargs = {**kwargs, size: tasks}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"method: {cls.__name__}{signature} does not fit the arguments given: {error}.") from error
    return cls(*args, **kwargs)
