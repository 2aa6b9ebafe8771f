"""Multi-task learning for PyTorch Geometric: all task heads from the shared embedding in one launch."""

from ._version import __version__
from .backend import backend_info, use_backend
from .nn import MultiTaskHeads
from .task import Task

__all__ = ["MultiTaskHeads", "Task", "__version__", "backend_info", "use_backend"]
