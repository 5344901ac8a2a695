"""`editkit.edit`: one batch of edits in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from editkit.api.method import RestraintChoice
from editkit.api.result import EditResult
from editkit.api.session import Session
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, message
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.corpus import StatsConfig


class SessionOptions(TypedDict, total=False):
    """The keyword arguments of `Session`."""

    editor: str | AbstractAnyEditor[Any]
    recipe: str | None
    restraint: RestraintChoice | None
    options: Mapping[str, object] | None
    second_moments: str | Path | StatsConfig | None
    seed: int


def edit(
    model: EditableModel,
    requests: EditRequest | Sequence[EditRequest] | None = None,
    *,
    prompt: str | None = None,
    subject: str | None = None,
    target: str | None = None,
    **settings: Unpack[SessionOptions],
) -> EditResult:
    """Edits one batch of requests, or one fact, into the model. `model.undo()` takes it back.

    Each call has a session of its own. For several edits in sequence `Session` is faster, and
    restraints with a history (D4S, AlphaEdit) need it.

    Args:
        model: from `editkit.load`.
        requests: an EditRequest or several; or give prompt, subject and target.
        prompt: with "{}" in the place of the subject: "The capital of {} is".
        subject: the text for "{}".
        target: the new answer, without a leading blank.
        settings: editor, recipe, restraint, options, second_moments and seed, as for `Session`.

    Raises:
        ConfigError: an argument is invalid.
    """
    session = Session(model, **settings)
    views = [
        name
        for name, restraint in session.restraints.totals.items()
        if restraint.apply_at == "evaluation"
    ]
    if views:
        name = views[0]
        key = f"restraint.{name}.apply_at"
        raise ConfigError(
            message(
                key,
                "the restraint acts when a model is measured, and `edit` measures nothing",
                got="evaluation",
                expected="'every'",
                fix=f'use Session(...).restrained(), or options={{"{key}": "every", '
                f'"restraint.{name}.every": 1}}',
            )
        )
    return session.edit(requests, prompt=prompt, subject=subject, target=target)
