"""The composition of the cells of a grid. Cells that differ only in values at the root, such as the
seed, share one composition.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editkit.config.compose import Composed, groups, with_hydra, without_hydra
from editkit.config.explain import explaining


class Composer:
    """Composes configurations, and keeps them for others that differ in values at the root only.

    Args:
        config_dir: the user's own folder of options.
    """

    def __init__(self, config_dir: Path | None) -> None:
        self._config_dir = config_dir
        self._groups = groups(config_dir)
        self._kept: dict[tuple[str, ...], Any] = {}  # by the overrides without values at the root

    def compose(self, overrides: Sequence[str]) -> Composed:
        """The configuration of these overrides, as `config.explain.composed` gives it.

        Raises:
            ConfigError: the overrides cannot be composed.
        """
        with explaining(overrides, self._config_dir):
            return self._compose(overrides)

    def _compose(self, overrides: Sequence[str]) -> Composed:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from omegaconf import OmegaConf

        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [override for override in parsed if self._is_root_value(override)]
        shared = tuple(
            text
            for text, override in zip(overrides, parsed, strict=True)
            if not self._is_root_value(override)
        )
        if shared not in self._kept:
            self._kept[shared] = with_hydra(shared, config_dir=self._config_dir)
        config = copy.deepcopy(self._kept[shared])
        if any(override.key_or_group not in config for override in values):
            # raises Hydra's error about an unknown key
            return without_hydra(with_hydra(overrides, config_dir=self._config_dir))
        for override in values:  # as Hydra does it, after all files
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        return without_hydra(config)

    def _is_root_value(self, override: Any) -> bool:
        """Whether an override is `key=value` for a value at the root."""
        from hydra.core.override_parser.types import OverrideType

        return (
            override.type is OverrideType.CHANGE
            and override.package is None
            and not override.is_sweep_override()
            and not {".", "/"} & set(override.key_or_group)
            and override.key_or_group not in self._groups
        )
