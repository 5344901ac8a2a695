"""A model with some edits against the unedited model: efficacy, and locality on the edits' own
locality prompts.

The protocol is `argmax` of `Session.measure`: under teacher forcing, an answer counts if each of
its tokens is the most probable one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from editkit.api.probing import TOKENS_PER_BATCH, Greedy, greedy_answers
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.linalg.total import Total
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

PROTOCOL = (
    "argmax under teacher forcing; unedited: the most probable tokens at the target are those of "
    "the unedited model; locality: the same at the answers of the edits' locality prompts"
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Shares in [0, 1] of a model's edits; None: there is nothing to measure."""

    efficacy: float | None
    probability: float | None  # mean of the targets' (geometric mean over tokens)
    unedited: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model's figures by a group of edits ("kept", "reverted", "A", "B"), and its locality."""

    groups: Mapping[str, Figures]
    locality: float | None
    num_locality: int

    def fields(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self) | {"protocol": PROTOCOL}


def measured(
    model: EditableModel,
    groups: Mapping[str, Sequence[EditRequest]],
    variants: Mapping[str, Mapping[str, Total]],
) -> dict[str, Measured]:
    """The figures of each variant of the model, by its name. The model ends with the last one.

    Args:
        model: a base model whose matrices are declared.
        variants: totals by matrix.
    """
    every = [request for own in groups.values() for request in own]
    local = list(dict.fromkeys(probe for request in every for probe in locality_of(request)))
    edits = [request.probe() for request in every]
    model.restore({name: Total(total.shape) for name, total in model.totals().items()})
    frozen = greedy_answers(model, [*edits, *local])
    found: dict[str, Measured] = {}
    for name, totals in variants.items():
        model.restore(totals)
        found[name] = _one(model, groups, local, frozen)
    return found


def locality_of(request: EditRequest) -> tuple[Probe, ...]:
    """A request's prompts whose answers must stay."""
    return (*request.neighbours, *(each for kind in request.locality.values() for each in kind))


def _one(
    model: EditableModel,
    groups: Mapping[str, Sequence[EditRequest]],
    local: Sequence[Probe],
    frozen: Greedy,
) -> Measured:
    edits = [request.probe() for own in groups.values() for request in own]
    every = list(dict.fromkeys([*edits, *local]))
    scores = score(model, every, tokens_per_batch=TOKENS_PER_BATCH) if every else {}

    def same(probe: Probe) -> bool:
        return tuple(scores[probe].greedy) == frozen[probe]

    figures = {}
    for name, requests in groups.items():
        probes = [request.probe() for request in requests]
        figures[name] = Figures(
            efficacy=_mean([scores[probe].is_greedy for probe in probes]),
            probability=_mean([scores[probe].probability for probe in probes]),
            unedited=_mean([same(probe) for probe in probes]),
            n=len(probes),
        )
    return Measured(
        groups=figures, locality=_mean([same(probe) for probe in local]), num_locality=len(local)
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
