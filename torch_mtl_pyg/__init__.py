"""Multi-task learning for PyTorch Geometric: heads and losses of all tasks from the shared embedding in one launch."""

from ._version import __version__
from .backend import backend_info, use_backend
from .balancing.cosine import task_cosine
from .loader import MultiTaskLoader
from .nn import MultiTaskConv, MultiTaskEncoders, MultiTaskHeads, MultiTaskModel, multi_task
from .task import Task, TaskLosses

__all__ = [
    "MultiTaskConv",
    "MultiTaskEncoders",
    "MultiTaskHeads",
    "MultiTaskLoader",
    "MultiTaskModel",
    "Task",
    "TaskLosses",
    "__version__",
    "backend_info",
    "multi_task",
    "task_cosine",
    "use_backend",
]
