"""`dataset.known_only`: the requests whose facts the unedited model knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.datasets.base import LoadedDataset
from editkit.errors import ConfigError, message
from editkit.evaluation.known import knows
from editkit.runner.selecting import Unit, select

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

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

    def why_not(chunk: Sequence[Unit]) -> list[str | None]:
        answers = iter(knows(model, [request for unit in chunk for request in unit]))
        reasons: list[str | None] = []
        for unit in chunk:
            is_known = [next(answers) for _ in unit]
            has_no_answer = any(request.target_old is None for request in unit)
            reasons.append(None if all(is_known) else NO_ANSWER if has_no_answer else UNKNOWN)
        return reasons

    found = select(data, why_not, edits=edits, should_stop=should_stop)
    kept, asked, no_answer = found.kept, found.asked, found.refused[NO_ANSWER]
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
    return replace(
        data,
        requests=kept,
        skipped={**data.skipped, **found.refused},
        remarks={**data.remarks, ASKED: asked, KNOWN: len(kept)},
    )
