"""The names of a run's views: the model as the edits left it, and each restraint on the total."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNRESTRAINED = "unrestrained"


def trajectory_view(applied_at: Mapping[str, str | None]) -> str:
    """The name of the model's own view. A restraint that acts in the loop leaves no unrestrained
    model.

    Args:
        applied_at: `apply_at` of each restraint on the total, by its name.
    """
    return "+".join(name for name, when in applied_at.items() if when == "every") or UNRESTRAINED


def trajectory_view_of(config: Mapping[str, Any]) -> str:
    """The same from a resolved configuration, also before anything was measured."""
    nodes: Mapping[str, Any] = config.get("restraint") or {}
    return trajectory_view({name: (node or {}).get("apply_at") for name, node in nodes.items()})
