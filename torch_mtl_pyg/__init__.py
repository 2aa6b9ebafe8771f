"""Multi-task learning for PyTorch Geometric: heads and losses of all tasks from the shared embedding in one launch."""

from ._version import __version__
from .backend import backend_info, use_backend
from .nn import MultiTaskHeads
from .task import Task, TaskLosses

__all__ = ["MultiTaskHeads", "Task", "TaskLosses", "__version__", "backend_info", "use_backend"]
