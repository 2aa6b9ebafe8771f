"""The layers."""

from .conv import MultiTaskConv
from .convert import multi_task
from .encoders import MultiTaskEncoders
from .heads import MultiTaskHeads
from .model import MultiTaskModel

__all__ = ["MultiTaskConv", "MultiTaskEncoders", "MultiTaskHeads", "MultiTaskModel", "multi_task"]
