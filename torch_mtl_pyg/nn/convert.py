"""An ordinary model of PyG as a multi-task model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..task import Task, TaskLayout
from .final_layer import UnclearError, final_layer, named_layer, without
from .heads import MultiTaskHeads
from .levels import Edge, Pool
from .model import MultiTaskModel


def multi_task(
    model: nn.Module,
    tasks: Mapping[str, Task | int],
    final: str | None = None,
    pool: Pool = "auto",
    edge: Edge = "mul",
    **heads_options: Any,
) -> MultiTaskModel:
    """Exchanges the last layer of a model for heads; all other weights are kept, on a copy.

    ======================================== ===========================================================================
    model                                    what is exchanged
    ======================================== ===========================================================================
    ``GCN``, ``GAT``, ``GIN``, ...           without ``out_channels``: nothing, heads go behind it; with ``jk``: its
                                             linear layer; else the last convolution, so that there is one hop less
    ``SchNet``, ``DimeNet``                  ``lin2``, the ``lin`` of all output blocks; then they sum up embeddings
    ``Sequential`` of PyG or of torch        the last module, which may have ``global_mean_pool``, ... behind it
    another module                           the module whose result its forward returns, perhaps pooled, as
                                             ``torch.fx`` follows it; modules within it are looked into
    ======================================== ===========================================================================

    A final convolution's place is taken by a module that ignores the edges.

    Args:
        model: The model; stays as it is.
        tasks: As for :class:`~torch_mtl_pyg.MultiTaskHeads`.
        final: The name of the layer to exchange (a linear layer or a convolution), as ``model.named_modules()`` has it.
            What the model does behind it, it then does to the embedding. ``""``: nothing is exchanged, heads go behind
            the model, whose ``out_channels`` they read. None: it is found out.
        pool: As for :class:`~torch_mtl_pyg.MultiTaskModel`; ``"auto"``: None where the model pools by itself, as far as
            that can be told, and all tasks without a level then are of graphs; else ``"mean"``.
        edge: As for :class:`~torch_mtl_pyg.MultiTaskModel`.
        **heads_options: Of :class:`~torch_mtl_pyg.MultiTaskHeads`: ``hidden_channels``, ``act``, ``dropout``, ``bias``.

    Returns:
        :class:`~torch_mtl_pyg.MultiTaskModel`, with heads of the dtype and device of the model.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The last layer cannot be told; the message says why. Or there is no module called ``final``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if final is not None and not isinstance(final, str):
        raise TypeError(f"final: expected the name of a module or None, got {type(final).__name__}.")
    layout = TaskLayout(tasks)
    try:
        found = final_layer(model) if final is None else named_layer(model, final)
    except UnclearError as error:
        advice = "" if "final=" in str(error) else '; name it: final="lin" for model.lin'
        raise ValueError(f"model: expected one whose last layer can be told, but {error}{advice}.") from error
    given: dict[str, Task] = dict(layout.tasks)
    if isinstance(pool, str) and pool == "auto":
        pool = None if found.pools else "mean"
    if pool is None and found.pools:
        given = {name: task if task.level else replace(task, level="graph") for name, task in given.items()}
    heads = MultiTaskHeads(found.in_channels, given, **heads_options)
    layer = model.get_submodule(found.names[0]) if found.names else model
    parameter = next((p for p in (*layer.parameters(), *model.parameters()) if p.is_floating_point()), None)
    if parameter is not None:
        heads.to(parameter.device, parameter.dtype)
    return MultiTaskModel(without(model, found.names), heads, pool=pool, edge=edge).train(model.training)
