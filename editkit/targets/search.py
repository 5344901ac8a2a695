"""The search for target vectors: what a module should give at the subject's last token, so that the
model says the target.

Meng et al. 2022 (ROME, arXiv 2202.05262), Eq. 4, as published code has it, with the differences
named where they are. One implementation for every locate-then-edit method: it knows a site (any
module whose output is (B, T, O)) and nothing about what is done with its answer.

    loss(delta) = mean over contexts of -log p(target) per token     the request
                + kl_factor * KL(p with delta || p without)          after "{subject} is a": the
                                                                     subject keeps its essence
                + weight_decay * |delta| / |v|^2                     v: the module's output for the
                                                                     clean prompt

`descent` minimises it for all requests of a batch together, over either of `forwards`: the plain
one runs the whole network each step, the continued one what can change. A plain search is one
descent; a restraint on the objective may make it of several.

Shape letters: N requests, O width of the site's output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.resources.stopwatch import measured
from editkit.targets.descent import Descent, Forward, TargetProblem
from editkit.targets.forwards import continued_forward, continued_layer, plain_forward, site_outputs
from editkit.targets.sequences import Sequences, prepare
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.targets.objective import Objective
    from editkit.targets.settings import TargetSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """What the search found for a request; the target vector v* is `initial_O + delta_O`.

    The probabilities are the target's after the clean prompt, as the geometric mean over its
    tokens, in [0, 1].
    """

    initial_O: torch.Tensor  # v, at least float32
    delta_O: torch.Tensor
    loss: float  # at delta_O
    updates: int  # how often Adam moved
    probability_before: float
    probability_after: float
    # the loss at delta_O is not a number, or infinite; the search ended there
    nonfinite: bool = False

    @property
    def vector_O(self) -> torch.Tensor:
        return self.initial_O + self.delta_O


def search_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    *,
    site: str,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: Objective | None = None,
) -> tuple[Target, ...]:
    """The target of each request, on the weights as they are now: delta is added to the output of
    the module `site` at the subject's last token of every sequence.

    They are searched together, in batches of at most `settings.tokens_at_once`; each finds what it
    would find alone, to rounding. `contexts` are templates with one "{}" for the prompt, the first
    of them the bare "{}". The model is read only. A loss that is not finite ends a request's search
    and is told in its result. Raises ConfigError for a request that cannot be tokenised.
    """
    with measured("texts"):
        sequences = [
            prepare(model, request, contexts, kl_position=settings.kl_position)
            for request in requests
        ]
    layers = [None if settings.exact else continued_layer(model, site, each) for each in sequences]
    if not settings.exact and None in layers:
        log.warning(
            "%s: target searches run the whole network in every step, since the site is not added "
            "to the residual stream as it is, or "
            "texts are longer than a sliding window: the same results, several times slower",
            model.name,
        )
    at_block = site in map(model.family.block, range(model.num_layers))
    found: dict[int, Target] = {}
    for layer in dict.fromkeys(layers):
        for places in _batches(
            sequences,
            [place for place, each in enumerate(layers) if each == layer],
            settings.tokens_at_once,
        ):
            with measured("prefix"):
                problem = _problem(
                    model, site, layer, [sequences[place] for place in places], settings
                )
            with measured("search"):
                if objective is None:
                    descent = problem.descend(updates=settings.steps - 1)
                else:
                    ids = [requests[place].id for place in places]
                    descent = objective.search(
                        problem, request_ids=ids, site="block" if at_block else "mlp"
                    )
                found |= zip(places, targets_of(problem, descent), strict=True)
    return tuple(found[place] for place in range(len(requests)))


def search_target(
    model: EditableModel,
    request: EditRequest,
    *,
    site: str,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: Objective | None = None,
) -> Target:
    """`search_targets` of one request."""
    return search_targets(
        model, [request], site=site, contexts=contexts, settings=settings, objective=objective
    )[0]


def targets_of(problem: TargetProblem, found: Descent) -> Iterator[Target]:
    """The result of each request."""
    columns = (
        found.loss_N,
        found.updates_N,
        found.unmoved[0][:, 0].exp(),
        found.log_p_NC[:, 0].exp(),
        ~found.is_finite_N,
    )
    for place, (loss, updates, before, after, nonfinite) in enumerate(
        zip(*(column_N.tolist() for column_N in columns), strict=True)
    ):
        yield Target(
            initial_O=problem.initial_NO[place],
            delta_O=found.delta_NO[place],
            loss=loss,
            updates=updates,
            probability_before=before,
            probability_after=after,
            nonfinite=nonfinite,
        )


def _problem(
    model: EditableModel,
    site: str,
    layer: int | None,
    sequences: Sequence[Sequences],
    settings: TargetSettings,
) -> TargetProblem:
    forward: Forward
    if layer is None:
        forward, initial_NO = (
            plain_forward(model, site, sequences),
            site_outputs(model, site, sequences),
        )
    else:
        forward, initial_NO = continued_forward(model, site, layer, sequences)
    return TargetProblem(
        forward=forward,
        initial_NO=initial_NO,
        settings=settings,
        is_late=model.device.type == "cuda",
    )


def _batches(
    sequences: Sequence[Sequences], places: Sequence[int], tokens_at_once: int
) -> Iterator[list[int]]:
    """Divides requests into batches whose rectangle of rows and longest row is within the bound; a
    request alone may exceed it.
    """
    batch: list[int] = []
    rows = longest = 0
    for place in places:
        own = sequences[place].ids
        longest_with = max(longest, *map(len, own))
        if batch and (rows + len(own)) * longest_with > tokens_at_once:
            yield batch
            batch, rows, longest_with = [], 0, max(map(len, own))
        batch.append(place)
        rows, longest = rows + len(own), longest_with
    if batch:
        yield batch
