"""The layers."""

from .conv import MultiTaskConv
from .encoders import MultiTaskEncoders
from .heads import MultiTaskHeads
from .model import MultiTaskModel

__all__ = ["MultiTaskConv", "MultiTaskEncoders", "MultiTaskHeads", "MultiTaskModel"]
