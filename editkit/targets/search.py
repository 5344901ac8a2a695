"""The search for target vectors: outputs of a module at the subject's last token with which the
model generates the target.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), Eq. 4, as in the published code. Comments mark
the differences. All locate-then-edit methods share this implementation. Its only input about the
method is the site, a module whose output is (B, T, O), or several such modules of one block.

    loss(delta) = mean over contexts of -log p(target) per token     the request
                + kl_factor * KL(p with delta || p without)          after "{subject} is a": the
                                                                     subject keeps its essence
                + weight_decay * |delta| / |v|^2                     v: the module's output for the
                                                                     clean prompt

`descent` minimises the loss for all requests of a batch together. It uses one of `forwards`: the
plain forward runs the whole network in each step, the suffix forward only the part that can change.
A search without a restraint on the objective is one descent. A restraint may use several.

Shape letters: N requests, O width of the sites' outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.resources.stopwatch import measured
from editkit.targets.descent import Descent, Forward, TargetProblem
from editkit.targets.forwards import (
    Sites,
    modules_of,
    plain_forward,
    site_outputs,
    suffix_forward,
    suffix_layer,
)
from editkit.targets.sequences import Sequences, prepare
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.targets.objective import Objective
    from editkit.targets.settings import TargetSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The result of the search for one request. The target vector v* is `initial_O + delta_O`.

    The probabilities are those of the target after the clean prompt, as geometric means over its
    tokens, in [0, 1].
    """

    initial_O: torch.Tensor  # v, at least float32
    delta_O: torch.Tensor
    loss: float  # at delta_O
    updates: int  # number of Adam updates
    probability_before: float
    probability_after: float
    # whether the loss at delta_O is nan or infinite, which ended the search
    nonfinite: bool = False

    @property
    def vector_O(self) -> torch.Tensor:
        return self.initial_O + self.delta_O


def search_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    *,
    site: Sites,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: Objective | None = None,
) -> tuple[Target, ...]:
    """The target vector of each request for the current weights.

    The search adds delta to the output of the module `site` at the subject's last token of every
    sequence. Requests are searched together in batches, and each result equals that of a separate
    search up to rounding. The model does not change. A loss that is not finite ends the search of
    its request and is reported in the result.

    Args:
        site: one module, or several of one block. Each target then has a part for each.
        contexts: templates with one "{}" for the prompt. The first of them is the bare "{}".

    Raises:
        ConfigError: a request cannot be tokenised.
    """
    with measured("texts"):
        sequences = [
            prepare(model, request, contexts, kl_position=settings.kl_position)
            for request in requests
        ]
    layers = [None if settings.exact else suffix_layer(model, site, texts) for texts in sequences]
    if not settings.exact and None in layers and model.shortcuts.allows("search"):
        log.warning(
            "%s: target searches run the whole network in every step, because texts are longer "
            "than a sliding window, or the first block is edited and does not add its MLP's output "
            "unchanged. The results are the same, but the search takes several times longer.",
            model.name,
        )
    at_block = modules_of(site)[0] in map(model.family.block, range(model.num_layers))
    targets: dict[int, Target] = {}
    for layer in dict.fromkeys(layers):
        for places in _batches(
            sequences,
            [place for place, own in enumerate(layers) if own == layer],
            settings.tokens_at_once,
        ):
            with measured("prefix"):
                has_top = settings.is_eased or (objective is not None and objective.needs_top)
                problem = _problem(
                    model, site, layer, [sequences[place] for place in places], settings, has_top
                )
            with measured("search"):
                if objective is None:
                    descent = problem.descend(updates=settings.steps - 1)
                else:
                    ids = [requests[place].id for place in places]
                    descent = objective.search(
                        problem, request_ids=ids, site="block" if at_block else "mlp"
                    )
                targets |= zip(places, targets_of(problem, descent), strict=True)
    return tuple(targets[place] for place in range(len(requests)))


def search_target(
    model: EditableModel,
    request: EditRequest,
    *,
    site: Sites,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: Objective | None = None,
) -> Target:
    """`search_targets` for one request."""
    return search_targets(
        model, [request], site=site, contexts=contexts, settings=settings, objective=objective
    )[0]


def targets_of(problem: TargetProblem, descent: Descent) -> Iterator[Target]:
    """The target of each request from the result of its descent."""
    columns = (
        descent.loss_N,
        descent.updates_N,
        descent.at_zero[0][:, 0].exp(),
        descent.log_p_NC[:, 0].exp(),
        ~descent.is_finite_N,
    )
    for place, (loss, updates, before, after, nonfinite) in enumerate(
        zip(*(column_N.tolist() for column_N in columns), strict=True)
    ):
        yield Target(
            initial_O=problem.initial_NO[place],
            delta_O=descent.delta_NO[place],
            loss=loss,
            updates=updates,
            probability_before=before,
            probability_after=after,
            nonfinite=nonfinite,
        )


def _problem(
    model: EditableModel,
    site: Sites,
    layer: int | None,
    sequences: Sequence[Sequences],
    settings: TargetSettings,
    has_top: bool,
) -> TargetProblem:
    forward: Forward
    if layer is None:
        forward, initial_NO = (
            plain_forward(model, site, sequences, has_top=has_top),
            site_outputs(model, site, sequences),
        )
    else:
        allowed = model.shortcuts.allows("products")
        forward, initial_NO = suffix_forward(
            model,
            site,
            layer,
            sequences,
            has_top=has_top,
            products=settings.products if allowed else "float32",
        )
    return TargetProblem(
        forward=forward,
        initial_NO=initial_NO,
        settings=settings,
        num_sites=len(modules_of(site)),
        is_stop_check_delayed=model.device.type == "cuda",
        mlp_outputs=_mlp_outputs(model, site, sequences),
    )


def _mlp_outputs(
    model: EditableModel, site: Sites, sequences: Sequence[Sequences]
) -> Callable[[], torch.Tensor] | None:
    """At a block, what its MLP adds to the residual stream; None if that is not its output."""
    blocks = [model.family.block(layer) for layer in range(model.num_layers)]
    name = modules_of(site)[-1]
    if name not in blocks or not model.family.adds_mlp_output:
        return None
    return partial(site_outputs, model, model.family.mlp(blocks.index(name)), sequences)


def _batches(
    sequences: Sequence[Sequences], places: Sequence[int], tokens_at_once: int
) -> Iterator[list[int]]:
    """Divides requests into batches of at most `tokens_at_once` tokens, including padding.

    A batch of a single request may be larger.
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
