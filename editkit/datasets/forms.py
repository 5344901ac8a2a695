"""The same facts in three forms, as D4S's data view compares them (Huang et al. 2024, arXiv
2410.23843, section 3 and Table 1): directly generated, multiple choice, true or false.

The paper makes its Multi-Question Dataset from ATOMIC. Here the facts are those of any dataset of
requests with a subject, an old answer and a new one:

    generation  the request as it is: "The capital of France is" -> "Lyon"
    choice      the new answer, the old one and two more as options a to d, and the letter of the
                new answer as the target
    judgement   the statement with the new answer, and the target "yes", which was "no"

Paraphrases and neighbours are put in the same form. A neighbour's options hold its own answer and
the edit's new one; judged is the statement that its answer is the edit's new one, "no" before and
after. Other questions of a request (locality by kind, portability, generation prompts) are left
out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from editkit.datasets.base import AbstractDataset, LoadedDataset, Order, arrange
from editkit.errors import ConfigError, message
from editkit.types import EditRequest, Probe

Form = Literal["generation", "choice", "judgement"]
LETTERS = ("a", "b", "c", "d")
YES, NO = "yes", "no"


@dataclass(frozen=True, kw_only=True)
class Forms(AbstractDataset):
    """The requests of another dataset in one form."""

    name: str
    form: Form
    source: AbstractDataset
    order: Order
    limit: int | None

    def load(self, seed: int) -> LoadedDataset:
        data = self.source.load(seed)
        if lacking := [
            request.id
            for request in data.requests
            if not request.subject or request.target_old is None
        ]:
            problem = f"{len(lacking)} requests of {data.name} have no subject or no old answer"
            expected = "a dataset of requests that have both"
            raise ConfigError(message("dataset.source", problem, got=lacking[0], expected=expected))
        answers = sorted({request.target for request in data.requests})
        if self.form == "choice" and len(answers) < len(LETTERS):
            problem, expected = "too few different targets", f"{len(LETTERS)} or more"
            raise ConfigError(
                message("dataset.source", problem, got=len(answers), expected=expected)
            )
        by_prompt: dict[str, list[str]] = {}
        for request in data.requests:
            by_prompt.setdefault(request.prompt, []).append(request.target)
        requests = [
            _in_form(request, self.form, sorted(set(by_prompt[request.prompt])), answers)
            for request in data.requests
        ]
        return replace(
            data,
            name=self.name,
            requests=arrange(requests, order=self.order, seed=seed, limit=self.limit),
            variant={**data.variant, "form": self.form, "source": data.name},
        )


def _in_form(
    request: EditRequest, form: Form, near: Sequence[str], answers: Sequence[str]
) -> EditRequest:
    """The request in a form.

    Args:
        near: targets of requests with the same prompt, from which options are drawn first.
        answers: all targets.
    """
    kept = replace(
        request,
        locality={},
        portability={},
        attribute_prompts=(),
        generation_prompts=(),
        references=(),
        hops=(),
        group=None,
    )
    if form == "generation":
        return kept
    old = request.target_old or ""
    if form == "judgement":
        return replace(
            kept,
            prompt=_judged(request.prompt, request.target),
            target=YES,
            target_old=NO,
            paraphrases=tuple(_judged(text, request.target) for text in request.paraphrases),
            neighbours=tuple(
                Probe(prompt=_judged(probe.prompt, request.target), answer=NO)
                for probe in request.neighbours
                if probe.answer != request.target
            ),
            separator=None,
        )
    options = _options(request.id, (request.target, old), near, answers)
    return replace(
        kept,
        prompt=_asked(request.prompt, options),
        target=LETTERS[options.index(request.target)],
        target_old=LETTERS[options.index(old)],
        paraphrases=tuple(_asked(text, options) for text in request.paraphrases),
        neighbours=tuple(
            Probe(prompt=_asked(probe.prompt, found), answer=LETTERS[found.index(probe.answer)])
            for place, probe in enumerate(request.neighbours)
            if probe.answer != request.target
            for found in [
                _options(f"{request.id}/{place}", (request.target, probe.answer), near, answers)
            ]
        ),
        separator=None,
    )


def _options(
    drawn_by: str, wanted: tuple[str, str], near: Sequence[str], answers: Sequence[str]
) -> list[str]:
    """Four different answers in a drawn order: the wanted ones, and others."""
    draw = random.Random(f"forms/{drawn_by}")
    others = [answer for answer in near if answer not in wanted]
    chosen = draw.sample(others, min(2, len(others)))
    while len(chosen) < len(LETTERS) - len(wanted):
        answer = draw.choice(answers)
        if answer not in (*wanted, *chosen):
            chosen.append(answer)
    options = [*wanted, *chosen]
    draw.shuffle(options)
    return options


def _asked(prompt: str, options: Sequence[str]) -> str:
    listed = " ".join(
        f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)
    )
    return f"{prompt.rstrip()} which of these? {listed} The right letter is"


def _judged(prompt: str, answer: str) -> str:
    return f"{prompt.rstrip()} {answer}. Is this right, yes or no? It is:"
