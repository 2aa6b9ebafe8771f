"""Balancing of tasks: TorchJD's weightings and scalarizers on what ``heads.loss`` returns."""

from .balancer import Balancer
from .cosine import task_cosine
from .resolve import method_names
from .step import balanced_step

__all__ = ["Balancer", "balanced_step", "method_names", "task_cosine"]
