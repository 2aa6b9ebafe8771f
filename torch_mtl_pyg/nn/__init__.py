"""The layers."""

from .conv import MultiTaskConv
from .encoders import MultiTaskEncoders
from .heads import MultiTaskHeads

__all__ = ["MultiTaskConv", "MultiTaskEncoders", "MultiTaskHeads"]
