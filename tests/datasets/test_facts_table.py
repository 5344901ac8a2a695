"""The bundled table of real-world facts is consistent in itself."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from editkit.datasets.facts_table import Table, read_table
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table()


def test_it_is_large_and_says_everything_in_several_ways(table: Table) -> None:
    assert len(table.facts) >= 5000
    assert len(table.relations) >= 40
    for relation in table.relations.values():
        assert len(relation.wordings) == len(set(relation.wordings)) >= 5
        assert len(relation.generation) == len(set(relation.generation)) >= 3
        assert len(table.by_relation[relation.name]) >= 25


def test_no_subject_has_two_objects_of_one_relation(table: Table) -> None:
    counted = Counter((fact.relation.name, fact.subject) for fact in table.facts)
    assert [key for key, number in counted.items() if number > 1] == []


def test_names_are_clean(table: Table) -> None:
    for fact in table.facts:
        for name in (fact.subject, fact.object):
            assert name and name == name.strip() and not re.search(r"[{}\t\n]|  ", name), name


def test_templates_hold_one_slot_and_end_before_the_object(table: Table) -> None:
    for relation in table.relations.values():
        templates = (
            *(*relation.wordings, *relation.generation),
            *(relation.phrase, relation.question),
        )
        for template in templates:
            assert template.count("{}") == 1 and template == template.strip(), template


def test_no_prompt_gives_its_answer_away(table: Table) -> None:
    for fact in table.facts:
        if fact.relation.name == "chemical_symbol":  # every O is in "hydrogen"
            continue
        assert fact.object.lower() not in fact.subject.lower()
        for prompt in fact.prompts:
            assert not re.search(rf"(?<!\w){re.escape(fact.object)}(?!\w)", prompt), prompt


def test_prompts_begin_with_a_capital_letter(table: Table) -> None:
    assert [prompt for fact in table.facts for prompt in fact.prompts if prompt[0].islower()] == []


def test_no_two_facts_share_a_prompt(table: Table) -> None:
    counted = Counter(prompt for fact in table.facts for prompt in fact.prompts)
    assert [prompt for prompt, number in counted.items() if number > 1] == []


def test_the_groups_of_close_objects_and_the_aliases_name_objects(table: Table) -> None:
    for relation in table.relations.values():
        objects = {fact.object for fact in table.by_relation[relation.name]}
        for group in relation.close:
            assert group <= objects and len(group) > 1, (relation.name, group - objects)
        # A false target remains for every object.
        for one in objects:
            assert any(not table.are_close(relation, one, other) for other in objects)
    objects = {fact.object for fact in table.facts}
    assert set(table.aliases) <= objects
    assert all(name not in names for name, names in table.aliases.items())


def test_close_objects_are_recognised_in_both_directions(table: Table) -> None:
    sport, country = table.relations["sport"], table.relations["city_country"]
    assert table.are_close(sport, "soccer", "football")
    assert table.are_close(sport, "football", "soccer")
    assert not table.are_close(sport, "tennis", "football")
    assert table.are_close(country, "Turkey", "Türkiye")
    assert table.are_close(country, "Türkiye", "Turkey")
    assert table.are_close(country, "France", "France")


def test_context_sentences_state_no_fact_of_the_table(table: Table) -> None:
    names = {name for fact in table.facts for name in (fact.subject, fact.object)}
    assert len(set(table.contexts)) == len(table.contexts) >= 30
    for context in table.contexts:
        assert context.endswith(".") and "{" not in context
        words = re.findall(r"[\w'-]+", context)
        spans = {
            " ".join(words[start:end])
            for start in range(len(words))
            for end in range(start + 1, min(start + 6, len(words)) + 1)
        }
        assert not spans & names, context


def test_a_name_means_one_thing_where_questions_join_two_facts(table: Table) -> None:
    """A city that is in two countries or states by name would join facts about two cities."""
    places: dict[str, set[str]] = {}
    for fact in (*table.by_relation["city_country"], *table.by_relation["us_city_state"]):
        country = fact.object if fact.relation.name == "city_country" else "the United States"
        places.setdefault(fact.subject, set()).add(country)
    capitals = table.by_relation["us_state_capital"]
    for fact in capitals:
        places.setdefault(fact.object, set()).add("the United States")
    for fact in table.by_relation["capital"]:
        places.setdefault(fact.object, set()).add(fact.subject)
    assert {city: where for city, where in places.items() if len(where) > 1} == {}


def test_facts_about_the_same_thing_agree(table: Table) -> None:
    """Who was born in a city comes from its country, and so does a company with its headquarters
    there; a capital is a city of its country.
    """
    objects = {(fact.relation.name, fact.subject): fact.object for fact in table.facts}
    pairs = (("birthplace", "home_country"), ("headquarters", "company_country"))
    compared = 0
    for first, second in pairs:
        for fact in table.by_relation[first]:
            there = objects.get(("city_country", fact.object))
            if ("us_city_state", fact.object) in objects:
                there = "the United States"
            home = objects.get((second, fact.subject))
            if there is not None and home is not None:
                compared += 1
                assert home in (there, {"the United Kingdom": "England"}.get(there)), fact
    for fact in table.by_relation["capital"]:
        assert objects.get(("city_country", fact.object), fact.subject) == fact.subject
    for fact in table.by_relation["us_state_capital"]:
        assert objects.get(("us_city_state", fact.object), fact.subject) == fact.subject
    assert compared > 80


def test_the_card_and_the_guide_name_the_numbers_of_the_table(table: Table) -> None:
    wanted = f"{len(table.facts):,} real-world facts of {len(table.relations)} relations"
    sizes = [len(facts) for facts in table.by_relation.values()]
    card = (ROOT / "editkit/assets/facts/README.md").read_text()
    assert f"{len(table.facts):,} facts of {len(table.relations)} relations" in card
    assert f"{len(table.relations)}, with {min(sizes)} to {max(sizes)} facts" in card
    assert wanted in (ROOT / "docs/guides/datasets.md").read_text()
