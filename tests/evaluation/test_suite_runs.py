"""A suite on a model that is edited: the same items every time, asked no more often than needed,
compared with the unedited model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.base import Samples
from editkit.evaluation.harness.lm import harness_model, quiet
from editkit.evaluation.harness.load_tasks import LoadedTasks, load_tasks
from editkit.evaluation.harness.suite import LoadedSuite, Suite
from editkit.evaluation.statistics.paired import compare
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from editkit.types import Measurement
from tests.support.helpers import tiny_model

WORLD = (
    "world_arithmetic",
    "world_entailment",
    "world_entailment_likelihood",
    "world_passage",
    "world_summary",
)


def suite(*tasks: str, **options: Any) -> Suite:
    given: dict[str, Any] = {
        "name": "world",
        "tasks": tasks,
        "shots": None,
        "limit": 3,
        "seed": 1234,
        "data": None,
        "max_new_tokens": None,
        "tokens_per_batch": 512,
        "every": 1,
    }
    return Suite(**given | options)


def edited_model() -> tuple[EditableModel, str]:
    model = tiny_model("llama")
    module = model.family.down_projection(0)
    model.edit([module])
    return model, module


def an_update(model: EditableModel, module: str, size: float = 1.0) -> LowRank:
    rows, columns = model.weight(module).shape
    generator = torch.Generator().manual_seed(0)
    return LowRank(
        size * torch.randn(rows, 1, generator=generator),
        torch.randn(columns, 1, generator=generator),
    )


def measured(found: list[Measurement | Samples], kind: str = "downstream") -> list[Measurement]:
    return [each for each in found if isinstance(each, Measurement) and each.kind == kind]


def test_every_metric_comes_with_suite_task_version_n_and_stderr() -> None:
    model, _ = edited_model()
    found = measured(suite(*WORLD).evaluate(model, (), {}))
    assert [(each.task, each.metric) for each in found] == [
        ("arithmetic", "solve_rate"),
        ("entailment", "accuracy"),
        ("entailment", "accuracy_likelihood"),
        ("passage", "exact_match"),
        ("summary", "rougeL"),
        ("summary", "rouge"),
    ]
    assert {
        (each.suite, each.task_version, each.n, each.nonfinite, each.cut, each.variant)
        for each in found
    } == {("world", 1, 3, 0, None, None)}
    assert all(
        each.value is not None and 0 <= each.value <= 1 and each.stderr is not None
        for each in found
    )


def test_samples_hold_prompt_output_and_score_of_every_item() -> None:
    model, _ = edited_model()
    found = suite(*WORLD).evaluate(model, (), {})
    samples = {each.name: each.rows for each in found if isinstance(each, Samples)}
    assert samples.keys() == {name.replace("world_", "world-") for name in WORLD}
    (passage, *others) = samples["world-passage"]
    assert len(others) == 2
    assert passage.keys() == {"item", "prompt", "target", "output", "exact_match"}
    assert isinstance(passage["output"], str)
    assert [
        continuation for continuation, _, _ in samples["world-entailment_likelihood"][0]["output"]
    ] == [" True", " False"]


def test_the_unedited_model_is_asked_once_and_compared_with_nothing() -> None:
    model, _ = edited_model()
    chosen = suite("world_passage", "world_entailment_likelihood").prepare(model)
    baseline = chosen.baseline(model, ())
    answers = chosen.last
    assert {name: tuple(scores.shape) for name, scores in baseline.items()} == {
        "world_passage|exact_match|none": (3,),
        "world_entailment_likelihood|accuracy_likelihood|none": (3,),
    }
    found = chosen.evaluate(model, (), baseline)
    assert chosen.last is answers is not None
    assert not measured(found, "comparison")


def test_an_edited_model_is_asked_anew_about_the_same_items_and_compared_with_the_frozen_scores() -> (
    None
):
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", "world_summary", limit=20).prepare(model)
    baseline = chosen.baseline(model, ())
    before = chosen.evaluate(model, (), baseline)
    prepared = chosen.prepared
    model.apply(module, an_update(model, module))
    after = chosen.evaluate(model, (), baseline)
    assert chosen.prepared is prepared
    rows = [
        [row["prompt"] for each in found if isinstance(each, Samples) for row in each.rows]
        for found in (before, after)
    ]
    assert rows[0] == rows[1]
    values = {
        each.metric: (each.value, each.stderr, each.n) for each in measured(after, "comparison")
    }
    old, new = ({each.metric: each.value for each in measured(found)} for found in (before, after))
    for metric in ("accuracy_likelihood", "rouge"):
        difference, error, n = values[f"{metric}_difference"]
        assert n == 20
        assert difference == pytest.approx(new[metric] - old[metric])
        assert error is not None
        p_value, _, _ = values[f"{metric}_p_value"]
        assert p_value is not None and 0 < p_value <= 1
    expected = compare(
        baseline["world_entailment_likelihood|accuracy_likelihood|none"].tolist(),
        [row["accuracy_likelihood"] for row in _rows(after, 0)],
    )
    assert values["accuracy_likelihood_difference"][:2] == (expected.difference, expected.stderr)
    assert values["accuracy_likelihood_p_value"][0] == expected.p_value


def _rows(found: list[Measurement | Samples], number: int) -> Any:
    return [each for each in found if isinstance(each, Samples)][number].rows


def test_a_fresh_process_measures_the_same_with_the_stored_baseline() -> None:
    model, module = edited_model()
    first = suite("world_passage", "world_entailment_likelihood")
    baseline = first.baseline(model, ())
    model.apply(module, an_update(model, module))
    assert suite("world_passage", "world_entailment_likelihood").evaluate(
        model, (), baseline
    ) == first.evaluate(model, (), baseline)


def test_a_view_that_restrains_nothing_is_not_asked_again_and_one_that_does_is() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood").prepare(model)
    model.apply(module, an_update(model, module))
    chosen.evaluate(model, (), {})
    answers = chosen.last
    with model.temporarily({}):
        chosen.evaluate(model, (), {})
    assert chosen.last is answers is not None
    with model.temporarily({module: an_update(model, module, size=-0.5)}):
        chosen.evaluate(model, (), {})
    assert chosen.last is not answers


def test_a_likelihood_that_is_not_finite_is_a_failure_and_is_counted() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", limit=8)
    assert any(
        row["target"] == "True" for row in _rows(chosen.evaluate(model, (), {}), 0)
    )  # the first choice: nan would win the argmax
    rows, columns = model.weight(module).shape
    with model.temporarily(
        {module: LowRank(torch.full((rows, 1), math.nan), torch.ones(columns, 1))}
    ):
        (found,) = measured(chosen.evaluate(model, (), {}))
    assert (found.value, found.n, found.nonfinite) == (0.0, 8, 8)


def test_batches_change_no_number() -> None:
    model, _ = edited_model()
    ways = [
        measured(suite(*WORLD, tokens_per_batch=tokens).evaluate(model, (), {}))
        for tokens in (1, 4096)
    ]
    assert ways[0] == ways[1]


def a_task(texts: list[str], **changes: Any) -> Any:
    """A task of the harness's kind: the last word of each text, as lambada asks for it."""
    import datasets
    from lm_eval.tasks import TaskManager

    config = {
        "task": "last_word",
        "custom_dataset": lambda **_: {
            "test": datasets.Dataset.from_list([{"text": text} for text in texts])
        },
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "num_fewshot": 0,
    }
    with quiet():
        (task,) = TaskManager(include_defaults=False).load([config | changes])["tasks"].values()
    return task


def suite_of(pooled: dict[str, bool] | None, *tasks: Any) -> LoadedSuite:
    """A suite of one name that stands for these tasks."""
    options = suite("mine", name="mine", limit=None)
    return LoadedSuite(options, {"mine": LoadedTasks(name="mine", tasks=tasks, pooled=pooled)})


TEXTS = [
    "Paris is in France",
    "Rome is in Italy",
    "Berlin is in Germany",
    "The Eiffel Tower is in Paris",
    "He speaks French",
]


def test_a_perplexity_of_numbers_that_are_not_finite_has_no_value_and_the_items_are_counted() -> (
    None
):
    model, module = edited_model()
    chosen = suite_of(None, a_task(TEXTS))
    baseline = chosen.baseline(model, ())
    rows, columns = model.weight(module).shape
    with model.temporarily(
        {module: LowRank(torch.full((rows, 1), math.nan), torch.ones(columns, 1))}
    ):
        found = chosen.evaluate(model, (), baseline)
    values = {each.metric: each for each in found if isinstance(each, Measurement)}
    assert {metric: (each.value, each.stderr) for metric, each in values.items()} == {
        "perplexity": (None, None),
        "perplexity_difference": (None, None),
        "perplexity_p_value": (None, None),
        "acc": (0.0, 0.0),
        "acc_difference": (0.0, 0.0),  # the tiny model knew none of them
        "acc_p_value": (1.0, None),
    }
    assert all((each.nonfinite, each.n) == (5, 5) for each in values.values())
    assert {row["perplexity"] for row in _rows(found, 0)} == {None}


def test_a_perplexitys_difference_is_one_of_perplexities() -> None:
    model, module = edited_model()
    chosen = suite_of(None, a_task(TEXTS))
    baseline = chosen.baseline(model, ())
    (before, _) = (
        each for each in chosen.evaluate(model, (), baseline) if isinstance(each, Measurement)
    )
    model.apply(module, an_update(model, module))
    values = {
        each.metric: each
        for each in chosen.evaluate(model, (), baseline)
        if isinstance(each, Measurement)
    }
    after, difference, p_value = (
        values[f"perplexity{what}"] for what in ("", "_difference", "_p_value")
    )
    assert (
        before.value is not None
        and after.value is not None
        and before.value != pytest.approx(after.value)
    )
    assert (before.kind, difference.kind, difference.n) == ("language", "comparison", 5)
    assert difference.value == pytest.approx(after.value - before.value)
    assert difference.stderr is not None and difference.stderr > 0
    assert p_value.value is not None and 0 < p_value.value <= 1


def test_a_group_counts_the_items_of_its_tasks_together() -> None:
    model, _ = edited_model()
    (alone,) = measured(suite("world_entailment").evaluate(model, (), {}))
    parts = [
        load_tasks(["world_entailment"], data=None, shots={}, seed=0)["world_entailment"]
        for _ in range(2)
    ]
    both = LoadedTasks(
        name="both", tasks=parts[0].tasks + parts[1].tasks, pooled={"accuracy": True}
    )
    group = LoadedSuite(suite("both"), {"both": both})
    (found,) = measured(group.evaluate(model, (), {}))
    assert (found.task, found.metric, found.n, found.value) == ("both", "accuracy", 6, alone.value)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_groups_tasks_count_by_their_size_or_each_the_same_as_in_the_harness(
    by_size: bool,
) -> None:
    from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr

    model, _ = edited_model()
    tasks = [
        a_task(TEXTS[:2], task="small"),
        a_task([*TEXTS[2:], *(f"{text} Paris" for text in TEXTS)], task="large"),
    ]
    for task in tasks:  # the tiny model is right about nothing: which items it gets is made up
        task.process_results = lambda doc, results: {"acc": float("Paris" in doc["text"])}
    alone = [measured(suite_of(None, task).evaluate(model, (), {}))[0] for task in tasks]
    group = suite_of({"acc": by_size}, *tasks)
    (found,) = measured(group.evaluate(model, (), {}))
    assert [each.n for each in alone] == [2, 8]
    assert found.value == pytest.approx(
        aggregate_subtask_metrics([each.value for each in alone], [2, 8], by_size)
    )
    if not by_size:
        assert found.value == (1 / 2 + 6 / 8) / 2 and found.stderr == pytest.approx(
            unweighted_mean_stderr([each.stderr for each in alone])
        )


def test_a_group_of_equal_tasks_is_compared_task_by_task() -> None:
    model, module = edited_model()
    group = suite_of(
        {"perplexity": False, "acc": False},
        a_task(TEXTS[:2], task="small"),
        a_task(TEXTS[2:], task="large"),
    )
    baseline = group.baseline(model, ())
    before = {
        each.metric: each.value
        for each in group.evaluate(model, (), {})
        if isinstance(each, Measurement)
    }
    model.apply(module, an_update(model, module))
    after = {
        each.metric: each
        for each in group.evaluate(model, (), baseline)
        if isinstance(each, Measurement)
    }
    for metric in ("perplexity", "acc"):
        assert after[f"{metric}_difference"].value == pytest.approx(
            after[metric].value - before[metric]
        )
        assert (after[f"{metric}_difference"].task, after[f"{metric}_difference"].n) == ("mine", 5)


def test_examples_from_the_tested_records_by_a_tasks_own_yaml_are_recorded() -> None:
    model, _ = edited_model()
    task = a_task(TEXTS, num_fewshot=2)
    task.set_fewshot_seed(0)
    found = [
        each
        for each in suite_of(None, task).evaluate(model, (), {})
        if isinstance(each, Measurement)
    ]
    assert {(each.shots, each.variant) for each in found} == {
        (2, "examples are taken from the tested records")
    }
    assert {each.shots for each in measured(suite("world_passage").evaluate(model, (), {}))} == {0}


def test_answers_longer_than_the_model_are_told_with_task_and_item_for_all_tasks_at_once() -> None:
    model = tiny_model("gpt2")
    long = f"Say {'x' * 2000}"
    tasks = a_task([*TEXTS, long], task="one"), a_task([long] * 7, task="many")
    with pytest.raises(ConfigError) as caught:
        suite_of(None, *tasks).baseline(model, ())
    first, *others, last = caught.value.problems
    exceeds = "exceeds the model's context length"
    assert (
        first.startswith(f"suite.tasks: an answer of one, item 5, {exceeds} (got ")
        and "expected at most 128" in first
    )
    assert [problem.split(" (got ")[0] for problem in others] == [
        f"suite.tasks: an answer of many, item {item}, {exceeds}" for item in range(5)
    ]
    assert last == "suite.tasks: 2 more such items of many."


def test_no_tasks_measure_nothing_and_need_nothing() -> None:
    nothing = suite()
    nothing.check()
    model, _ = edited_model()
    assert nothing.baseline(model, ()) == {}
    assert nothing.evaluate(model, (), {}) == []


def test_every_problem_of_the_options_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        suite(
            "world_passage",
            "world_passage",
            limit=0,
            every=0,
            shots={"gsm8k": 5, "world_passage": -1},
        )
    assert caught.value.problems == (
        "limit: out of range (got 0; expected at least 1).",
        "every: out of range (got 0; expected at least 1).",
        "shots: unknown task (got 'gsm8k'; expected one of the tasks: world_passage, "
        "world_passage).",
        "shots.world_passage: out of range (got -1; expected at least 0).",
        "tasks: chosen more than once (got 'world_passage').",
    )


def test_missing_data_of_all_tasks_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        suite("paper_gsm8k", "world_passage", "paper_nq", data=str(tmp_path)).check()
    assert [problem.split(":")[1].strip() for problem in caught.value.problems] == [
        "paper_gsm8k",
        "paper_nq",
    ]


def test_a_model_without_room_for_a_task_is_an_error_that_says_what_to_set() -> None:
    model = tiny_model("gpt2")
    model.network.config.n_positions = model.network.config.max_position_embeddings = 25
    with pytest.raises(
        ConfigError, match=r"world_summary generates up to 25 tokens.*suite\.max_new_tokens=12"
    ):
        suite("world_summary").baseline(model, ())
    assert suite("world_summary", max_new_tokens=4, limit=1).baseline(model, ())


def test_prompts_that_are_too_long_are_counted() -> None:
    model = tiny_model("gpt2")
    model.network.config.max_position_embeddings = 40
    found = suite("world_arithmetic", "world_entailment_likelihood").evaluate(model, (), {})
    assert [each.cut for each in measured(found)] == [3, 3]
    assert all(row["cut"] > 0 for each in found if isinstance(each, Samples) for row in each.rows)


def test_a_metric_that_leaves_out_every_item_is_recorded_with_none(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "sst2_dev.tsv").write_text("sentence\tlabel\n" + "fine . \t1\n" * 4)
    model, _ = edited_model()
    found = measured(
        suite("published_sst2", data=str(tmp_path), name="published_code").evaluate(model, (), {})
    )
    assert [(each.metric, each.value, each.n) for each in found] == [
        ("accuracy", None, 0),
        ("total_accuracy", 0.0, 3),
    ]
    assert all(
        each.variant is not None and each.variant.startswith("published code: ") for each in found
    )


@pytest.mark.slow
def test_the_harness_itself_finds_the_same_numbers() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from editkit.evaluation.harness.catalogue import FOLDER

    model, _ = edited_model()
    found = measured(suite(*WORLD).evaluate(model, (), {}))
    with quiet():
        lm = HFLM(
            pretrained=model.network,
            tokenizer=harness_model(model, tokens_per_batch=1).tokenizer,
            max_length=128,
            batch_size=2,
        )
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
        theirs = simple_evaluate(
            model=lm, tasks=list(WORLD), task_manager=manager, limit=3, bootstrap_iters=10
        )
    assert theirs is not None
    numbers = [
        (
            metric.removesuffix(",none"),
            value,
            theirs["results"][name][metric.replace(",none", "_stderr,none")],
        )
        for name in WORLD
        for metric, value in theirs["results"][name].items()
        if metric.endswith(",none") and "_stderr" not in metric
    ]
    assert [
        (metric, pytest.approx(value), pytest.approx(error)) for metric, value, error in numbers
    ] == [(each.metric, each.value, each.stderr) for each in found]


# Comparisons
