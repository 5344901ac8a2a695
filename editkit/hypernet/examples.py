"""The training examples of a hypernetwork: requests with a paraphrase (equivalence) and texts whose
predictions must not change (locality).

A dataset's first `held_apart` requests are reserved for runs. The others are divided into
validation requests, which determine when training ends, and training requests. The seed determines
the division, and the seed and the step determine the draws of a step. Resuming therefore needs no
stored state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editkit.errors import ConfigError, message
from editkit.types import EditRequest, Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The parts of a dataset. No id and no prompt occurs in two parts."""

    train: tuple[EditRequest, ...]
    validation: tuple[EditRequest, ...]
    num_held_apart: int
    left_out: dict[str, int]  # reason -> number of requests

    @property
    def used(self) -> tuple[EditRequest, ...]:
        """The requests used for training or validation, which a run must not edit."""
        return self.train + self.validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A training example: a request, one of its paraphrases and some of its locality texts."""

    request: EditRequest
    paraphrase: str
    locality: tuple[Probe, ...]

    @property
    def question(self) -> Probe:
        """The paraphrase with the target."""
        return self.request.probe(prompt=self.paraphrase)


def locality_texts(request: EditRequest) -> tuple[Probe, ...]:
    """All locality texts of a request: prompts whose answers the edit must not change."""
    return (
        *request.neighbours,
        *(probe for probes in request.locality.values() for probe in probes),
    )


def split(
    requests: Sequence[EditRequest], *, held_apart: int, validation: int, least: int, seed: int
) -> Split:
    """Divides the requests.

    Args:
        held_apart: number of the first requests, which are reserved for runs.
        validation: number of validation requests.
        least: smallest number of training requests.

    Raises:
        ConfigError: there are too few training requests, or none has a paraphrase or a locality
            text.
    """
    apart = {
        (kind, text)
        for request in requests[:held_apart]
        for kind, text in (("id", request.id), ("prompt", request.full_prompt))
    }
    left_out: dict[str, int] = {}
    usable: list[EditRequest] = []
    known: set[str] = set()
    for request in requests[held_apart:]:
        if ("id", request.id) in apart or ("prompt", request.full_prompt) in apart:
            reason = "asks what a request that is held apart asks"
        elif not request.paraphrases:
            reason = "has no paraphrase"
        elif not locality_texts(request):
            reason = "has no locality text"
        elif request.full_prompt in known:
            reason = "asks what an earlier one asks"
        else:
            known.add(request.full_prompt)
            usable.append(request)
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    rest = len(requests[held_apart:])
    problems = [
        message(
            "dataset",
            f"none of the {rest} requests for training {reason.replace('has no', 'has a')}",
            fix="choose a dataset with paraphrases and locality texts",
        )
        for reason in ("has no paraphrase", "has no locality text")
        if rest and left_out.get(reason) == rest
    ]
    if not problems and len(usable) < validation + least:
        counted = "".join(f", {number} of which {reason}" for reason, number in left_out.items())
        problems.append(
            message(
                "dataset",
                f"there are too few requests after the {held_apart} reserved ones{counted}",
                got=rest,
                expected=f"editor.train.validation={validation} and at least {least} for training",
                fix="choose a larger dataset, or lower editor.train.held_apart or "
                "editor.train.validation",
            )
        )
    if problems:
        raise ConfigError(problems)
    random.Random(f"hypernetwork/split/{seed}").shuffle(usable)
    return Split(
        train=tuple(usable[validation:]),
        validation=tuple(usable[:validation]),
        num_held_apart=min(held_apart, len(requests)),
        left_out=left_out,
    )


def examples(
    requests: Sequence[EditRequest], *, seed: int, step: int, count: int, locality: int
) -> tuple[Example, ...]:
    """The examples of a step, counted from 1.

    Every request occurs once before any request is repeated. Paraphrase and locality texts are
    drawn anew each time.
    """
    rng = random.Random(f"hypernetwork/step/{seed}/{step}")
    return tuple(
        Example(
            request=request,
            paraphrase=rng.choice(request.paraphrases),
            locality=_some(rng, locality_texts(request), locality),
        )
        for request in _in_turn(requests, seed=seed, start=(step - 1) * count, count=count)
    )


def _in_turn(
    requests: Sequence[EditRequest], *, seed: int, start: int, count: int
) -> Iterator[EditRequest]:
    order, shuffled = list(range(len(requests))), -1
    for place in range(start, start + count):
        epoch, offset = divmod(place, len(requests))
        if epoch != shuffled:
            order, shuffled = list(range(len(requests))), epoch
            random.Random(f"hypernetwork/epoch/{seed}/{epoch}").shuffle(order)
        yield requests[order[offset]]


def _some(rng: random.Random, probes: Sequence[Probe], count: int) -> tuple[Probe, ...]:
    """`count` probes in random order. They are repeated if there are too few, so that all examples
    have the same weight.
    """
    shuffled = rng.sample(probes, len(probes))
    return tuple(shuffled[index % len(shuffled)] for index in range(count))
