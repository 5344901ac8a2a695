"""What a model knows: the one definition, for `dataset.known_only` and for causal tracing.

A model knows a fact if greedy decoding of the request's own prompt begins with the true answer
(`target_old`): each token of the answer is the most probable one after the prompt and the answer's
tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.trace import Fact, facts_of
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def knows(
    model: EditableModel, requests: Sequence[EditRequest], *, tokens_per_batch: int = 4096
) -> tuple[bool, ...]:
    """Whether the model knows the fact of each request. A request without a true answer counts as
    unknown.
    """
    probes = [
        request.probe(answer=request.target_old) if request.target_old else None
        for request in requests
    ]
    scores = score(
        model,
        [probe for probe in probes if probe is not None],
        tokens_per_batch=tokens_per_batch,
    )
    return tuple(
        probe is not None and scores[probe].is_greedy and scores[probe].is_finite
        for probe in probes
    )


def known_facts_of(model: EditableModel, requests: Sequence[EditRequest]) -> tuple[Fact, ...]:
    """The facts of these requests that the model knows, for causal tracing. Raises ConfigError if
    it knows none.
    """
    if without := [request.id for request in requests if not request.subject]:
        raise ConfigError(
            message(
                "dataset.subject",
                "causal tracing adds noise to the subject, and the prompts of "
                f"{len(without)} requests do not hold theirs (the first is {without[0]})",
                fix="set dataset.subject=required, or leave these requests out",
            )
        )
    answers = zip(requests, knows(model, requests), strict=True)
    known = [request for request, is_known in answers if is_known]
    if not known:
        raise ConfigError(
            message(
                "--trace",
                f"{model.name} knows none of the {len(requests)} facts; the most probable text "
                "after a prompt never begins with the old target",
                fix="choose another dataset, more edits, or a model with trained weights",
            )
        )
    return facts_of(model, known)
