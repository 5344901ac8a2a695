"""Which cells are views of one trajectory, and the one run that measures all of them.

A restraint on the total that acts at evaluation changes what is measured, not the edits: a run
measures its trajectory's own view and each restrained one. Cells that differ in such restraints
alone therefore share a run.
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
class Candidate:
    """A cell that can be run."""

    number: int
    overrides: tuple[str, ...]
    place: Place

    @property
    def nodes(self) -> dict[str, Any]:
        """The restraints that are views, by name, as plain values."""
        return {name: self.place.config["restraint"][name] for name in self.place.totals}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One run for several cells."""

    overrides: tuple[str, ...]
    views: Mapping[int, tuple[str, ...]]  # what of the run is a cell's, by the cell's number


def trajectories(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """The cells, those of one trajectory together."""
    groups: dict[str, list[Candidate]] = {}
    for each in candidates:
        groups.setdefault(_trajectory(each), []).append(each)
    return list(groups.values())


def _trajectory(cell: Candidate) -> str:
    """Everything about a cell but its views; the order of the restraints that act on the edits
    counts.
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


def merge(cells: Sequence[Candidate]) -> Merged:
    """The run that measures the views of all these cells; the same for the same cells in any
    order.
    """
    first = min(
        cells,
        key=lambda cell: (-len(cell.nodes), json.dumps(cell.nodes, sort_keys=True), cell.overrides),
    )
    nodes = dict(first.nodes)
    names: dict[int, tuple[str, ...]] = {}
    for cell in sorted(cells, key=lambda each: json.dumps(each.nodes, sort_keys=True)):
        found = []
        for name, node in cell.nodes.items():
            same = next((known for known, other in nodes.items() if other == node), None)
            if same is None:
                same = name if name not in nodes else _telling_name(name, node, nodes)
                nodes[same] = node
            found.append(same)
        names[cell.number] = tuple(found) or (UNRESTRAINED,)
    added = (
        f"+restraint.{name}={literal(node)}"
        for name, node in sorted(nodes.items())
        if name not in first.nodes
    )
    return Merged(overrides=(*first.overrides, *added), views=names)


def _telling_name(
    name: str, node: Mapping[str, Any], taken: Mapping[str, Mapping[str, Any]]
) -> str:
    """A name for a second restraint of a kind: the values in which it differs from the first
    (prune-alpha1_5).
    """
    differing = [f"{key}{value}" for key, value in node.items() if taken[name].get(key) != value]
    wanted = re.sub(r"[^\w-]+", "_", "-".join([name, *differing]))
    return next(
        each
        for each in (wanted, *(f"{wanted}-{count}" for count in range(2, len(taken) + 3)))
        if each not in taken
    )


def literal(value: Any) -> str:
    """A plain value as Hydra's command line has it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(literal(each) for each in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    quoted = re.sub(
        r'(\\*)"', r'\1\1\\"', str(value)
    )  # only a quote, and the backslashes before it, need one
    return '"' + re.sub(r"(\\+)$", r"\1\1", quoted) + '"'
