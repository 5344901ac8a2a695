"""Cells that are views of one trajectory, and the one run that measures all of them.

A restraint on the total with apply_at=evaluation changes the measured model and not the edits. A
run measures the view of its unrestrained trajectory and a view of each such restraint. Cells that
differ only in these restraints therefore share a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.config.build import Place
from editkit.records.views import UNRESTRAINED


@dataclass(frozen=True, kw_only=True)
class ValidCell:
    """A cell that can be run."""

    number: int
    overrides: tuple[str, ...]
    place: Place

    @property
    def view_nodes(self) -> dict[str, Any]:
        """The configurations of the restraints that are views, by name."""
        return {name: self.place.config["restraint"][name] for name in self.place.totals}

    @property
    def views(self) -> tuple[str, ...]:
        """The views that a run of this cell alone measures for it."""
        return self.place.totals or (UNRESTRAINED,)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One run for several cells."""

    overrides: tuple[str, ...]
    views: Mapping[int, tuple[str, ...]]  # the views that belong to a cell, by the cell's number


def trajectories(cells: Iterable[ValidCell]) -> list[list[ValidCell]]:
    """The cells grouped by trajectory."""
    groups: dict[str, list[ValidCell]] = {}
    for cell in cells:
        groups.setdefault(_trajectory(cell), []).append(cell)
    return list(groups.values())


def _trajectory(cell: ValidCell) -> str:
    """The configuration of a cell without its views. The order of the restraints that act on the
    edits matters.
    """
    config = dict(cell.place.config)
    acting = [
        (name, node)
        for name, node in config.pop("restraint").items()
        if name not in cell.place.totals
    ]
    return json.dumps(
        [{**config, "name": cell.place.settings.name}, acting], sort_keys=True, default=str
    )


def merge(cells: Sequence[ValidCell]) -> Merged:
    """The run that measures the views of all these cells. It does not depend on their order."""
    first = min(
        cells,
        key=lambda cell: (
            -len(cell.view_nodes),
            json.dumps(cell.view_nodes, sort_keys=True),
            cell.overrides,
        ),
    )
    nodes = dict(first.view_nodes)
    views: dict[int, tuple[str, ...]] = {}
    for cell in sorted(cells, key=lambda cell: json.dumps(cell.view_nodes, sort_keys=True)):
        names = []
        for name, node in cell.view_nodes.items():
            same = next((known for known, other in nodes.items() if other == node), None)
            if same is None:
                same = name if name not in nodes else _distinct_name(name, node, nodes)
                nodes[same] = node
            names.append(same)
        views[cell.number] = tuple(names) or (UNRESTRAINED,)
    added = (
        f"+restraint.{name}={literal(node)}"
        for name, node in sorted(nodes.items())
        if name not in first.view_nodes
    )
    return Merged(overrides=(*first.overrides, *added), views=views)


def _distinct_name(
    name: str, node: Mapping[str, Any], taken: Mapping[str, Mapping[str, Any]]
) -> str:
    """A name for a second restraint of a kind, made of the values that differ from the first:
    prune-alpha1_5.
    """
    differing = [f"{key}{value}" for key, value in node.items() if taken[name].get(key) != value]
    wanted = re.sub(r"[^\w-]+", "_", "-".join([name, *differing]))
    candidates = (wanted, *(f"{wanted}-{count}" for count in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def literal(value: Any) -> str:
    """A plain value in the syntax of Hydra's command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(literal(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    # Backslashes are escaped only before a quote.
    quoted = re.sub(r'(\\*)"', r'\1\1\\"', str(value))
    return '"' + re.sub(r"(\\+)$", r"\1\1", quoted) + '"'
