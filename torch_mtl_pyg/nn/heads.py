"""One head per task over a shared embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..ops import Hidden, multi_head_linear, multi_head_linear_split, multi_head_mlp, multi_head_mlp_split
from ..ops.multi_head_loss import Labels
from ..task import Task, TaskLayout, TaskLosses, as_task, checked_integer
from . import freezing, repacking
from .hidden import checked_act, hidden_widths, layers_of_modules, module_of, output_of
from .loss import losses_of_all, losses_of_one, losses_of_routed
from .saving import describe_tasks, wrong_tasks


class MultiTaskHeads(nn.Module):
    r"""One head per task, linear or with hidden layers, all computed from the shared embedding in one launch.

    With ``T`` tasks of widths :math:`C_t`, the heads lie packed below each other: ``weight`` is ``[K, D]`` and ``bias``
    ``[K]`` with :math:`K = \sum_t C_t`, in the order of ``tasks``; ``slices`` maps a name to its rows. The output of
    task :math:`t` is :math:`X W_t^\top + b_t`, as ``torch.nn.Linear(D, C_t)`` computes it.

    With ``hidden_channels`` each head is an MLP of its own, layers :math:`l` with activation and dropout between them.
    ``hidden_weight_0`` is ``[T h_1, D]``, ``hidden_weight_1`` ``[T h_2, h_1]``, ..., and ``weight`` ``[K, h_L]``; the
    rows of task ``t`` in a hidden layer are ``[t h, (t + 1) h)``.

    Args:
        in_channels: Size ``D`` of the shared embedding.
        tasks: Name to :class:`~torch_mtl_pyg.Task` or to the width alone; the order is the packing order.
        hidden_channels: Widths of the hidden layers of every head: an int, or one for each layer. None: linear heads.
        act: Activation of the hidden layers: "relu", "gelu" (exact), "silu", "tanh" or "elu".
        dropout: Share of the hidden units that are zero in training, in ``[0, 1]``; the others are multiplied by
            ``1 / (1 - dropout)``. The masks come from torch's CPU generator and are those of every backend.
        bias: Whether the heads add a bias.

    Shapes:
        - input: ``x [N, D]``
        - output: ``dict`` of ``[N, C_t]``, views of one packed ``[N, K]``

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``tasks`` is empty, a width or ``in_channels`` is below 1, or ``act`` is none of those with hidden
            layers.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        tasks: Mapping[str, Task | int],
        hidden_channels: int | Sequence[int] | None = None,
        act: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        in_channels = checked_integer("in_channels", in_channels)
        if in_channels < 1:
            raise ValueError(f"in_channels: expected at least 1, got {in_channels}.")
        self.hidden_channels = hidden_widths(hidden_channels)
        self.act = checked_act(act, bool(self.hidden_channels))
        if isinstance(dropout, (bool, str)) or not hasattr(dropout, "__float__") or getattr(dropout, "ndim", 0) > 0:
            raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}.")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1], got {dropout}.")
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}.")
        self.in_channels = in_channels
        self.dropout = float(dropout)
        self.layout = TaskLayout(tasks)
        before = in_channels
        for layer, width in enumerate(self.hidden_channels):
            weight, name = self.layer_names(layer)
            rows = width * len(self.layout.names)
            self.register_parameter(weight, nn.Parameter(torch.empty(rows, before)))
            self.register_parameter(name, nn.Parameter(torch.empty(rows)) if bias else None)
            before = width
        self.weight = nn.Parameter(torch.empty(self.layout.total, before))
        self.register_parameter("bias", nn.Parameter(torch.empty(self.layout.total)) if bias else None)
        self._frozen: frozenset[str] = frozenset()
        self.reset_parameters()
        backend.resolve()  # here, not while a first call is being traced

    # ---- What the heads are.

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Name to :class:`~torch_mtl_pyg.Task`, in packing order; read-only."""
        return self.layout.tasks

    @property
    def slices(self) -> Mapping[str, slice]:
        """Name to the task's columns of the packed output, which are its rows of ``weight``; read-only."""
        return self.layout.slices

    @property
    def out_channels(self) -> int:
        """Columns ``K`` of the packed output."""
        return self.layout.total

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the frozen heads."""
        return self._frozen

    @property
    def depth(self) -> int:
        """Number of layers, 1 for linear heads."""
        return len(self.hidden_channels) + 1

    def layer_names(self, layer: int) -> tuple[str, str]:
        """The names of a layer's weight and bias."""
        if layer == len(self.hidden_channels):
            return "weight", "bias"
        return f"hidden_weight_{layer}", f"hidden_bias_{layer}"

    def rows_of(self, layer: int, name: str, layout: TaskLayout | None = None) -> slice:
        """The rows of a task in a layer's weight and bias; ``layout``: of other tasks than these, or None."""
        layout = layout or self.layout
        if layer == len(self.hidden_channels):
            return layout.slices[name]
        width, place = self.hidden_channels[layer], layout.names.index(name)
        return slice(place * width, (place + 1) * width)

    def bound_of(self, layer: int) -> float:
        r"""The bound of freshly drawn weights and biases of a layer, :math:`1 / \sqrt{\text{inputs}}`."""
        return 1.0 / math.sqrt((self.in_channels, *self.hidden_channels)[layer])

    def reset_parameters(self) -> None:
        r"""Draws all parameters as ``torch.nn.Linear`` does: uniform in :math:`\pm 1 / \sqrt{\text{inputs}}`."""
        for layer in range(self.depth):
            for name in self.layer_names(layer):
                parameter = getattr(self, name)
                if parameter is not None:
                    nn.init.uniform_(parameter, -self.bound_of(layer), self.bound_of(layer))
        freezing.remake_mask(self)

    def extra_repr(self) -> str:
        """The size of the embedding, the tasks and their widths."""
        tasks = ", ".join(f"{name}: {width}" for name, width in self.layout.describe())
        hidden = ""
        if self.hidden_channels:
            hidden = f", hidden_channels={list(self.hidden_channels)}, act={self.act!r}, dropout={self.dropout}"
        return f"{self.in_channels}, tasks={{{tasks}}}{hidden}, bias={self.bias is not None}"

    # ---- Computing them.

    def forward(self, x: Tensor, task: str | int | Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Computes all heads, one head, or each row's own head.

        Args:
            x: Shared embedding ``[N, D]``.
            task: None: all heads. A name or an index: this head alone. An int64 tensor ``[N]``: row ``i`` through the
                head ``task[i]`` only.

        Returns:
            All heads: ``dict`` of name to ``[N, C_t]``, views of one packed buffer. One head: ``[N, C_t]``. Rows
            routed: ``[N, max C_t]``; the columns that a row's head does not have are zero.

        Raises:
            TypeError: ``x`` is no floating-point tensor of the dtype of ``weight``, or ``task`` has the wrong type.
            ValueError: ``x`` is not ``[N, D]`` or on another device, there is no such task, or ``task`` is not ``[N]``.
            IndexError: A task index is not in ``[0, T)``.
        """
        weights, biases = freezing.effective(self)
        if task is None:
            if self.depth == 1:
                bias = biases[0] if biases else None
                outputs = multi_head_linear_split(x, weights[0], bias, self.layout.widths)
            else:
                outputs = multi_head_mlp_split(x, weights, biases, self.layout, self._hidden())
            return dict(zip(self.layout.names, outputs, strict=True))
        if isinstance(task, Tensor):
            return multi_head_mlp(x, weights, biases, self.layout, self._hidden(), task)
        return output_of(self, self.layout.name(task), x, weights, biases, self._hidden())

    def packed(self, x: Tensor) -> Tensor:
        """Computes all heads side by side.

        Args:
            x: Shared embedding ``[N, D]``.

        Returns:
            ``[N, K]``; ``slices`` maps a name to its columns.

        Raises:
            TypeError, ValueError: As in :meth:`forward`.
        """
        weights, biases = freezing.effective(self)
        if self.depth == 1:
            return multi_head_linear(x, weights[0], biases[0] if biases else None)
        return multi_head_mlp(x, weights, biases, self.layout, self._hidden())

    def _hidden(self) -> Hidden:
        """Activation and dropout of one call; in training, dropout draws one number from torch's CPU generator."""
        if self.depth == 1 or self.dropout == 0.0 or not self.training:
            return Hidden(self.act)
        seed = torch.randint(0, 2**62, (2,), dtype=torch.int64, device="cpu") * torch.tensor([1, 0], device="cpu")
        return Hidden(self.act, self.dropout, seed)

    def loss(self, x: Tensor, y: Labels, task: str | int | Tensor | None = None, gramian: bool = False) -> TaskLosses:
        r"""Computes all losses from the shared embedding in one pass.

        The logits ``[N, K]`` are never made, but for linear heads on a GPU of more than 128 columns or inputs, or of
        float64.

        A task's loss is the mean over its labelled entries (cross-entropy with class weights: the weighted mean, as
        ``torch.nn.functional.cross_entropy`` takes it), and 0 where there are none. Backward through ``.total`` finds
        its gradients ready; through ``.per_task``, with any weights, it computes them again with those.

        Args:
            x: Shared embedding ``[N, D]``.
            y: Labels. A matrix ``[N, T]`` with a column for each task, or a dict from task to ``[N]`` or ``[N, C_t]``
                (``[N]`` for ``cross_entropy``, ``[N, C_t / 2]`` for ``gaussian_nll``) or None (no labels). Missing is
                NaN in float labels, -100 in integer labels and float labels of ``bce``, ``ignore_index`` in classes.
                A task without a loss may be left out.
            task: None: every row has labels of every task. A name or an index: ``y`` holds the labels of this task, and
                the others' losses are 0. An int64 tensor ``[N]``: row ``i`` belongs to the task ``task[i]`` alone, and
                ``y`` is ``[N]`` or ``[N, max C_t]``.
            gramian: Whether to compute :math:`G_{ij} = \langle \partial L_i / \partial X, \partial L_j /
                \partial X \rangle`, not differentiable.

        Returns:
            :class:`~torch_mtl_pyg.TaskLosses`.

        Raises:
            TypeError: ``x`` is no floating-point tensor of the dtype of ``weight``, or labels have the wrong type.
            ValueError: A shape or device does not fit, no task has a loss, or a label is out of range
                (:class:`torch_mtl_pyg.labels.LabelError`, also an IndexError, which names task, value and row).
            IndexError: A task index is not in ``[0, T)``.
            RuntimeError: A task has more classes than the compiled kernels can tell apart, 2^24 + 1 of float32.
        """
        if gramian is not True and gramian is not False:
            raise TypeError(f"gramian: expected a bool, got {type(gramian).__name__}.")
        if not self.layout.has_loss:
            raise ValueError("loss: expected at least one task with a loss, got none; give it one: Task(7, loss=...).")
        weights, biases = freezing.effective(self)
        if isinstance(task, Tensor):
            return losses_of_routed(self, task, x, y, weights, biases, self._hidden(), gramian)
        if task is not None:
            return losses_of_one(self, task, x, y, weights, biases, self._hidden(), gramian)
        return losses_of_all(self, x, y, weights, biases, self._hidden(), gramian)

    # ---- Exchanging heads with single modules.

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module] | nn.ModuleList) -> MultiTaskHeads:
        """Packs linear layers, or MLPs of one form; weights are copied, bit for bit.

        Args:
            modules: ``dict``, ``ModuleDict`` or ``ModuleList`` of ``torch.nn.Linear`` or PyG ``Linear``; or of
                ``torch.nn.Sequential`` of these with an activation, and perhaps ``Dropout``, between two of them. A
                list's heads are named ``"0"``, ``"1"``, ...

        Raises:
            TypeError: A module is none of these (a subclass may compute something else), or their dtypes differ.
            ValueError: There is none; sizes but for the last, activations, dropouts or devices differ; some have a bias
                and some have none; one has hooks, or only one of weight and bias is trainable.
        """
        layers, act, dropout = layers_of_modules(modules)
        first = next(iter(layers[0].values()))
        with torch.device("meta"):  # draws no random numbers
            heads = cls(
                first.weight.shape[1],
                {name: linear.weight.shape[0] for name, linear in layers[-1].items()},
                hidden_channels=[next(iter(layer.values())).weight.shape[0] for layer in layers[:-1]] or None,
                act=act,
                dropout=dropout,
                bias=first.bias is not None,
            )
        for i, layer in enumerate(layers):
            weight, bias = heads.layer_names(i)
            setattr(heads, weight, nn.Parameter(torch.cat([linear.weight.detach() for linear in layer.values()])))
            if first.bias is not None:
                setattr(heads, bias, nn.Parameter(torch.cat([linear.bias.detach() for linear in layer.values()])))
        heads.train(first.training)
        still = [name for name, linear in layers[0].items() if not linear.weight.requires_grad]
        if still:
            heads.freeze(*still)
        return heads

    def to_modules(self) -> dict[str, nn.Module]:
        """The heads by name, as one ``torch.nn.Linear`` or ``Sequential`` each; weights are copied, bit for bit."""
        return {name: module_of(self, name) for name in self.layout.names}

    # ---- Editing heads.

    def add_task(self, name: str, task: Task | int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds a freshly drawn head behind the others, whose values stay bit for bit.

        ``weight`` and ``bias`` become new parameters, as their shapes change. An optimizer that holds the old ones must
        be told: give it here, and it goes on with the new ones, its state (momenta, ...) kept for the heads that stay.
        The new head's state is that of a fresh parameter, at the step count of the others.

        Args:
            name: A name not in use.
            task: A :class:`~torch_mtl_pyg.Task` or a width.
            optimizer: The optimizer that trains these heads, or None.

        Raises:
            TypeError: ``name`` is no string, ``task`` is neither Task nor int, or ``optimizer`` is no optimizer.
            ValueError: The name is in use or empty, the width is below 1, a weight or bias is computed from other
                parameters, or the optimizer does not hold the parameters of the heads, or keeps state that does not lie
                row by row (LBFGS, Adafactor).
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string, got {type(name).__name__}.")
        task = as_task(name, task, argument="task")
        if name in self.tasks:
            raise ValueError(f"name: expected one not in use, got {name!r}, which is a task already.")
        repacking.repack(self, TaskLayout({**self.tasks, name: task}), optimizer)

    def remove_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Removes a head; the others' values stay bit for bit. For ``optimizer`` see :meth:`add_task`.

        Raises:
            TypeError, IndexError, ValueError: There is no such task, it is the last one, a weight or bias is computed
                from other parameters, or ``optimizer`` does not fit.
        """
        name = self.layout.name(name, "name")
        if len(self.tasks) == 1:
            raise ValueError(f"name: expected a task that is not the last one, got {name!r}.")
        kept = {other: task for other, task in self.tasks.items() if other != name}
        repacking.repack(self, TaskLayout(kept), optimizer)

    def freeze(self, *names: str) -> None:
        """Keeps heads as they are: their gradients are zero, and no ``torch.optim`` step changes them.

        Weight decay and momentum would move a parameter without a gradient; the frozen rows are set back after each
        step to what they were before it. The shared embedding still gets their gradients.

        Raises:
            TypeError, IndexError, ValueError: No name was given, there is no such task, or a weight or bias is computed
                from other parameters; the forward pass raises it where that happens later.
        """
        freezing.set_frozen(self, self._frozen | self._named(names))

    def unfreeze(self, *names: str) -> None:
        """Trains heads again. The heads that were not frozen may be named too.

        Raises:
            TypeError, IndexError, ValueError: No name was given, or there is no such task.
        """
        freezing.set_frozen(self, self._frozen - self._named(names))

    def _named(self, names: tuple[str, ...]) -> frozenset[str]:
        if not names:
            raise ValueError(f"names: expected at least one of {', '.join(map(repr, self.layout.names))}, got none.")
        return frozenset(self.layout.name(name, "names") for name in names)

    # ---- Saving and loading: the names travel with the weights, so that heads cannot be taken for each other.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        describe_tasks(destination, prefix, self.layout)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = wrong_tasks(local_metadata, prefix, self.layout)
        if wrong:
            error_msgs.append(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        freezing.remake_mask(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        freezing.watch(self)
        backend.resolve()
