"""The ops: one file each, with the maths, the checks, and what PyTorch has to know about it."""

from . import multi_head_linear as _multi_head_linear
from .multi_head_linear import multi_head_linear, multi_head_linear_split

__all__ = ["multi_head_linear", "multi_head_linear_split", "register"]


def register() -> None:
    """Tells PyTorch the shapes, derivatives and autocast rules of the compiled ops. Called once they are loaded."""
    _multi_head_linear.register()
