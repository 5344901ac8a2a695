"""`model.expert`: the requests that the router of a mixture of experts sends to the edited expert.

An edit of one expert can have no effect where the router sends the edited token to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from editkit.datasets.base import LoadedDataset
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, message
from editkit.model.experts import KEY
from editkit.model.routing import routed_experts
from editkit.runner.selecting import Unit, select
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

ELSEWHERE = "the router sends the edited token, or another one of its group, to other experts"
MOST = 3  # experts that a message names


def edits_expert(model: EditableModel, editor: AbstractAnyEditor[Any]) -> bool:
    """Whether the edited matrices are those of one expert."""
    return model.family.expert is not None and bool(editor.modules(model))


def experts_of(
    model: EditableModel, editor: AbstractAnyEditor[Any], requests: Sequence[EditRequest]
) -> list[set[int]]:
    """By request: the experts that the router chooses at the edited tokens in any edited layer."""
    modules, family = editor.modules(model), model.family
    layers = [
        layer
        for layer in range(model.num_layers)
        if any(name.startswith(f"{family.block(layer)}.") for name in modules)
    ]
    texts = [editor.edited_tokens(model, request) for request in requests]
    return [set[int]().union(*by_layer) for by_layer in routed_experts(model, layers, texts)]


def select_routed(
    model: EditableModel,
    editor: AbstractAnyEditor[Any],
    data: LoadedDataset,
    *,
    edits: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> LoadedDataset:
    """The dataset with the requests that reach the edited expert alone, and the count of the
    others.

    Args:
        model: unedited.
        edits: look until so many are found.

    Raises:
        ConfigError: there are fewer.
        Stopped: it was to stop.
    """
    expert, chosen = model.family.expert, Counter[int]()

    def why_not(chunk: Sequence[Unit]) -> list[str | None]:
        found = iter(experts_of(model, editor, [request for unit in chunk for request in unit]))
        reasons: list[str | None] = []
        for unit in chunk:
            of_unit = [next(found) for _ in unit]
            chosen.update(number for numbers in of_unit for number in numbers)
            reaches = all(expert in numbers for numbers in of_unit)
            reasons.append(None if reaches else ELSEWHERE)
        return reasons

    selected = select(data, why_not, edits=edits, should_stop=should_stop)
    if len(selected.kept) < edits:
        most = ", ".join(f"{number} ({count})" for number, count in chosen.most_common(MOST))
        raise ConfigError(
            message(
                KEY,
                f"the router of {model.name} sends {len(selected.kept)} of the {selected.asked} "
                f"requests of dataset={data.name} to this expert, and {edits} are to be edited",
                got=expert,
                fix=f"lower edits, or choose an expert that gets more requests: {most}",
            )
        )
    return replace(data, requests=selected.kept, skipped={**data.skipped, **selected.refused})


def require_routed(
    model: EditableModel, editor: AbstractAnyEditor[Any], requests: Sequence[EditRequest]
) -> None:
    """Raises ConfigError if the router sends a request to other experts than the edited one."""
    expert = model.family.expert
    if not edits_expert(model, editor):
        return
    found = experts_of(model, editor, requests)
    problems = [
        message(
            KEY,
            f"the edit of {request.id} can have no effect, because the router sends its edited "
            "token to other experts",
            got=expert,
            expected=f"one of {', '.join(map(str, sorted(numbers)))}",
        )
        for request, numbers in zip(requests, found, strict=True)
        if expert not in numbers
    ]
    if problems:
        raise ConfigError(problems)
