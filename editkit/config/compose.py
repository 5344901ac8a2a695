"""The configuration files: where they are, which options they offer, and composing them outside of
`editkit run`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError

ROOT = "config"  # conf/config.yaml
HIDDEN = (
    "hydra",
    "scaled",
)  # how Hydra is told to behave, and what scale=... finds by itself: nothing to choose


def conf_folder() -> Path:
    """The configuration's folder: beside the package in a checkout, inside it when it was installed
    from a wheel.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{ROOT}.yaml").is_file():
            return folder
    raise ConfigError(
        f"the configuration is missing: neither {package / 'conf'} nor {package.parent / 'conf'} holds {ROOT}.yaml. Install again."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One choice of a group."""

    group: str
    name: str
    about: str  # the file's first comment line
    is_default: bool


def options(config_dir: Path | None = None) -> Iterator[Option]:
    """Every option of every group, in the order of their names; `config_dir` adds a person's own
    folder.
    """
    import yaml

    defaults = yaml.safe_load((conf_folder() / f"{ROOT}.yaml").read_text())["defaults"]
    chosen = {
        group: name
        for entry in defaults
        if isinstance(entry, dict)
        for group, name in entry.items()
    }
    found: dict[tuple[str, str], Path] = {}
    for folder in (conf_folder(), *((config_dir,) if config_dir else ())):
        for path in folder.glob("*/**/*.yaml"):
            group, *rest = path.relative_to(folder).with_suffix("").parts
            if group not in HIDDEN:
                found.setdefault((group, "/".join(rest)), path)
    for (group, name), path in sorted(found.items()):
        yield Option(
            group=group, name=name, about=first_comment(path), is_default=chosen.get(group) == name
        )


def first_comment(path: Path) -> str:
    """The first comment line of a file that is not Hydra's `# @package`; empty if there is none."""
    comments = (
        line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")
    )
    return next(
        (comment for comment in comments if comment and not comment.startswith("@package")), ""
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A configuration as Hydra composed it: plain values, interpolations resolved, what nobody set
    still `???`.
    """

    config: dict[str, Any]
    choices: Mapping[str, Any]  # option by group


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Composed:
    """What `editkit run` would compose from these overrides. Raises Hydra's own exceptions."""
    import hydra
    from omegaconf import open_dict

    own = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir else []
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="editkit"):
        config = hydra.compose(ROOT, overrides=[*overrides, *own], return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return Composed(config=plain(config), choices=choices)


def in_our_words(error: Exception, overrides: Sequence[str]) -> str | None:
    """What kept a configuration from being composed; None where Hydra's own words tell a user what
    to do.
    """
    if twice := re.search(r"restraint_recipe/(\w+)@\S* appears more than once", str(error)):
        return f"restraint: {twice[1]} is chosen twice - name it once; editor={twice[1]}, where there is one, has it in itself."
    added = [
        each for each in overrides if each.startswith("+") and "." not in each.partition("=")[0]
    ]
    if "Error resolving interpolation '${" in str(error) and added:
        return f"{', '.join(added)}: the group has a choice already - leave the + out; several restraints: restraint=[a,b]."
    return None


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, also if it is plain already. Raises ConfigError where an
    interpolation leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(config):
        return copy.deepcopy(dict(config))
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from None


def with_every_key_added(overrides: Sequence[str]) -> list[str]:
    """The overrides with every plain `key=value` as `++key=value`, which also adds keys that do not
    exist; of a sweep its first value.

    Composing these gets past the misspelt keys, so that `build` can name all of them with what
    there is instead.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    groups = {path.name for path in conf_folder().iterdir() if path.is_dir()}
    kept = []
    for text, override in zip(
        overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True
    ):
        if override.is_sweep_override():
            if not override.is_choice_sweep():
                continue
            text = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        is_value = (
            override.type is OverrideType.CHANGE
            and override.key_or_group.split("/")[0] not in groups
        )
        kept.append(f"++{text}" if is_value else text)
    return kept
