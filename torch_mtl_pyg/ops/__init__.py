"""The ops: one file each, with the maths, the checks, and what PyTorch has to know about it."""

from . import _aggregate, _aggregate_linear, _dispatch
from . import group_edges as _group_edges
from . import grouped_linear as _grouped_linear
from . import multi_head_linear as _multi_head_linear
from . import multi_head_loss as _multi_head_loss
from . import multi_head_mlp as _multi_head_mlp
from . import multi_head_mlp_loss as _multi_head_mlp_loss
from .aggregate import aggregate
from .aggregate_linear import aggregate_linear
from .group_edges import group_edges
from .grouped_linear import grouped_linear
from .multi_head_linear import multi_head_linear, multi_head_linear_split
from .multi_head_loss import multi_head_loss
from .multi_head_mlp import multi_head_mlp, multi_head_mlp_split
from .multi_head_mlp_loss import multi_head_mlp_loss
from .reference_mlp import Hidden

__all__ = [
    "Hidden",
    "aggregate",
    "aggregate_linear",
    "group_edges",
    "grouped_linear",
    "multi_head_linear",
    "multi_head_linear_split",
    "multi_head_loss",
    "multi_head_mlp",
    "multi_head_mlp_loss",
    "multi_head_mlp_split",
    "register",
]


def register() -> None:
    """Tells PyTorch the shapes, derivatives and autocast rules of the compiled ops. Called once they are loaded."""
    _dispatch.register()
    _group_edges.register()
    _aggregate.register()
    _aggregate_linear.register()
    _grouped_linear.register()
    _multi_head_linear.register()
    _multi_head_loss.register()
    _multi_head_mlp.register()
    _multi_head_mlp_loss.register()
