"""Which restraint works with which editor, from their classes: an editor declares the places at
which it can be restrained, and the kind of a restraint is the place at which it acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.compose import conf_folder
from editkit.config.identity import TARGET
from editkit.config.schema import Problems, resolve
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError
from editkit.restraints.base import (
    PLACES,
    AbstractObjectiveRestraint,
    AbstractRestraint,
    AbstractSolveRestraint,
    AbstractTotalRestraint,
    AbstractUpdateRestraint,
    Place,
)

_KINDS: dict[Place, type[AbstractRestraint]] = {
    "objective": AbstractObjectiveRestraint,
    "solve": AbstractSolveRestraint,
    "update": AbstractUpdateRestraint,
    "total": AbstractTotalRestraint,
}


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The restraints that an editor takes, by place. Objective and solve have room for one."""

    editor: str
    restraints: Mapping[Place, tuple[str, ...]]


def pairs(config_dir: Path | None = None) -> tuple[Pairs, ...]:
    """A row for each editor, by name, except for those that are composed with a restraint of their
    own (editor=d4s). `config_dir` adds the user's own folder.

    Raises:
        ConfigError: a class cannot be imported.
    """
    import yaml

    def nodes(group: str) -> dict[str, dict[str, Any]]:
        folders = (conf_folder(), *((config_dir,) if config_dir else ()))
        paths = sorted(path for folder in folders for path in (folder / group).glob("*.yaml"))
        return {path.stem: yaml.safe_load(path.read_text()) or {} for path in paths}

    problems = Problems()
    by_place: dict[Place, list[str]] = {place: [] for place in PLACES}
    for node in nodes("restraint").values():
        for name, options in node.items():
            if isinstance(options, Mapping) and TARGET in options:
                kind = resolve(options[TARGET], f"restraint.{name}", AbstractRestraint, problems)
                for place, base in _KINDS.items():
                    if kind is not None and issubclass(kind, base):
                        by_place[place].append(name)
    rows = []
    editors = nodes("editor")
    for name in editors:
        if (target := _target(name, editors)) is None:
            continue
        editor: type[AbstractAnyEditor[Any]] | None = resolve(
            target, f"editor.{name}", AbstractAnyEditor, problems
        )
        if editor is not None:
            rows.append(
                Pairs(
                    editor=name,
                    restraints={
                        place: tuple(names) if place in editor.places else ()
                        for place, names in by_place.items()
                    },
                )
            )
    if problems.messages:
        raise ConfigError(problems.messages)
    return tuple(sorted(rows, key=lambda row: row.editor))


def _target(name: str, editors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The class of an editor, which may be that of the editor it is based on; None if a restraint
    belongs to it.
    """
    node = editors.get(name, {})
    defaults = node.get("defaults", [])
    if any(str(entry).startswith("/restraint/") for entry in defaults):
        return None
    if TARGET in node:
        return str(node[TARGET])
    found = (_target(str(entry), editors) for entry in defaults if entry != "_self_")
    return next((target for target in found if target is not None), None)
