"""Warnings of the package's own loggers are shown by the run's tracker, each sentence once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editkit.records.tracker import AbstractTracker

WATCHED = "editkit.targets"  # not all of `editkit`: a tracker may log its own warnings


class _Shown(logging.Handler):
    def __init__(self, tracker: AbstractTracker) -> None:
        super().__init__(logging.WARNING)
        self._tracker = tracker
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._shown:  # every edit would repeat it
            self._shown.add(text)
            self._tracker.warning(text)


@contextlib.contextmanager
def warnings_shown(tracker: AbstractTracker) -> Iterator[None]:
    """Within, warnings go to the tracker alone."""
    logger, handler = logging.getLogger(WATCHED), _Shown(tracker)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
