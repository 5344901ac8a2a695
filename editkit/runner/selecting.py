"""Which requests of a dataset are edited, where only the loaded model can tell."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from editkit.datasets.base import LoadedDataset, units
from editkit.runner.signals import Stopped
from editkit.trackers.collecting import collecting
from editkit.types import EditRequest

# Requests that are judged together. Which ones does not depend on the number of edits, so that a
# longer run begins with the same requests, to the last bit.
ASKED_TOGETHER = 256
Unit = tuple[EditRequest, ...]  # a group, or a request without one


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Requests in their order, and the counts of the others."""

    kept: tuple[EditRequest, ...]
    asked: int
    refused: Counter[str]  # reason -> requests


def select(
    data: LoadedDataset,
    why_not: Callable[[Sequence[Unit]], Sequence[str | None]],
    *,
    edits: int | None,
    should_stop: Callable[[], bool],
) -> Selected:
    """The requests without a reason against them. Those of a group stay or go together.

    Args:
        why_not: the reason against each of some groups; None for one that stays.
        edits: judge until so many are found; None: judge all.

    Raises:
        Stopped: it was to stop.
    """
    kept: list[EditRequest] = []
    asked, refused = 0, Counter[str]()
    with collecting("facts") as shown:
        for chunk in _chunks(units(data.requests)):
            for unit, reason in zip(chunk, why_not(chunk), strict=True):
                asked += len(unit)
                if reason is None:
                    kept += unit
                else:
                    refused[reason] += len(unit)
            shown.progress(asked, len(data.requests))
            if edits is not None and len(kept) >= edits:
                break
            if should_stop():
                raise Stopped
    return Selected(kept=tuple(kept), asked=asked, refused=refused)


def _chunks(all_units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """The units in order, a chunk of about `ASKED_TOGETHER` requests at a time."""
    ends = itertools.accumulate(len(unit) for unit in all_units)
    for _, chunk in itertools.groupby(
        zip(all_units, ends, strict=True), key=lambda pair: (pair[1] - 1) // ASKED_TOGETHER
    ):
        yield [unit for unit, _ in chunk]
