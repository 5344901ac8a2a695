"""The edit requests of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editkit.datasets.separators import AUTO, problem_of, separated
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, message
from editkit.types import EditRequest


def request_of(*, prompt: str | None, subject: str | None, target: str | None) -> EditRequest:
    """One fact as an edit request.

    Raises:
        ConfigError: a part is missing or blank.
    """
    fact = {"prompt": prompt, "subject": subject, "target": target}
    problems = [
        message(key, "not given", expected="text", fix="pass it, or pass an EditRequest")
        for key, text in fact.items()
        if not (text or "").strip()
    ]
    if problems:
        raise ConfigError(problems)
    assert prompt and subject and target
    return EditRequest(id=f"edit/{subject}", prompt=prompt, subject=subject, target=target)


def batch_of(
    requests: EditRequest | Sequence[EditRequest],
    editor: AbstractAnyEditor[Any],
    *,
    is_edited: bool = True,
) -> tuple[EditRequest, ...]:
    """The requests, checked.

    Args:
        is_edited: whether they are one batch of edits.

    Raises:
        ConfigError: there is none, there are more than the editor edits at a time, a prompt does
            not mark the place of its subject, or a separator is invalid.
    """
    batch = (requests,) if isinstance(requests, EditRequest) else tuple(requests)
    if not batch:
        raise ConfigError(message("requests", "empty", expected="at least one edit request"))
    limit = editor.max_batch_size if is_edited else None
    if limit is not None and len(batch) > limit:
        problem = f"{type(editor).__name__} edits {limit} at a time"
        fix = "call `edit` of one Session for each of them"
        raise ConfigError(message("requests", problem, got=len(batch), fix=fix))
    problems = [
        message(
            "prompt",
            "the place of the subject is not marked",
            got=request.prompt,
            expected='exactly one "{}"',
            fix=f'write "{{}}" in place of {request.subject!r}',
        )
        for request in batch
        if request.prompt.count("{}") != (1 if request.subject else 0)
    ]
    problems += filter(None, (problem_of(request.separator or AUTO) for request in batch))
    if problems:
        raise ConfigError(problems)
    return tuple(separated(request, AUTO) for request in batch)
