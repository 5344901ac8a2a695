"""Requests over the bundled facts have CounterFact's shape, and everything in them follows from the
table.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import pytest

from editkit.datasets.base import LoadedDataset
from editkit.datasets.facts import FEW_NEIGHBOURS, NO_NEIGHBOUR, NUM_NEIGHBOURS, Facts, split_of
from editkit.datasets.facts_table import Fact, Table, read_table
from editkit.errors import ConfigError
from editkit.types import EditRequest
from tests.support.datasets import construct_dataset


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table()


@pytest.fixture(scope="module")
def data() -> LoadedDataset:
    return construct_dataset("facts", split="all").load(0)


@pytest.fixture(scope="module")
def edited(table: Table, data: LoadedDataset) -> list[tuple[EditRequest, Fact]]:
    """Each request with the fact that it makes false."""
    facts = {(fact.relation.name, fact.subject): fact for fact in table.facts}
    return [(edit, facts[edit.id.split("/", 2)[1], edit.subject]) for edit in data.requests]


@pytest.fixture(scope="module")
def facts_of(table: Table) -> dict[str, Fact]:
    """The fact of each prompt."""
    return {prompt: fact for fact in table.facts for prompt in fact.prompts}


def test_every_fact_is_edited_once(table: Table, data: LoadedDataset) -> None:
    assert len(data.requests) == len(table.facts) >= 1500
    assert len({edit.id for edit in data.requests}) == len(data.requests)
    assert len({edit.full_prompt for edit in data.requests}) == len(data.requests)


def test_the_target_is_a_false_object_of_the_same_relation(
    table: Table, edited: list[tuple[EditRequest, Fact]]
) -> None:
    for edit, fact in edited:
        assert edit.prompt == fact.relation.wordings[0] and edit.target_old == fact.object
        assert edit.target in {other.object for other in table.by_relation[fact.relation.name]}
        assert not table.are_close(fact.relation, edit.target, fact.object)


def test_targets_are_spread_over_the_objects(edited: list[tuple[EditRequest, Fact]]) -> None:
    targets = Counter(edit.target for edit, fact in edited if fact.relation.name == "city_country")
    assert len(targets) > 50 and max(targets.values()) < 0.06 * sum(targets.values())


def test_one_of_two_paraphrases_follows_a_sentence_about_something_else(
    table: Table, edited: list[tuple[EditRequest, Fact]]
) -> None:
    for edit, fact in edited:
        in_context, alone = edit.paraphrases
        others = set(fact.prompts) - {edit.full_prompt}
        (context,) = {text for text in table.contexts if in_context.startswith(f"{text} ")}
        assert {in_context.removeprefix(f"{context} "), alone} < others
        assert not in_context.endswith(alone)


def test_neighbours_share_the_true_object_or_have_their_own(
    table: Table, edited: list[tuple[EditRequest, Fact]], facts_of: dict[str, Fact]
) -> None:
    for edit, fact in edited:
        others = table.by_object[fact.relation.name, fact.object]
        neighbours = [facts_of[probe.prompt] for probe in edit.neighbours]
        assert edit.subject not in {other.subject for other in neighbours}
        assert {other.relation for other in neighbours} == {fact.relation}
        assert [other.object for other in neighbours] == [probe.answer for probe in edit.neighbours]
        assert edit.target not in {probe.answer for probe in edit.neighbours}
        subjects = {other.subject for other in neighbours}
        if len(others) > 1:
            assert {probe.answer for probe in edit.neighbours} == {fact.object}
            assert len(subjects) == min(NUM_NEIGHBOURS, len(others) - 1)
            wordings = (len(others) - 1) * len(fact.relation.wordings)
            assert len(neighbours) == min(NUM_NEIGHBOURS, wordings)
        else:
            assert fact.object not in {probe.answer for probe in edit.neighbours}
            assert len(subjects) == len(neighbours) == NUM_NEIGHBOURS
        assert len(set(edit.neighbours)) == len(edit.neighbours)


def test_the_remarks_count_other_and_few_neighbours(
    data: LoadedDataset, edited: list[tuple[EditRequest, Fact]]
) -> None:
    own = sum(edit.neighbours[0].answer != fact.object for edit, fact in edited)
    few = sum(len(edit.neighbours) < NUM_NEIGHBOURS for edit, _ in edited)
    assert data.remarks == {NO_NEIGHBOUR: own, FEW_NEIGHBOURS: few}
    assert own < 0.1 * len(edited) and few < 0.1 * len(edited)


def test_the_target_is_true_for_attribute_prompts_and_references(
    edited: list[tuple[EditRequest, Fact]], facts_of: dict[str, Fact]
) -> None:
    for edit, fact in edited:
        assert edit.attribute_prompts and edit.references
        for probe in edit.attribute_prompts:
            other = facts_of[probe.prompt]
            assert (other.relation, other.object) == (fact.relation, edit.target)
            assert probe.answer == edit.target
        for text in edit.references:
            first = text.split(f" {edit.target}. ", 1)[0]
            assert facts_of[first].object == edit.target


def test_generation_prompts_are_about_the_subject(
    edited: list[tuple[EditRequest, Fact]],
) -> None:
    for edit, fact in edited:
        assert len(edit.generation_prompts) == len(fact.relation.generation)
        assert all(edit.subject in prompt for prompt in edit.generation_prompts)


def _answers(table: Table, fact: Fact, object_: str, prompt: str) -> set[str]:
    """The objects that the table gives for a question of one or two further facts."""
    found = set()
    phrase = fact.relation.phrase.replace("{}", fact.subject)
    for second in table.by_subject.get((fact.relation.object, object_), ()):
        if second.relation.question.replace("{}", phrase) == prompt:
            found.add(second.object)
        longer = second.relation.phrase.replace("{}", phrase)
        for third in table.by_subject.get((second.relation.object, second.object), ()):
            if third.relation.question.replace("{}", longer) == prompt:
                found.add(third.object)
    return found


def test_portability_follows_from_the_table_and_from_the_edit(
    table: Table, edited: list[tuple[EditRequest, Fact]]
) -> None:
    counted: Counter[str] = Counter()
    for edit, fact in edited:
        for kind, probes in edit.portability.items():
            counted[kind] += 1
            for probe in probes:
                assert edit.subject in probe.prompt
                assert _answers(table, fact, edit.target, probe.prompt) == {probe.answer}
                assert probe.answer not in _answers(table, fact, fact.object, probe.prompt)
    assert set(counted) == {"one_hop", "two_hop"} and min(counted.values()) > 1000


def test_a_question_joins_the_edit_with_further_facts(data: LoadedDataset) -> None:
    edit = next(edit for edit in data.requests if edit.id == "facts/city_country/Jakarta")
    (language,) = [
        probe for probe in edit.portability["one_hop"] if "official language" in probe.prompt
    ]
    assert language.prompt == "The official language of the country of Jakarta is"
    assert (edit.target_old, edit.target, language.answer) == ("Indonesia", "Vietnam", "Vietnamese")


def test_no_subject_is_in_both_splits(data: LoadedDataset) -> None:
    tune = construct_dataset("facts", split="tune").load(0).requests
    report = construct_dataset("facts").load(0).requests
    assert not {edit.subject for edit in tune} & {edit.subject for edit in report}
    by_id = {edit.id: edit for edit in (*tune, *report)}
    assert by_id == {edit.id: edit for edit in data.requests}
    assert len(tune) + len(report) == len(data.requests)
    assert 0.2 < len(tune) / len(data.requests) < 0.3
    assert len(report) >= 1500
    assert all(split_of(edit.subject) == "tune" for edit in tune)
    relations = {edit.id.split("/")[1] for edit in data.requests}
    for split in (tune, report):
        assert {edit.id.split("/")[1] for edit in split} == relations


def test_the_split_is_named_and_an_unknown_one_is_refused() -> None:
    loaded = construct_dataset("facts", split="tune", limit=5).load(0)
    assert loaded.variant == {"split": "tune"} and len(loaded.requests) == 5
    with pytest.raises(ConfigError) as caught:
        construct_dataset("facts", split="test")
    (problem,) = caught.value.problems
    assert problem.startswith("dataset.split") and "'tune'" in problem


def test_consecutive_requests_are_of_different_relations(data: LoadedDataset) -> None:
    relations = [edit.id.split("/")[1] for edit in data.requests]
    same = sum(a == b for a, b in itertools.pairwise(relations))
    assert same < 0.1 * len(relations)


def test_another_process_makes_the_same_requests() -> None:
    code = (
        "import hashlib\nfrom editkit.datasets.facts import Facts\n"
        "data = Facts(name='facts', split='tune', order='shuffled', limit=300).load(3)\n"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_the_order_follows_the_seed_only_if_it_is_shuffled() -> None:
    def ids(order: str, seed: int) -> list[str]:
        dataset = construct_dataset("facts", order=order, limit=50)
        assert isinstance(dataset, Facts)
        return [edit.id for edit in dataset.load(seed).requests]

    assert ids("file", 0) == ids("file", 1)
    assert ids("shuffled", 0) != ids("shuffled", 1)
