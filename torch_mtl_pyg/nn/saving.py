"""Names and widths of packed parameters in the metadata of a ``state_dict``."""

from __future__ import annotations

from typing import Any

from ..task import TaskLayout


def describe_tasks(destination: Any, prefix: str, layout: TaskLayout) -> None:
    """Writes names and widths, in packing order, beside a module's version."""
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None and prefix[:-1] in metadata:
        metadata[prefix[:-1]]["tasks"] = layout.describe()


def wrong_tasks(local_metadata: Any, prefix: str, layout: TaskLayout) -> str | None:
    """What to say where the metadata names other tasks, or in another order; None where it fits, or says nothing."""
    saved = local_metadata.get("tasks")
    mine = layout.describe()
    if saved is None or [tuple(entry) for entry in saved] == mine:
        return None
    return f"{prefix}tasks: expected {mine} (name, width), got {saved}."
