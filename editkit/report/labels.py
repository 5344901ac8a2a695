"""The labels of a run in tables and dashboards: short names from its resolved configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editkit.model.architecture import label_of

Labels = dict[str, str]
NONE = "none"


def labels(config: Mapping[str, Any]) -> Labels:
    """Model, editor, restraint, dataset and suite; `?` for what the configuration lacks."""
    restraints = [
        restraint_label(name, node) for name, node in (config.get("restraint") or {}).items()
    ]
    return {
        "model": model_label(config),
        "editor": _editor(config.get("editor")),
        "restraint": "+".join(restraints) or NONE,
        "dataset": _name(config.get("dataset")),
        "suite": _suite(config.get("suite")),
    }


def model_label(config: Mapping[str, Any]) -> str:
    """The model's own name, or the last part of its id."""
    node = config.get("model") or {}
    return label_of(node.get("name"), str(node.get("id", "?"))) or "?"


def restraint_label(name: str, node: Any) -> str:
    """The restraint's name, with its `apply_at` if that is not `evaluation`."""
    apply_at = node.get("apply_at") if isinstance(node, Mapping) else None
    if apply_at == "every":
        return f"{name} every {node.get('every')}"
    return f"{name} at the {apply_at}" if apply_at == "end" else name


def _editor(node: Any) -> str:
    """The editor's name. A model that was edited elsewhere stands for its editor, which is not
    known.
    """
    if isinstance(node, Mapping) and (edited := node.get("edited")):
        return f"{label_of(None, str(edited))} (edited elsewhere)"
    return _name(node)


def _name(node: Any) -> str:
    if not isinstance(node, Mapping):
        return "?"
    return str(node.get("name") or str(node.get("_target_", "?")).rpartition(".")[2].lower())


def _suite(node: Any) -> str:
    return (
        NONE
        if isinstance(node, Mapping) and not node.get("tasks", True)
        else _name(node).removesuffix("tasks") or "?"
    )
