"""The layers."""

from .conv import MultiTaskConv
from .heads import MultiTaskHeads

__all__ = ["MultiTaskConv", "MultiTaskHeads"]
