"""The grid of a sweep: the overrides of each cell, before anything is planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.config.compose import with_hydra
from editkit.config.explain import explaining

# Groups and keys that decide whether a command is a sweep, and of which grid
SWEEP_KEYS = ("experiment", "sweep", "scale", "setting", "debug", "local", "hydra")


def cells_of_grid(
    params: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    listed: Sequence[Sequence[str]] = (),
    config_loader: Any = None,
) -> list[list[str]]:
    """The overrides of every cell: the grid, in each of the listed cells if there are any. The
    command line overrides a grid by name.

    Args:
        params: `hydra.sweeper.params`.
        arguments: the overrides of the command line.
        listed: `hydra.sweeper.cells`.
        config_loader: Hydra's, which `glob` needs.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=config_loader)
    overrides = parser.parse_overrides(
        [*(f"{key}={value}" for key, value in params.items()), *arguments]
    )
    (cells,) = BasicSweeper.split_arguments(overrides, None)
    return [[*cell, *values] for values in listed or [[]] for cell in cells]


def cells_of_command(
    overrides: Sequence[str], config_dir: Path | None = None
) -> list[list[str]] | None:
    """The overrides of every cell that `editkit run` would run with these overrides. None if they
    describe a single run.

    Raises:
        ConfigError: the overrides cannot be composed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    with explaining(overrides, config_dir):
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        deciding = [
            text
            for text, override in zip(overrides, parsed, strict=True)
            if override.key_or_group.partition(".")[0].partition("/")[0] in SWEEP_KEYS
            and not override.is_sweep_override()
        ]
        hydra = with_hydra(deciding, config_dir=config_dir).hydra
        is_sweep = any(override.is_sweep_override() for override in parsed)
        if hydra.mode is not RunMode.MULTIRUN and not is_sweep:
            return None
        sweeper = hydra.sweeper
        return cells_of_grid(
            sweeper.get("params") or {}, overrides, listed=sweeper.get("cells") or ()
        )


def varying_keys(cells: Iterable[Sequence[str]]) -> set[str]:
    """The keys whose values are not the same in every cell."""
    overrides_by_key: dict[str, set[str]] = {}
    for overrides in cells:
        for override in overrides:
            overrides_by_key.setdefault(override.partition("=")[0], set()).add(override)
    return {key for key, values in overrides_by_key.items() if len(values) > 1}


def varying_values(overrides: Sequence[str], varying: set[str]) -> str:
    """The values of a cell for these keys."""
    return " ".join(text for text in overrides if text.partition("=")[0] in varying)
