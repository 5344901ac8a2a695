"""`dataset.known_only`: the requests whose facts the unedited model knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.datasets.base import LoadedDataset, units
from editkit.errors import ConfigError, message
from editkit.evaluation.known import knows
from editkit.runner.signals import Stopped
from editkit.trackers.collecting import collecting
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# Requests that are asked together. Which ones does not depend on the number of edits, so that a
# longer run begins with the same requests, to the last bit.
ASKED_TOGETHER = 256
ASKED, KNOWN = "facts that the unedited model was asked for", "facts that it knows"
UNKNOWN = "the unedited model does not know the fact, or another one of its group"
NO_ANSWER = "there is no true answer that the unedited model could know"


def select_known(
    model: EditableModel,
    data: LoadedDataset,
    *,
    edits: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> LoadedDataset:
    """The dataset with the known facts alone, in their order, and the counts of all others. The
    facts of a group stay or go together.

    Args:
        model: unedited.
        edits: ask until so many known facts are found; None: ask for all facts.

    Raises:
        ConfigError: there are fewer known facts than `edits`.
        Stopped: it was to stop.
    """
    kept: list[EditRequest] = []
    asked = unknown = no_answer = 0
    with collecting("facts") as shown:
        for chunk in _chunks(units(data.requests)):
            answers = iter(knows(model, [request for unit in chunk for request in unit]))
            for unit in chunk:
                is_known = [next(answers) for _ in unit]
                asked += len(unit)
                if all(is_known):
                    kept += unit
                elif any(request.target_old is None for request in unit):
                    no_answer += len(unit)
                else:
                    unknown += len(unit)
            shown.progress(asked, len(data.requests))
            if edits is not None and len(kept) >= edits:
                break
            if should_stop():
                raise Stopped
    if edits is not None and len(kept) < edits:
        without = f"; {no_answer} of the others have no true answer" if no_answer else ""
        raise ConfigError(
            message(
                "edits",
                f"{model.name} knows {len(kept)} of the {asked} facts of dataset={data.name}"
                f"{without}",
                got=edits,
                expected=f"at most {len(kept)}, as dataset.known_only=true",
                fix="lower edits, choose a dataset that the model knows more of, or set "
                "dataset.known_only=false",
            )
        )
    skipped = {UNKNOWN: unknown, NO_ANSWER: no_answer}
    return replace(
        data,
        requests=tuple(kept),
        skipped={**data.skipped, **{reason: count for reason, count in skipped.items() if count}},
        remarks={**data.remarks, ASKED: asked, KNOWN: len(kept)},
    )


def _chunks(
    all_units: Sequence[tuple[EditRequest, ...]],
) -> Iterator[list[tuple[EditRequest, ...]]]:
    """The units in order, a chunk of about `ASKED_TOGETHER` requests at a time."""
    ends = itertools.accumulate(len(unit) for unit in all_units)
    for _, chunk in itertools.groupby(
        zip(all_units, ends, strict=True), key=lambda pair: (pair[1] - 1) // ASKED_TOGETHER
    ):
        yield [unit for unit, _ in chunk]
