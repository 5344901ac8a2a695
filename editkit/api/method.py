"""From the arguments of `editkit.edit` to an editor, restraints and a source of second moments.

Names are options of the configuration groups, as on the command line. Objects are taken as they
are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.api.composing import composed_apart
from editkit.api.loading import bundled_models
from editkit.config.compose import options as conf_options
from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, message
from editkit.linalg.recursive import SolveDtype
from editkit.restraints.base import AbstractRestraint, Restraints, conflicts, unsupported
from editkit.stats.corpus import StatsConfig

# A name or an object, or several of them.
RestraintChoice = str | AbstractRestraint | Sequence[str | AbstractRestraint]
SOURCES = ("world", "hub")  # of second moments; other strings are paths


@dataclass(frozen=True, kw_only=True)
class Method:
    """An editor with its restraints."""

    editor: AbstractAnyEditor[Any]
    restraints: Restraints
    stats: StatsConfig | None  # None: no source of second moments
    solve_dtype: SolveDtype


def choose_method(
    model: str,
    *,
    editor: str | AbstractAnyEditor[Any],
    recipe: str | None,
    restraint: RestraintChoice | None,
    options: Mapping[str, object] | None,
    second_moments: str | Path | StatsConfig | None,
) -> Method:
    """The method for a model of this name. The arguments are those of `Session`.

    Raises:
        ConfigError: an argument is invalid; all problems of one kind are reported together.
    """
    names: dict[str, list[str]] = {}
    for option in conf_options():
        names.setdefault(option.group, []).append(option.name)
    restraints = _as_tuple(restraint)
    chosen = [item for item in restraints if isinstance(item, str)]
    objects = [item for item in restraints if not isinstance(item, str)]
    overrides = [f"model={model if model in names['model'] else 'hf'}"]
    overrides += _editor_overrides(editor, recipe, model, names)
    for name in chosen:
        _require("restraint", name, names["restraint"])
    if chosen := [name for name in chosen if name != "none"]:
        overrides.append(f"restraint=[{','.join(chosen)}]")
    source = _source(second_moments, model)
    if isinstance(source, str):
        overrides.append(f"stats={source if source in SOURCES else 'text'}")
    config = {"restraint": {}} | composed_apart(overrides).config
    _set_options(config, options or {}, editor)
    problems = Problems()
    if isinstance(editor, str):
        built = construct(config["editor"], "editor", AbstractAnyEditor, problems)
    else:
        built = editor
    named: dict[str, AbstractRestraint] = {}
    for name, node in config["restraint"].items():
        if (part := construct(node, f"restraint.{name}", AbstractRestraint, problems)) is not None:
            named[name] = part
    for part in objects:
        named[_free_name(type(part).__name__.lower(), named)] = part
    stats: StatsConfig | None = source if isinstance(source, StatsConfig) else None
    if isinstance(source, str):
        if source not in SOURCES:
            config["stats"]["path"] = source
        stats = construct(config["stats"], "stats", StatsConfig, problems)
    _finish(problems, editor, model, names)
    assert built is not None
    return Method(
        editor=built,
        restraints=_by_place(named, built),
        stats=stats,
        solve_dtype=config["solve"]["dtype"],
    )


def _as_tuple(restraint: RestraintChoice | None) -> tuple[str | AbstractRestraint, ...]:
    if restraint is None:
        return ()
    if isinstance(restraint, str | AbstractRestraint):
        return (restraint,)
    return tuple(restraint)


def _editor_overrides(
    editor: str | AbstractAnyEditor[Any],
    recipe: str | None,
    model: str,
    names: Mapping[str, list[str]],
) -> list[str]:
    """Chooses the editor and its recipe, or no recipe."""
    if not isinstance(editor, str):
        if recipe is not None:
            fix = "give the editor by its name, or leave recipe out"
            problem = "an editor that is an object has its numbers already"
            raise ConfigError(message("recipe", problem, got=recipe, fix=fix))
        return ["~recipe"]
    _require("editor", editor, names["editor"])
    full = f"{editor}/{model}" if recipe is None else recipe
    full = full if "/" in full else f"{editor}/{full}"
    is_known = full in names["recipe"]
    if recipe is not None and not is_known:
        expected = _one_of(_recipes_of(editor, names))
        raise ConfigError(message("recipe", "no such recipe", got=recipe, expected=expected))
    return [f"editor={editor}", f"recipe={full}" if is_known else "~recipe"]


def _recipes_of(editor: str, names: Mapping[str, list[str]]) -> list[str]:
    prefix = f"{editor}/"
    return [name.removeprefix(prefix) for name in names["recipe"] if name.startswith(prefix)]


def _require(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        problem = f"no such {key}"
        raise ConfigError(message(key, problem, got=name, expected=_one_of(known)))


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"


def _source(
    second_moments: str | Path | StatsConfig | None, model: str
) -> str | StatsConfig | None:
    """Where second moments come from: a StatsConfig, one of SOURCES or a path that exists."""
    if second_moments is None:
        return "world" if model in bundled_models() else None
    if isinstance(second_moments, StatsConfig) or second_moments in SOURCES:
        return second_moments if isinstance(second_moments, StatsConfig) else str(second_moments)
    path = Path(os.fspath(second_moments)).expanduser()
    if not path.exists():
        raise ConfigError(
            message(
                "second_moments",
                "no such file or folder",
                got=str(second_moments),
                expected="'world', 'hub', a text file or a folder of .txt files",
            )
        )
    return str(path)


def _set_options(
    config: dict[str, Any], options: Mapping[str, object], editor: str | AbstractAnyEditor[Any]
) -> None:
    """Writes dotted options into the composed configuration."""
    problems = []
    for key, value in options.items():
        parts = key.split(".")
        if parts[0] not in ("editor", "restraint"):
            parts = ["editor", *parts]
        if parts[0] == "editor" and not isinstance(editor, str):
            problem = "an editor that is an object has its options already"
            problems.append(message(key, problem, fix="set the option where the editor is made"))
            continue
        try:
            plain = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            expected = "a number, text, None, or a list or mapping of these"
            kind = type(value).__name__
            problems.append(message(key, "not a plain value", got=kind, expected=expected))
            continue
        node: Any = config
        for name in parts[:-1]:
            node = node.get(name) if isinstance(node, Mapping) else None
        if not isinstance(node, dict) or parts in (["editor"], ["restraint"]):
            chosen = ", ".join(config["restraint"]) or "none"
            fix = f"choose the restraint (chosen: {chosen})" if parts[0] == "restraint" else None
            problems.append(message(key, "no such option", fix=fix))
            continue
        node[parts[-1]] = plain
    if problems:
        raise ConfigError(problems)


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    if name not in taken:
        return name
    return next(free for k in range(2, len(taken) + 3) if (free := f"{name}_{k}") not in taken)


def _finish(
    problems: Problems,
    editor: str | AbstractAnyEditor[Any],
    model: str,
    names: Mapping[str, list[str]],
) -> None:
    missing = []
    unset = [key for key in problems.unset if key.startswith("editor.")]
    if unset and isinstance(editor, str):
        keys = ", ".join(key.removeprefix("editor.") for key in unset)
        missing.append(
            message(
                "recipe",
                f"no recipe of {editor} for {model}, which {keys} come from",
                expected=_one_of(_recipes_of(editor, names)),
                fix="pass recipe=<name of another model>, or options={...} with these keys",
            )
        )
    missing += [message(key, "not set") for key in problems.unset if key not in unset]
    if missing or problems.messages:
        raise ConfigError([*missing, *problems.messages])


def _by_place(
    restraints: Mapping[str, AbstractRestraint], editor: AbstractAnyEditor[Any]
) -> Restraints:
    """Sorts the restraints by the place that they act at.

    Raises:
        ConfigError: the editor has no such place, or two restraints need the same single place.
    """
    chosen = Restraints.by_place(restraints)
    problems = unsupported(restraints, editor.places, editor=type(editor).__name__)
    problems += conflicts(restraints)
    for name, total in chosen.totals.items():
        if total.apply_at == "end":
            key = f"restraint.{name}.apply_at"
            problem = "a session has no last edit"
            expected = "'evaluation' or 'every'"
            problems.append(message(key, problem, got=total.apply_at, expected=expected))
    if problems:
        raise ConfigError(problems)
    return chosen
