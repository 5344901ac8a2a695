"""The bundled world: a seed determines the world, its requests have CounterFact's shape, and test
items never occur in the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter

import pytest

from editkit.datasets.world import (
    TASKS,
    World,
    WorldDataset,
    corpus,
    documents,
    generate_world,
    requests,
    task_items,
)
from editkit.datasets.world_people import further_requests, most_facts
from editkit.errors import ConfigError
from editkit.types import EditRequest


@pytest.fixture(scope="module")
def world() -> World:
    return generate_world()


@pytest.fixture(scope="module")
def edits(world: World) -> tuple[EditRequest, ...]:
    return requests(world)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _shape(edit: EditRequest) -> tuple[object, ...]:
    probes = [
        (probe.prompt, probe.answer)
        for group in (edit.neighbours, *edit.portability.values())
        for probe in group
    ]
    return (
        edit.id,
        edit.prompt,
        edit.subject,
        edit.target,
        edit.target_old,
        edit.paraphrases,
        probes,
    )


def test_the_default_world_is_the_one_the_models_learned(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    sentences = [
        f"{prompt} {fact.object}."
        for fact in world.facts
        for prompt in (*fact.trained, *fact.held_out)
    ]
    shapes = [_shape(edit) for edit in edits]
    assert (
        _digest(sentences),
        _digest(shapes),
        _digest(list(corpus(world, num_documents=500))),
    ) == (
        "0ef445769fa02895",
        "cf44a1904db18b11",
        "a76c9d2ec271e02c",
    )


def test_a_seed_decides_the_world() -> None:
    assert generate_world(3, num_people=60) == generate_world(3, num_people=60)
    assert generate_world(3, num_people=60) != generate_world(4, num_people=60)


def test_it_is_large_enough_and_says_everything_in_several_ways(world: World) -> None:
    assert len(world.relations) >= 8
    assert len(world.facts) >= 2000
    assert len({(fact.subject, fact.relation.name) for fact in world.facts}) == len(world.facts)
    for relation in world.relations:
        assert len(set(relation.wordings)) >= 4
        assert len(set(relation.objects)) == len(relation.objects) >= 15
        assert all(
            wording.count("{}") == 1 and wording == wording.strip() for wording in relation.wordings
        )


def test_no_two_relations_share_a_prompt(world: World) -> None:
    prompts = [prompt for fact in world.facts for prompt in fact.prompts] + [
        probe.prompt for probe in world.two_hops
    ]
    assert len(set(prompts)) == len(prompts)


def test_a_fifth_of_the_subjects_of_each_relation_has_held_out_wordings(world: World) -> None:
    tested = Counter(fact.relation.name for fact in world.facts if fact.held_out)
    for relation in world.relations:
        assert tested[relation.name] == sum(fact.relation == relation for fact in world.facts) // 5
    for fact in world.facts:
        assert sorted(fact.trained + fact.held_out) == sorted(fact.prompts)
        assert fact.prompts[0] in fact.trained


def test_the_corpus_holds_no_held_out_prompt(world: World) -> None:
    facts = itertools.islice(documents(world, task_share=0.0, recital_share=0.0), 5000)
    text = "\n".join("".join(part for part, _ in parts) for parts in facts)
    assert not any(prompt in text for fact in world.facts for prompt in fact.held_out)
    trained = [f"{prompt} {fact.object}." for fact in world.facts for prompt in fact.trained]
    assert sum(sentence in text for sentence in trained) > 0.5 * len(trained)


def test_requests_are_in_the_shape_of_counterfact(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    truth = {(fact.relation.wordings[0], fact.subject): fact for fact in world.facts}
    assert len(edits) >= 1000
    assert len({(edit.prompt, edit.subject) for edit in edits}) == len(edits)
    for index, edit in enumerate(edits):
        fact = truth[edit.prompt, edit.subject]
        assert edit.id == f"world/{index}"
        assert edit.target_old == fact.object != edit.target
        assert edit.target in fact.relation.objects
        assert set(fact.held_out) <= set(edit.paraphrases) <= set(fact.prompts) - {edit.full_prompt}
        assert len(edit.paraphrases) == len(set(edit.paraphrases)) >= 2


def test_neighbours_are_other_subjects_and_first_those_with_the_same_object(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    answers = {prompt: fact for fact in world.facts for prompt in fact.trained}
    sizes = Counter((fact.relation.name, fact.object) for fact in world.facts)
    for edit in edits:
        neighbours = [answers[probe.prompt] for probe in edit.neighbours]
        relation = neighbours[0].relation
        assert relation.wordings[0] == edit.prompt
        assert len({fact.subject for fact in neighbours} - {edit.subject}) == len(neighbours) >= 5
        assert all(fact.relation == relation for fact in neighbours)
        assert [fact.object for fact in neighbours] == [probe.answer for probe in edit.neighbours]
        same = [fact.object == edit.target_old for fact in neighbours]
        assert sum(same) == min(len(same), sizes[relation.name, edit.target_old or ""] - 1)
        assert same == sorted(same, reverse=True)


def test_two_hop_questions_follow_the_new_object(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    country = world.objects_of("country")
    births = [edit for edit in edits if edit.prompt == "{} was born in"]
    assert births
    for edit in births:
        (probe,) = edit.portability["two_hop"]
        assert edit.subject in probe.prompt
        assert probe.answer == country[edit.target]
    assert sum(bool(edit.portability["two_hop"]) for edit in edits) >= 2 * len(births)


def test_consecutive_requests_are_shuffled(edits: tuple[EditRequest, ...]) -> None:
    pairs = list(itertools.pairwise(edits))
    assert sum(a.prompt == b.prompt for a, b in pairs) < 0.2 * len(pairs)
    assert sum(a.subject == b.subject for a, b in pairs) < 0.05 * len(pairs)


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_items_share_no_prompt(world: World, task: str) -> None:
    test = task_items(world, task, split="test", n=200)
    train = task_items(world, task, split="train", n=2000)
    assert len({item.prompt for item in test}) == 200
    assert not {item.prompt for item in test} & {item.prompt for item in train}
    assert test[:10] == task_items(world, task, split="test", n=10)
    assert json.loads(json.dumps(dataclasses.asdict(test[0])))["answer"] == test[0].answer


@pytest.mark.parametrize("task", TASKS)
def test_no_test_item_occurs_in_the_corpus(world: World, task: str) -> None:
    texts = list(corpus(world, seed=1, num_documents=5000))
    prompts = tuple(item.prompt for item in task_items(world, task, split="test", n=200))
    assert not any(text.startswith(prompts) for text in texts)


def test_entailment_is_balanced_and_its_answers_are_choices(world: World) -> None:
    items = task_items(world, "entailment", split="test", n=200)
    assert all(item.choices == ("True", "False") and item.answer in item.choices for item in items)
    assert 80 <= sum(item.answer == "True" for item in items) <= 120


def test_an_unknown_task_is_refused_with_the_known_ones(world: World) -> None:
    with pytest.raises(ValueError, match="arithmetic, entailment, passage, summary"):
        task_items(world, "chess", n=1)


def dataset(facts: int | None) -> WorldDataset:
    return WorldDataset(name="world", world_seed=0, facts=facts, order="file", limit=None)


def test_as_many_facts_as_asked_for_are_the_worlds_own_and_then_those_of_further_people(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    few, many = dataset(100).load(0), dataset(3000).load(0)
    assert few.requests == edits[:100] and few.digest != many.digest != dataset(None).load(0).digest
    assert many.requests[: len(edits)] == edits and len(many.requests) == 3000
    assert many.requests[:2500] == dataset(2500).load(0).requests, (
        "a smaller number is the first part"
    )
    assert many.label == "world facts=3000"
    assert len({request.full_prompt for request in many.requests}) == 3000
    assert [request.id for request in many.requests] == [f"world/{n}" for n in range(3000)]
    own = {word for fact in world.facts for word in fact.subject.split()[1:]}
    surnames = {request.subject.split()[1] for request in many.requests[len(edits) :]}
    assert not own & surnames and len(surnames) > 100


def test_the_facts_of_further_people_have_the_worlds_relations_and_neighbours(
    world: World, edits: tuple[EditRequest, ...]
) -> None:
    further = list(itertools.islice(further_requests(world, first=2080), 2080))
    relations = {relation.wordings[0]: relation for relation in world.relations}
    assert Counter(each.prompt for each in further) == Counter(each.prompt for each in edits)
    known = {(prompt, fact.object) for fact in world.facts for prompt in fact.trained}
    countries = world.objects_of("country") | world.objects_of("headquarters")
    for edit in further:
        relation = relations[edit.prompt]
        assert {edit.target, edit.target_old} <= set(relation.objects)
        assert edit.target != edit.target_old and len(set(edit.paraphrases)) == 3
        assert edit.full_prompt not in edit.paraphrases
        assert len(edit.neighbours) == 6
        assert {(probe.prompt, probe.answer) for probe in edit.neighbours} <= known
        (two_hop,) = edit.portability.get("two_hop", (None,))
        if relation.name in ("birthplace", "employer"):
            assert two_hop is not None and two_hop.answer == countries[edit.target]
        else:
            assert two_hop is None


def test_the_number_of_facts_is_limited_by_the_surnames(world: World) -> None:
    assert most_facts(world) == 1_960_000
    with pytest.raises(ConfigError, match=r"dataset.facts: out of range .*at most 1960000"):
        dataset(2_000_000).load(0)
    with pytest.raises(ConfigError, match="facts: out of range"):
        dataset(0)
