"""Datasets and suites that several configurations share: each is read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from editkit.errors import ConfigError

T = TypeVar("T")


class Loads:
    """What was read so far, by the configuration that it was read from. A configuration whose data
    could not be read raises its error again.
    """

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def get(self, key: Any, load: Callable[[], T]) -> T:
        """The result of `load` for this key, which is plain values. `load` is called once a key.

        Raises:
            ConfigError: `load` raised it, now or before.
        """
        text = json.dumps(key, sort_keys=True, default=str)
        if text not in self._results:
            try:
                self._results[text] = load()
            except ConfigError as error:
                self._results[text] = error
        result: Any = self._results[text]
        if isinstance(result, ConfigError):
            raise result
        loaded: T = result
        return loaded
