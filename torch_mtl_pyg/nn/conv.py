"""Graph convolution to several tasks: neighbours are gathered once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.typing import OptPairTensor, OptTensor  # noqa: F401 (the comment on types in the code)

from .. import backend
from ..adjacency import edge_index_of
from ..ops import aggregate_linear, multi_head_linear
from ..ops._checks import check_floating
from ..task import Task, TaskLayout
from . import conv_modules, conv_parameters
from .conv_inputs import REDUCES, Inputs, read_inputs
from .conv_parameters import block_weights
from .features import Channels, Input, checked_channels
from .saving import describe_tasks, wrong_tasks

# What a subclass may override, and where hooks are kept: the fused path calls none of them.
_STEPS = ("propagate", "message", "aggregate", "update")
_HOOKS = tuple(f"_{step}_forward{pre}_hooks" for step in _STEPS[:3] for pre in ("", "_pre"))
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class MultiTaskConv(MessagePassing):  # type: ignore[misc]
    r"""A graph convolution to several tasks, whose neighbours are gathered and aggregated once.

    .. math::
        y_{ti} = W_t \bigoplus_{j \in \mathcal{N}(i)} w_{ij} x_j + V_t x_i + b_t

    With ``T`` tasks of widths :math:`C_t`, the tasks lie packed below each other: ``weight`` is ``[K, F]``,
    ``weight_root`` ``[K, F_dst]`` and ``bias`` ``[K]``, with :math:`K = \sum_t C_t`; ``slices`` maps a name to its
    rows. Task :math:`t` computes what ``SAGEConv(in_channels, C_t, aggr, root_weight=root_weight, bias=bias)`` does,
    and with ``normalize="gcn"`` what ``GCNConv(in_channels, C_t, bias=bias)`` does. ``aggr="sum"`` is ``GraphConv``.

    Where every task has features of its own, :math:`x_{tj}` takes the place of :math:`x_j`: :math:`W_t` reads them
    alone, and all tasks are still aggregated at once. So layers stack into one tower per task.

    Args:
        in_channels: Size ``F`` of the features, or -1 to take it from the first call. A pair for bipartite graphs: of
            the nodes that messages come from, and of those they go to. In place of an int, a dict from task to int:
            every task has features of its own, and ``weight`` is a ``ParameterList`` of ``[C_t, F_t]``, in packing
            order.
        out_channels: Name to width, or to :class:`~torch_mtl_pyg.Task`; the order is the packing order.
        aggr: ``"sum"`` (also ``"add"``), ``"mean"``, ``"max"`` and ``"min"`` are fused. Anything else PyG knows, a list
            or an ``Aggregation``, takes PyG's way over the messages. None: ``"mean"``, or ``"sum"`` with
            ``normalize="gcn"``.
        root_weight: Whether to add the node's own features, projected. None: True; with ``normalize="gcn"``, False.
        normalize: None, or ``"gcn"``: self-loops are added, and edges normalised symmetrically, as by ``GCNConv``.
        bias: Whether to add a bias.
        return_packed: Whether a call returns the packed ``[N_dst, K]`` instead of a dict, as ``HeteroConv`` and
            ``to_hetero`` need, which add what layers return.
        **kwargs: ``flow``, ``aggr_kwargs`` and ``decomposed_layers`` of ``MessagePassing``.

    Shapes:
        - input: ``x [N, F]`` for all tasks, or ``[N, T, F]`` or a dict of ``[N, F_t]`` for each; or a pair of those;
          ``edge_index [2, E]``, as tensor or ``EdgeIndex``, or a sparse ``[N_dst, N_src]`` with edge weights as values;
          ``edge_weight [E]``
        - output: ``dict`` of ``[N_dst, C_t]``, views of one packed ``[N_dst, K]``

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``out_channels`` is empty, a number is out of range, or ``normalize`` is unknown.
    """

    weight: nn.Parameter | nn.ParameterList
    weight_root: nn.Parameter | nn.ParameterList | None
    bias: nn.Parameter | None
    # Whether a subclass overrides none of the steps.
    _plain = True

    def __init__(
        self,
        in_channels: int | Mapping[str, int] | Sequence[int | Mapping[str, int]],
        out_channels: Mapping[str, Task | int],
        aggr: str | list[str] | Aggregation | None = None,
        root_weight: bool | None = None,
        normalize: str | None = None,
        bias: bool = True,
        *,
        return_packed: bool = False,
        **kwargs: Any,
    ) -> None:
        if normalize not in (None, "gcn"):
            raise ValueError(f"normalize: expected None or 'gcn', got {normalize!r}.")
        for name, value in (("root_weight", root_weight), ("bias", bias), ("return_packed", return_packed)):
            if not isinstance(value, bool) and not (name == "root_weight" and value is None):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}.")
        if kwargs.get("node_dim", -2) not in (-2, 0):
            raise ValueError(f"node_dim: expected -2, rows being nodes, got {kwargs['node_dim']}.")
        layout = TaskLayout(out_channels, "out_channels")
        pair = in_channels if isinstance(in_channels, (tuple, list)) else (in_channels, in_channels)
        if len(pair) != 2:
            raise ValueError(f"in_channels: expected one number or a pair, got {in_channels!r}.")
        names = ("in_channels[0]", "in_channels[1]") if pair is in_channels else ("in_channels", "in_channels")
        channels = [checked_channels(name, given, layout) for name, given in zip(names, pair, strict=True)]
        if not isinstance(aggr, (str, list, tuple, Aggregation, type(None))):
            raise TypeError(f"aggr: expected a name, a list of them or an Aggregation, got {type(aggr).__name__}.")
        if aggr is None:
            aggr = "mean" if normalize is None else "sum"
        if aggr == "lstm" and isinstance(channels[0], int):
            sizes = {"in_channels": channels[0], "out_channels": channels[0]}
            kwargs["aggr_kwargs"] = {**sizes, **(kwargs.get("aggr_kwargs") or {})}
        try:
            super().__init__(aggr, **kwargs)
        except TypeError as error:
            if "Aggregation" not in str(error):
                raise
            raise ValueError(
                f"aggr: expected {aggr!r} with its arguments in aggr_kwargs, got none: {error}."
            ) from error
        # The switch of MessagePassing: False has everything take the way over the messages.
        self.fuse = True
        self.layout = layout
        self.channels: tuple[Channels, Channels] = (channels[0], channels[1])
        self.bipartite = pair is in_channels
        self.normalize = normalize
        # What HeteroConv and to_hetero look at: loops make no sense between nodes of two kinds.
        self.add_self_loops = normalize == "gcn"
        self.root_weight = normalize is None if root_weight is None else root_weight
        self.return_packed = return_packed
        conv_parameters.create(self, bias)
        self.reset_parameters()
        backend.resolve()  # here, not while a first call is being traced

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # By what the classes hold now: PyG replaces propagate when the first layer of a class is made.
        own = cls.__mro__[: cls.__mro__.index(MultiTaskConv)]
        overridden = any(
            step in base.__dict__ for base in own if not issubclass(base, MultiTaskConv) for step in _STEPS
        )
        cls._plain = cls._plain and not overridden and not any(step in cls.__dict__ for step in _STEPS)

    # ---- What the layer is.

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Name to :class:`~torch_mtl_pyg.Task`, in packing order; read-only."""
        return self.layout.tasks

    @property
    def slices(self) -> Mapping[str, slice]:
        """Name to the task's columns of the packed output, which are its rows of ``weight``; read-only."""
        return self.layout.slices

    @property
    def in_channels(self) -> Channels | tuple[Channels, Channels]:
        """Sizes of the features: as given, or, where that was -1, as found in the first call."""
        first, second = self.channels
        if self.bipartite or (first != second and -1 not in (first, second)):
            return self.channels
        return second if first == -1 else first

    @property
    def out_channels(self) -> int:
        """Columns ``K`` of the packed output."""
        return self.layout.total

    def reset_parameters(self) -> None:
        r"""Draws all parameters anew, task by task as ``SAGEConv`` or ``GCNConv`` do.

        Weights are uniform in :math:`\pm 1 / \sqrt{F}`, biases too; with ``normalize="gcn"``, weights are Glorot's for
        each task, and biases 0.
        """
        super().reset_parameters()
        conv_parameters.draw(self)

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name}: {width}" for name, width in self.layout.describe())
        normalize = f", normalize={self.normalize}" if self.normalize else ""
        return (
            f"{type(self).__name__}({self.in_channels}, out_channels={{{tasks}}}, aggr={self.aggr}, "
            f"root_weight={self.root_weight}{normalize}, bias={self.bias is not None})"
        )

    # ---- Computing it.

    def forward(
        self,
        x: Input | Sequence[Input | None],
        edge_index: Any,
        edge_weight: Tensor | None = None,
        size: Sequence[int | None] | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Computes all tasks.

        Args:
            x: Node features: ``[N, F]``, ``[N, T, F]`` or a dict from task to ``[N, F_t]``; or a pair of those,
                ``(x_src, x_dst)``, for the nodes that messages come from and go to, whatever the flow. ``x_dst`` may be
                None: then no ``weight_root`` is used, and ``size`` says how many they are. Columns of one matrix in
                packing order, as another layer returns them, are not copied.
            edge_index: ``[2, E]`` int64, as tensor or ``EdgeIndex`` (grouped once, and kept), or the transposed
                adjacency matrix ``[N_dst, N_src]``, ``torch.sparse`` or ``torch_sparse``, whose values are weights.
            edge_weight: ``[E]``, or None: 1.
            size: Numbers of nodes that messages come from and go to, either may be None; or None: those of ``x``.

        Returns:
            ``dict`` of name to ``[N_dst, C_t]``, views of one packed buffer; with ``return_packed``, that buffer.

        Raises:
            TypeError: An argument has the wrong type, or dtypes differ.
            ValueError: A shape, size or device does not fit, both a matrix and ``edge_weight`` hold weights, or
                ``normalize="gcn"`` meets a pair.
            IndexError: An edge has an end that is no node.
        """
        packed = self.packed(x, edge_index, edge_weight, size)
        return packed if self.return_packed else self._columns(packed)

    def packed(
        self,
        x: Input | Sequence[Input | None],
        edge_index: Any,
        edge_weight: Tensor | None = None,
        size: Sequence[int | None] | None = None,
    ) -> Tensor:
        """Computes all tasks side by side: ``[N_dst, K]``; ``slices`` maps a name to its columns.

        Arguments and errors are those of :meth:`forward`.
        """
        inputs = read_inputs(self, x, edge_index, edge_weight, size)
        reduce = self._fused_reduce(inputs.edge_weight)
        if reduce is None:
            return self._over_messages(inputs)
        sources, targets = inputs.sources, inputs.targets
        return aggregate_linear(
            sources.packed,
            inputs.adjacency,
            block_weights(self.weight, sources, self.layout),
            self.bias,
            inputs.edge_weight,
            reduce,
            None if targets is None else targets.packed,
            None if targets is None else block_weights(self.weight_root, targets, self.layout),
        )

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """The tasks' columns of a packed ``[N, K]``: ``dict`` of name to ``[N, C_t]``, views.

        Raises:
            TypeError, ValueError: ``packed`` is no floating-point tensor ``[N, K]``.
        """
        check_floating("packed", packed, 2, f"[N, {self.layout.total}]")
        if packed.shape[1] != self.layout.total:
            raise ValueError(f"packed: expected shape [N, {self.layout.total}], got {list(packed.shape)}.")
        return self._columns(packed)

    def _columns(self, packed: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, torch.split_with_sizes(packed, self.layout.widths, 1), strict=True))

    def _fused_reduce(self, edge_weight: Tensor | None) -> str | None:
        """How the fused path reduces; None: it does not compute the same as the way over the messages."""
        reduce = REDUCES.get(type(self.aggr_module))
        changed = not self._plain or not self.fuse or self.explain is True or any(getattr(self, h) for h in _HOOKS)
        # Not propagate: PyG itself puts it there. Modules may be watched by hooks of their own.
        changed = changed or any(step in self.__dict__ for step in _STEPS[1:])
        changed = changed or any(getattr(self.aggr_module, hooks) for hooks in _MODULE_HOOKS)
        if changed or reduce is None or (reduce in ("max", "min") and edge_weight is not None):
            return None
        return reduce

    # ---- PyG's way, over the messages.

    def _over_messages(self, inputs: Inputs) -> Tensor:
        sources, targets, x_dst, adjacency, edge_weight = inputs
        forward = self.flow == "source_to_target"
        n, m = adjacency.num_src, adjacency.num_dst
        size = (n, m) if forward else (m, n)
        edge_index = edge_index_of(adjacency, self.flow)
        # An aggregation that may mix columns sees each task alone.
        alone = sources.widths is not None and type(self.aggr_module) not in REDUCES
        columns = sources.packed.split(sources.widths, dim=1) if alone else (sources.packed,)
        aggregated = []
        for own in columns:
            x: Any = own
            # Our own messages need no targets; those of a subclass may.
            if not self._plain and x_dst is not None:
                other = x_dst if targets is None else targets.packed
                x = (own, other if isinstance(other, Tensor) and other.dim() == 2 else None)
            # propagate_type: (x: OptPairTensor, edge_weight: OptTensor)
            aggregated.append(self.propagate(edge_index, x=x, edge_weight=edge_weight, size=size))
        weights = block_weights(self.weight, sources, self.layout)
        if len(aggregated) < len(weights):
            aggregated = list(aggregated[0].split([weight.shape[1] for weight in weights], dim=1))
        out = self._projected(aggregated, weights, self.bias)
        if targets is None:
            return out
        roots = block_weights(self.weight_root, targets, self.layout)
        return out + self._projected(targets.packed.split([w.shape[1] for w in roots], dim=1), roots, None)

    def _projected(self, columns: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        if len(weights) == 1:
            return multi_head_linear(columns[0], weights[0], bias)
        biases = (None,) * len(weights) if bias is None else bias.split(self.layout.widths)
        parts = [multi_head_linear(*each) for each in zip(columns, weights, biases, strict=True)]
        return torch.cat(parts, dim=1)

    def message(self, x_j: Tensor, edge_weight: OptTensor) -> Tensor:
        """``w_ij x_j`` of each edge ``[E, F]``; called unless the fused path computes the same."""
        return x_j if edge_weight is None else edge_weight.view(-1, 1) * x_j

    # ---- Exchanging it with single layers.

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module]) -> MultiTaskConv:
        """Packs ``SAGEConv`` or ``GCNConv`` layers; parameters are copied, bit for bit.

        Args:
            modules: ``dict`` or ``ModuleDict`` of layers that differ in their widths only. Where also their numbers of
                input channels differ, every task has features of its own.

        Raises:
            TypeError: A module is neither, or their types or dtypes differ.
            ValueError: There is none, or one has an option that this layer does not have or that the others do not
                share; the message names it.
        """
        return conv_modules.pack(cls, modules)

    def to_modules(self) -> dict[str, MessagePassing]:
        """The tasks as one ``SAGEConv`` each, or ``GCNConv`` with ``normalize="gcn"``; parameters are copied.

        Raises:
            ValueError: With ``normalize="gcn"``: there is a ``root_weight``, or ``aggr`` is not ``"sum"``. The layer is
                lazy, and has no parameters yet.
        """
        return conv_modules.unpack(self)

    # ---- Saving and loading: the names travel with the weights, so that tasks cannot be taken for each other.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A parameter without a shape cannot be detached.
        super()._save_to_state_dict(destination, prefix, keep_vars or conv_parameters.is_lazy(self))
        describe_tasks(destination, prefix, self.layout)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        wrong = wrong_tasks(local_metadata, prefix, self.layout)
        if wrong:
            errors.append(wrong)
            return
        conv_parameters.settle_for(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        backend.resolve()
