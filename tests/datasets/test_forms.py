"""The three forms of the same facts."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from editkit.datasets.base import AbstractDataset
from editkit.datasets.facts import Facts
from editkit.datasets.forms import LETTERS, Form, Forms
from editkit.datasets.world import WorldDataset
from editkit.errors import ConfigError

FACTS = Facts(name="facts", split="report", order="file", limit=24)


def forms(form: Form, source: AbstractDataset = FACTS, limit: int | None = 20) -> Forms:
    return Forms(name="forms", form=form, source=source, order="file", limit=limit)


def options_of(prompt: str) -> dict[str, str]:
    found = re.search(r"which of these\? a\) (.*) b\) (.*) c\) (.*) d\) (.*) The right", prompt)
    assert found, prompt
    return dict(zip(LETTERS, found.groups(), strict=True))


def test_a_choice_has_the_new_answer_the_old_one_and_two_more() -> None:
    plain, chosen = FACTS.load(0).requests, forms("choice").load(0)
    assert chosen.variant["form"] == "choice" and chosen.variant["source"] == "facts"
    assert len(chosen.requests) == 20
    letters = set()
    for before, request in zip(plain, chosen.requests, strict=False):
        options = options_of(request.prompt)
        assert len(set(options.values())) == 4
        assert options[request.target] == before.target
        assert options[request.target_old or ""] == before.target_old
        assert request.prompt.startswith(before.prompt) and request.subject == before.subject
        assert len(request.paraphrases) == len(before.paraphrases)
        for paraphrase in request.paraphrases:
            assert options_of(paraphrase) == options
        for probe in request.neighbours:
            of_neighbour = options_of(probe.prompt)
            assert before.target in of_neighbour.values()
            assert of_neighbour[probe.answer] != before.target
        letters.add(request.target)
    assert letters == set(LETTERS)
    assert chosen.requests == forms("choice").load(0).requests  # drawn by the request alone


def test_a_judgement_is_wrong_before_the_edit_and_stays_wrong_of_neighbours() -> None:
    plain, judged = FACTS.load(0).requests, forms("judgement").load(0).requests
    for before, request in zip(plain, judged, strict=False):
        assert (request.target, request.target_old) == ("yes", "no")
        assert f"{before.target}. Is this right" in request.prompt
        assert all(probe.answer == "no" for probe in request.neighbours)
        assert all(f" {before.target}. Is" in probe.prompt for probe in request.neighbours)


def test_the_generated_form_is_the_request_with_fewer_questions() -> None:
    plain, same = FACTS.load(0).requests, forms("generation", limit=None).load(0).requests
    assert len(same) == 24
    for before, request in zip(plain, same, strict=True):
        assert (request.prompt, request.target) == (before.prompt, before.target)
        assert not request.portability and not request.generation_prompts


def test_other_sources_and_what_is_refused() -> None:
    world = WorldDataset(name="world", world_seed=0, facts=None, order="file", limit=20)
    assert len(forms("choice", source=world, limit=None).load(0).requests) == 20
    few = replace(world, limit=2)
    with pytest.raises(ConfigError, match=r"dataset\.source: too few different targets"):
        forms("choice", source=few).load(0)
