"""What the views of a run are called: the model as the edits left it, and each restraint on the
total.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNRESTRAINED = "unrestrained"


def trajectory_view(applied_at: Mapping[str, str | None]) -> str:
    """What the model itself is called: a total that is restrained in the loop leaves nothing
    unrestrained to look at.

    Args:
        applied_at: when each restraint on the total acts (`apply_at`), by its name.
    """
    return "+".join(name for name, when in applied_at.items() if when == "every") or UNRESTRAINED


def trajectory_view_of(config: Mapping[str, Any]) -> str:
    """The same from a resolved configuration, also where nothing was measured."""
    nodes: Mapping[str, Any] = config.get("restraint") or {}
    return trajectory_view({name: (node or {}).get("apply_at") for name, node in nodes.items()})
