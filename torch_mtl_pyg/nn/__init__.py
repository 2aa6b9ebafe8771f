"""The layers."""

from .heads import MultiTaskHeads

__all__ = ["MultiTaskHeads"]
