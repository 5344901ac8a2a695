"""The suite `small`: its items are right, fair and never examples, and a model is scored on them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from editkit.errors import ConfigError
from editkit.evaluation.harness.catalogue import OPTIONS, own_tasks
from editkit.evaluation.harness.load_tasks import load_tasks
from editkit.evaluation.tasks.data import BUNDLED, read
from tests.support.helpers import tiny_model
from tests.support.suites import measured, rows_of_samples, suite

TASKS = {
    name.removeprefix("small_"): task
    for name, task in own_tasks().items()
    if name.startswith("small_")
}
CHOICES = [name for name, task in TASKS.items() if task["output_type"] == "multiple_choice"]


def items(name: str) -> list[dict[str, Any]]:
    return read(**TASKS[name][OPTIONS])["test"]


def examples(name: str) -> list[dict[str, Any]]:
    return TASKS[name].get("fewshot_config", {"samples": []})["samples"]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    """What the model reads of each row, in any order of its choices."""
    hidden = ("choices", "answer")
    return [
        json.dumps({key: value for key, value in row.items() if key not in hidden}) for row in rows
    ]


def test_every_file_of_items_belongs_to_a_task() -> None:
    assert {path.stem for path in BUNDLED.glob("*.jsonl")} == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_hundred_different_items_apart_from_its_examples(name: str) -> None:
    asked = texts(items(name))
    assert len(asked) >= 100
    assert len(set(asked)) == len(asked)
    assert not set(asked) & set(texts(examples(name)))


@pytest.mark.parametrize("name", CHOICES)
def test_an_answer_is_one_of_different_choices_and_no_place_is_right_more_often(name: str) -> None:
    rows = items(name)
    count = len(rows[0]["choices"])
    for row in [*rows, *examples(name)]:
        assert row["answer"] in row["choices"]
        assert len(set(row["choices"])) == len(row["choices"]) == count
    for chosen in (rows, rows[: len(rows) // 2]):  # also under suite.limit
        places = Counter(row["choices"].index(row["answer"]) for row in chosen)
        assert max(places.values()) - min(places.values()) <= 0.1 * len(chosen), places


def test_the_labels_of_sentiments_alternate() -> None:
    answers = [row["answer"] for row in items("sentiment")]
    assert answers == ["positive", "negative"] * (len(answers) // 2)


def test_sums_are_right_and_no_sum_is_frequent() -> None:
    rows = items("addition")
    for row in [*rows, *examples("addition")]:
        assert row["answer"] == str(row["first"] + row["second"])
    assert max(Counter(row["answer"] for row in rows).values()) <= 0.15 * len(rows)


def test_the_larger_number_is_asked_for_and_each_pair_comes_in_both_orders() -> None:
    rows = items("comparison")
    for row in [*rows, *examples("comparison")]:
        assert row["answer"] == str(max(row["first"], row["second"]))
        assert row["choices"] == [str(row["first"]), str(row["second"])]
    pairs = {(row["first"], row["second"]) for row in rows}
    assert pairs == {(second, first) for first, second in pairs}


@pytest.mark.parametrize("name", ["cloze", "facts"])
def test_a_sentence_does_not_contain_its_answer(name: str) -> None:
    for row in items(name):
        assert row["answer"] not in row["prompt"].split()


def test_every_fact_is_wrong_as_often_as_the_others() -> None:
    """So that no ending is chosen for being frequent."""
    rows = items("facts")
    right = Counter(row["answer"] for row in rows)
    wrong = Counter(choice for row in rows for choice in row["choices"] if choice != row["answer"])
    assert all(wrong[answer] == 3 * count for answer, count in right.items())


def test_a_small_model_is_scored_on_every_task() -> None:
    names = [f"small_{name}" for name in TASKS]
    model = tiny_model("llama")
    prepared = suite(*names, name="small", limit=2).prepare(model)
    found = prepared.evaluate(model, (), {})
    values = measured(found)
    assert {each.task for each in values} == TASKS.keys()
    for each in values:
        assert each.value is not None and 0 <= each.value <= 1
        assert (each.n, each.suite, each.nonfinite) == (2, "small", 0)
        assert each.shots == len(examples(str(each.task)))
    assert len(rows_of_samples(found, 0)) == 2


def test_prompts_begin_with_the_examples_in_order() -> None:
    model = tiny_model("llama")
    prepared = suite("small_addition", name="small", limit=2).prepare(model)
    (task,) = prepared.prepared["small_addition"]
    sums = "3 + 5 = 8\n10 + 7 = 17\n9 + 6 = 15\n2 + 11 = 13\n"
    asked = [f"{row['first']} + {row['second']} =" for row in items("addition")[:2]]
    assert [requests[0].args[0] for requests in task.items.values()] == [
        sums + ask for ask in asked
    ]


def test_more_examples_than_a_task_lists_are_refused() -> None:
    problem = (
        "suite.shots.small_addition: the task lists fewer examples (got 5; expected at most 4)"
    )
    chosen = suite("small_addition", "small_facts", shots={"small_addition": 5, "small_facts": 1})
    with pytest.raises(ConfigError) as caught:
        chosen.check()
    assert caught.value.problems == (
        f"{problem}.",
        "suite.shots.small_facts: the task has no examples apart from the tested records (got 1; expected 0).",
    )
    with pytest.raises(ConfigError, match="lists fewer examples"):
        load_tasks(["small_addition"], data=None, shots={"small_addition": 5}, seed=0)
    suite("small_addition", shots={"small_addition": 2}).check()
