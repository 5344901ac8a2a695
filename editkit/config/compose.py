"""The configuration files: their folder, options and composition."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from editkit.errors import ConfigError, message

ROOT = "config"  # conf/config.yaml
# Groups that nobody chooses from: Hydra's own settings, and the overlays that scale=... selects.
HIDDEN = ("hydra", "scaled")


def conf_folder() -> Path:
    """The folder of the configuration files: next to the package in a checkout, inside the package
    in an installed wheel.

    Raises:
        ConfigError: there is no such folder.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "conf", package.parent / "conf")
    for folder in candidates:
        if (folder / f"{ROOT}.yaml").is_file():
            return folder
    raise ConfigError(
        message(
            f"{ROOT}.yaml",
            "the configuration files are missing",
            expected=f"the file in {candidates[0]} or {candidates[1]}",
            fix="reinstall editkit",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One choice of a configuration group."""

    group: str
    name: str
    about: str  # the first comment line of the file
    is_default: bool


def options(config_dir: Path | None = None) -> Iterator[Option]:
    """Every option of every group, sorted by name. `config_dir` adds the user's own folder."""
    import yaml

    defaults = yaml.safe_load((conf_folder() / f"{ROOT}.yaml").read_text())["defaults"]
    default_options = {
        group: name
        for entry in defaults
        if isinstance(entry, dict)
        for group, name in entry.items()
    }
    files: dict[tuple[str, str], Path] = {}
    for folder in (conf_folder(), *((config_dir,) if config_dir else ())):
        for path in folder.glob("*/**/*.yaml"):
            group, *rest = path.relative_to(folder).with_suffix("").parts
            if group not in HIDDEN:
                files.setdefault((group, "/".join(rest)), path)
    for (group, name), path in sorted(files.items()):
        yield Option(
            group=group,
            name=name,
            about=first_comment(path),
            is_default=default_options.get(group) == name,
        )


def first_comment(path: Path) -> str:
    """The first comment line of a file, without Hydra's `# @package`. Empty if there is none."""
    comments = (
        line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")
    )
    return next(
        (comment for comment in comments if comment and not comment.startswith("@package")), ""
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A composed configuration: plain values with interpolations resolved. Mandatory values that
    were not set are `???`.
    """

    config: dict[str, Any]
    choices: Mapping[str, Any]  # the chosen option by group


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Composed:
    """The configuration that `editkit run` would compose from these overrides.

    Raises:
        HydraException, OmegaConfBaseException: the overrides cannot be composed.
    """
    return without_hydra(with_hydra(overrides, config_dir=config_dir))


def groups(config_dir: Path | None = None) -> set[str]:
    """The names of the configuration groups. `config_dir` adds the user's own folder."""
    folders = (conf_folder(), *((config_dir,) if config_dir else ()))
    return {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}


STACK = re.compile(r"tracker=\[(.*)\]")
LAST = ("console", "none")  # trackers that stand beside no other one


def stacked_trackers(overrides: Sequence[str]) -> list[str]:
    """The overrides with `tracker=[a,b]` as `tracker=a tracker@tracker.beside=b`: each tracker
    forwards to the next. The console comes last, wherever it is named.

    Raises:
        ConfigError: a tracker is named twice, or there are two that must come last.
    """
    expanded: list[str] = []
    for override in overrides:
        stack = STACK.fullmatch(override)
        if stack is None:
            expanded.append(override)
            continue
        names = [name.strip(" '\"") for name in stack[1].split(",") if name.strip()]
        names.sort(key=lambda name: name in LAST)
        if not names or len(set(names)) < len(names) or len(set(names) & set(LAST)) > 1:
            expected = f"different trackers, at most one of {' and '.join(LAST)}"
            problem = "these trackers cannot be combined"
            raise ConfigError(message("tracker", problem, got=override[8:], expected=expected))
        expanded.append(f"tracker={names[0]}")
        expanded += [
            f"tracker@tracker{'.beside' * depth}={name}"
            for depth, name in enumerate(names)
            if depth
        ]
    return expanded


def with_hydra(overrides: Sequence[str], *, config_dir: Path | None = None) -> Any:
    """The composed configuration as OmegaConf, with Hydra's own node.

    Raises:
        HydraException, OmegaConfBaseException: the overrides cannot be composed.
    """
    import hydra

    own = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="editkit"):
        return hydra.compose(
            ROOT, overrides=[*stacked_trackers(overrides), *own], return_hydra_config=True
        )


def without_hydra(config: Any) -> Composed:
    """The result of `with_hydra` as plain values; the argument loses Hydra's node."""
    from omegaconf import open_dict

    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return Composed(config=plain(config), choices=choices)


def explain_composition_error(error: Exception, overrides: Sequence[str]) -> str | None:
    """A message for errors of Hydra that do not say what to change. None for all other errors."""
    if twice := re.search(r"restraint_recipe/(\w+)@\S* appears more than once", str(error)):
        restraint = twice[1]
        return message(
            "restraint",
            f"{restraint} is chosen twice",
            fix=f"name it once (editor={restraint}, if it exists, includes it)",
        )
    added = [
        override
        for override in overrides
        if override.startswith("+") and "." not in override.partition("=")[0]
    ]
    if "Error resolving interpolation '${" in str(error) and added:
        return message(
            ", ".join(added),
            "the group already has a choice",
            fix="remove the +; several restraints are restraint=[a,b]",
        )
    return None


def plain(config: Any) -> dict[str, Any]:
    """A copy of a configuration as plain values.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(config):
        return copy.deepcopy(dict(config))
    try:
        return cast(
            dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from None


def force_add(overrides: Sequence[str]) -> list[str]:
    """The overrides with `key=value` written as `++key=value`, which also adds unknown keys. A
    sweep is replaced by its first value.

    Hydra stops at the first unknown key. Composing these overrides gets past it, so that `build`
    can report every unknown key together with the known ones.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    known_groups = groups()
    forced = []
    for text, override in zip(
        overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True
    ):
        if override.is_sweep_override():
            if not override.is_choice_sweep():
                continue
            text = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        is_value = (
            override.type is OverrideType.CHANGE
            and override.key_or_group.split("/")[0] not in known_groups
        )
        forced.append(f"++{text}" if is_value else text)
    return forced
