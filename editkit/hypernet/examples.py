"""What a hypernetwork is trained on: requests, each with a paraphrase (equivalence) and texts that
must stay as they are (locality).

A dataset's first `held_apart` requests are left to the runs; of the others some choose when to stop
(validation), the rest is trained on. Which is which follows from the seed, and each step's draws
from the seed and the step: nothing has to be kept to go on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editkit.errors import ConfigError
from editkit.types import EditRequest, Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The parts of a dataset; no id and no prompt is in two of them."""

    train: tuple[EditRequest, ...]
    validation: tuple[EditRequest, ...]
    num_held_apart: int
    left_out: dict[str, int]  # reason -> requests

    @property
    def seen(self) -> tuple[EditRequest, ...]:
        """All whose edits a run must not make."""
        return self.train + self.validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One edit as it is trained on: the request, one wording of it, some of its locality texts."""

    request: EditRequest
    paraphrase: str
    locality: tuple[Probe, ...]


def locality_texts(request: EditRequest) -> tuple[Probe, ...]:
    """Every text of a request that an edit must leave alone."""
    return (
        *request.neighbours,
        *(probe for probes in request.locality.values() for probe in probes),
    )


def split(
    requests: Sequence[EditRequest], *, held_apart: int, validation: int, least: int, seed: int
) -> Split:
    """Takes the requests apart. Raises ConfigError where too few are left to train on, or none has
    a locality text.

    Args:
        held_apart: how many of the first are for runs.
        validation: how many choose when to stop.
        least: how many training examples are needed.
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
        f"dataset: none of the {rest} requests that may be trained on "
        f"{reason.replace('has no', 'has a')}: MEND cannot be trained on it."
        for reason in ("has no paraphrase", "has no locality text")
        if rest and left_out.get(reason) == rest
    ]
    if not problems and len(usable) < validation + least:
        counted = "".join(f", {number} of which {reason}" for reason, number in left_out.items())
        problems.append(
            f"dataset: {rest} requests lie behind the {held_apart} that are held apart{counted}; "
            f"editor.train.validation={validation} "
            f"and at least {least} to train on are needed. Give more data, or lower "
            "editor.train.held_apart or editor.train.validation."
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
    """Those of a step (counted from 1): every request once before any comes again; wording and
    texts are drawn anew each time.
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
    """As many as are wanted: repeated where there are too few, so that every example weighs the
    same.
    """
    shuffled = rng.sample(probes, len(probes))
    return tuple(shuffled[index % len(shuffled)] for index in range(count))
