"""Perplexities of a suite's tasks, and groups of tasks: their values, standard errors and comparisons
with the unedited model."""

from __future__ import annotations

import math

import pytest
import torch

from editkit.evaluation.harness.load_tasks import LoadedTasks, load_tasks
from editkit.evaluation.harness.suite import LoadedSuite
from editkit.linalg.lowrank import LowRank
from editkit.types import Measurement
from tests.support.suites import (
    TEXTS,
    a_task,
    an_update,
    edited_model,
    measured,
    rows_of_samples,
    suite,
    suite_of,
)


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
    assert {row["perplexity"] for row in rows_of_samples(found, 0)} == {None}


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
