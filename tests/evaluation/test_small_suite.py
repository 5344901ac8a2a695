"""The suite `small`: its items are right, fair and never examples, and a model is scored on them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from editkit.datasets.facts_table import read_table
from editkit.errors import ConfigError
from editkit.evaluation.harness.catalogue import OPTIONS, own_tasks
from editkit.evaluation.harness.load_tasks import load_tasks
from editkit.evaluation.tasks.data import BUNDLED, read
from editkit.evaluation.tasks.scores import rouge_of
from editkit.model.load import ModelConfig
from tests.support.helpers import real_model_id, tiny_model
from tests.support.paths import ROOT
from tests.support.suites import measured, rows_of_samples, suite

TASKS = {
    name.removeprefix("small_"): task
    for name, task in own_tasks().items()
    if name.startswith("small_")
}
CHOICES = [
    name
    for name, task in TASKS.items()
    if task["output_type"] == "multiple_choice" and name != "entailment"
]
# The scores of a guess in percent / 100, as in the card.
CHANCE = {
    "passage": 0.25,
    "entailment": 0.5,
    "sentiment": 0.5,
    "addition": 0.092,
    "comparison": 0.5,
    "facts": 0.25,
    "cloze": 0.25,
    "summary": 0.311,
}
PARAGRAPHS = 24  # of the prose; a paragraph has as many tokens as ten items of another task

# The unedited model's scores in the card, in percent.
CARD = {
    name: float(score)
    for name, score in re.findall(
        r"^\| `small_(\w+)` \|[^|]*\| \d+ \| [\d.-]+ \| ([\d.]+) \| [\d.]+ \|$",
        (BUNDLED / "README.md").read_text(),
        re.MULTILINE,
    )
}


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


def test_no_item_asks_for_a_fact_that_dataset_facts_edits() -> None:
    asked = [(f" {row['prompt'].lower()} ", row["answer"].lower()) for row in items("facts")]
    for fact in read_table().facts:
        subject, object_ = f" {fact.subject.lower()} ", fact.object.lower()
        assert not [prompt for prompt, answer in asked if subject in prompt and answer == object_]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_hundred_different_items_apart_from_its_examples(name: str) -> None:
    asked = texts(items(name))
    assert len(asked) >= (PARAGRAPHS if name == "prose" else 100)
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


@pytest.mark.parametrize("rows", [122, 50])
def test_entailments_are_balanced_however_one_guesses(rows: int) -> None:
    """Each conclusion follows from one premise of its pair, each premise entails one of two
    opposite conclusions, and neither place is right more often.
    """
    chosen = items("entailment")[:rows]
    assert len(chosen) == rows
    assert sum(row["answer"] for row in chosen) * 2 == rows
    pairs: dict[frozenset[str], list[dict[str, Any]]] = {}
    for row in chosen:
        first, second = (premise.rpartition(" So ") for premise in row["premises"])
        assert first[0] != second[0] and first[2] == second[2]
        pairs.setdefault(frozenset(row["premises"]), []).append(row)
    if rows == 122:
        for one, other in pairs.values():
            assert one["conclusion"] != other["conclusion"]
            assert one["premises"][one["answer"]] != other["premises"][other["answer"]]


def test_answers_are_spans_of_their_passages_and_each_span_is_right_once() -> None:
    rows = [*items("passage"), *examples("passage")]
    for row in rows:
        text = row["passage"].lower()
        assert all(choice.lower() in text for choice in row["choices"]), row
    asked = Counter((row["passage"], row["answer"]) for row in items("passage"))
    choices = {(row["passage"], choice) for row in items("passage") for choice in row["choices"]}
    assert asked.keys() == choices and set(asked.values()) == {1}


def test_no_line_and_no_beginning_of_a_dialogue_is_its_summary() -> None:
    """The card's chance: the best of the lead words, any fixed line, the longest line and the
    examples' summaries.
    """
    rows = items("summary")
    length = round(sum(len(row["answer"].split()) for row in rows) / len(rows))
    guesses: dict[str, Any] = {
        "lead": lambda text: " ".join(text.split()[:length]),
        "longest": lambda text: max(text.split("\n"), key=len),
    }
    guesses |= {f"line {n}": lambda text, n=n: text.split("\n")[n] for n in range(5)}
    guesses |= {row["dialogue"]: lambda text, row=row: row["answer"] for row in examples("summary")}
    scores = {
        name: sum(rouge_of(guess(row["dialogue"]), row["answer"])["rougeL"] for row in rows)
        / len(rows)
        for name, guess in guesses.items()
    }
    assert max(scores.values()) == pytest.approx(CHANCE["summary"], abs=5e-4), scores
    for row in [*rows, *examples("summary")]:
        names = {line.partition(":")[0] for line in row["dialogue"].split("\n")}
        assert len(names) == 2
        assert "\n" not in row["answer"] and row["answer"].endswith(".")


def test_the_labels_of_sentiments_alternate() -> None:
    answers = [row["answer"] for row in items("sentiment")]
    assert answers == ["positive", "negative"] * (len(answers) // 2)


def test_sums_are_right_and_no_sum_is_frequent() -> None:
    rows = items("addition")
    for row in [*rows, *examples("addition")]:
        assert row["answer"] == str(row["first"] + row["second"])
    most = max(Counter(row["answer"] for row in rows).values())
    assert most / len(rows) == pytest.approx(CHANCE["addition"], abs=5e-4)


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
    (prose,) = measured(found, "language")
    assert (prose.task, prose.metric, prose.n) == ("prose", "word_perplexity", 2)
    assert prose.value is not None and prose.value > 1
    values = measured(found)
    assert {each.task for each in values} == TASKS.keys() - {"prose"}
    for each in values:
        assert each.value is not None and 0 <= each.value <= 1
        assert (each.n, each.suite, each.nonfinite) == (2, "small", 0)
        assert each.shots == len(examples(str(each.task)))
    assert len(rows_of_samples(found, 0)) == 2


def test_the_card_and_the_guide_have_every_task_20_points_above_chance() -> None:
    assert CARD.keys() == TASKS.keys()
    assert all(CARD[name] >= 100 * chance + 20 for name, chance in CHANCE.items())
    guide = (ROOT / "docs" / "guides" / "suites.md").read_text()
    for name, score in CARD.items():
        assert re.search(rf"^\| {name}\b.*\| {score} \|", guide, re.MULTILINE), name


def test_prompts_begin_with_the_examples_in_order() -> None:
    model = tiny_model("llama")
    prepared = suite("small_addition", name="small", limit=2).prepare(model)
    (task,) = prepared.prepared["small_addition"]
    sums = "3 + 5 = 8\n10 + 7 = 17\n9 + 6 = 15\n2 + 11 = 13\n"
    asked = [f"{row['first']} + {row['second']} =" for row in items("addition")[:2]]
    assert [requests[0].args[0] for requests in task.items.values()] == [
        sums + ask for ask in asked
    ]


@pytest.mark.real
def test_the_real_model_is_far_above_chance_as_the_card_says() -> None:
    model = ModelConfig(id=real_model_id()).load("cpu")
    model.edit([model.family.down_projection(8)])
    names = [f"small_{name}" for name in TASKS]
    prepared = suite(*names, name="small", limit=None, tokens_per_batch=4096).prepare(model)
    found = prepared.evaluate(model, (), {})
    scores = {str(each.task): each.value for each in measured(found) if each.metric != "rouge"}
    assert scores.keys() == CHANCE.keys()
    for name, score in scores.items():
        assert score is not None and score >= CHANCE[name] + 0.2, name
        assert CARD[name] == pytest.approx(100 * score, abs=1.5), name  # a few ties by rounding
    (prose,) = measured(found, "language")
    assert prose.value == pytest.approx(CARD["prose"], rel=0.01)


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
