"""The world's tasks: greedy answers up to the newline, and metrics of known answers."""

from __future__ import annotations

import math

import pytest
import torch

from editkit.datasets.world import TaskItem, generate_world, task_items
from editkit.errors import ConfigError
from editkit.evaluation.tasks import (
    ROOM,
    Task,
    WorldTasks,
    exact_match,
    generate_answers,
    is_solved,
    measure_generations,
    measure_likelihood,
    normalise,
    rouge,
)
from editkit.model.tokens import encode_with_target
from tests.bigram import Bigram
from tests.helpers import KINDS, Kind, tiny_model

METRICS: dict[Task, tuple[str, ...]] = {
    "arithmetic": ("solve_rate",),
    "entailment": ("accuracy",),
    "passage": ("exact_match",),
    "summary": ("rougeL", "rouge"),
}
ITEMS = [
    TaskItem(id=f"x/{index}", prompt=f"What does {name} play?", answer="The guitar") for index, name in enumerate(("Shakira", "Léon", "O"))
]


def items_of(task: Task, count: int = 4) -> tuple[TaskItem, ...]:
    return task_items(generate_world(0), task, n=count)


def choice(answer: str, prompt: str = "It is") -> TaskItem:
    return TaskItem(id=prompt, prompt=prompt, answer=answer, choices=("French", "Paris"))


@pytest.mark.parametrize("task", METRICS)
def test_the_references_score_one_and_other_texts_less(task: Task) -> None:
    items = items_of(task)
    references = [item.answer for item in items]
    right = measure_generations(task, items, references)
    assert [(found.metric, found.value, found.stderr, found.n) for found in right] == [(metric, 1.0, 0.0, 4) for metric in METRICS[task]]
    assert {(found.kind, found.suite, found.task, found.task_version) for found in right} == {("downstream", "world", task, 1)}
    assert all(found.value == 0.0 for found in measure_generations(task, items, [""] * 4))
    half = measure_generations(task, items, [*references[:2], "", ""])
    assert all(found.value == 0.5 and found.stderr == pytest.approx(math.sqrt(1 / 3) / 2) for found in half)


@pytest.mark.parametrize(
    ("generation", "answer", "match"),
    [
        (" The Garden.", "garden", 1),
        ("an  old mill", "Old Mill", 1),
        ("garden gate", "garden", 0),
        ("", "garden", 0),
        ("theatre", "atre", 0),
    ],
)
def test_exact_match_ignores_case_punctuation_articles_and_blanks(generation: str, answer: str, match: int) -> None:
    assert exact_match(generation, answer) == match


def test_normalisation_keeps_words_whole() -> None:
    assert normalise("A man, a plan: the canal!") == "man plan canal"


@pytest.mark.parametrize(("generation", "solved"), [(" 12", 1), ("12.", 1), ("-12", 0), ("12 apples", 0), ("112", 0), ("", 0)])
def test_a_story_is_solved_by_its_number_alone(generation: str, solved: int) -> None:
    assert is_solved(generation, "12") == solved


def test_rouge_is_the_f_measure() -> None:
    found = rouge("the cat sat", "the cat ran off")
    rouge_1 = rouge_l = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    rouge_2 = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    assert found == {"rougeL": pytest.approx(rouge_l), "rouge": pytest.approx((rouge_1 + rouge_2 + rouge_l) / 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_generations_are_those_of_plain_greedy_decoding_of_one_prompt_each(kind: Kind) -> None:
    model = tiny_model(kind)
    cap = max(len(encode_with_target(model.tokenizer, item.prompt, item.answer).target_ids) for item in ITEMS) + ROOM
    expected = []
    for item in ITEMS:
        ids = model.tokenizer(item.prompt, return_tensors="pt").input_ids
        for _ in range(cap):
            with torch.no_grad():
                following = int(model.network(input_ids=ids).logits[0, -1].argmax())
            if following == model.tokenizer.eos_token_id:
                break
            ids = torch.cat((ids, torch.tensor([[following]])), dim=1)
        new = ids[0, len(model.tokenizer(item.prompt).input_ids) :].tolist()
        text = model.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected.append(text.partition("\n")[0])
    assert any(expected)
    assert generate_answers(model, ITEMS, tokens_per_batch=4096) == expected
    assert generate_answers(model, ITEMS, tokens_per_batch=1) == expected


def test_the_more_probable_choice_is_taken() -> None:
    model = Bigram(bos=True)
    items = [choice("French"), choice("Paris"), choice("Paris", prompt="capital of"), choice("Paris", prompt="and in")]
    model.say("It is", "French", 0.6)
    model.say("capital of", "Paris", 0.6)
    model.logits_VV[encode_with_target(model.tokenizer, "and in", "Paris").ids[-2]] = torch.nan
    found = measure_likelihood(model, "entailment", items, tokens_per_batch=64)  # type: ignore[arg-type]
    assert (found.metric, found.value, found.n, found.nonfinite) == ("accuracy_likelihood", 0.5, 4, 1)


def test_every_metric_of_every_task_comes_with_n_and_stderr_whatever_the_model() -> None:
    evaluator = WorldTasks(tasks=("entailment", "arithmetic"), limit=3, world_seed=0, tokens_per_batch=512)
    model = tiny_model("llama")
    assert evaluator.baseline(model, ()) == {}
    found = evaluator.evaluate(model, (), {})
    assert [(measured.task, measured.metric, measured.n) for measured in found] == [
        ("entailment", "accuracy", 3),
        ("entailment", "accuracy_likelihood", 3),
        ("arithmetic", "solve_rate", 3),
    ]
    assert all(measured.value is not None and 0 <= measured.value <= 1 and measured.stderr is not None for measured in found)


def test_no_tasks_measure_nothing_and_a_limit_below_one_is_an_error() -> None:
    assert WorldTasks(tasks=(), limit=1, world_seed=0, tokens_per_batch=1).evaluate(tiny_model(), (), {}) == []
    with pytest.raises(ConfigError, match=r"suite\.limit: 0"):
        WorldTasks(tasks=(), limit=0, world_seed=0, tokens_per_batch=1)
