"""A suite on a model that is edited: the items are the same every time, the model is measured no more
often than needed, and its scores are compared with those of the unedited model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editkit.editors.low_rank_side import LowRankSide
from editkit.errors import ConfigError
from editkit.evaluation.base import Samples
from editkit.evaluation.harness.lm import harness_model, quiet
from editkit.evaluation.statistics.paired import compare
from editkit.linalg.lowrank import LowRank
from editkit.types import Measurement
from tests.support.helpers import tiny_model
from tests.support.suites import (
    TEXTS,
    WORLD,
    a_task,
    an_update,
    edited_model,
    measured,
    rows_of_samples,
    suite,
    suite_of,
)


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
        [row["accuracy_likelihood"] for row in rows_of_samples(after, 0)],
    )
    assert values["accuracy_likelihood_difference"][:2] == (expected.difference, expected.stderr)
    assert values["accuracy_likelihood_p_value"][0] == expected.p_value


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


def test_what_stands_beside_the_weights_is_asked_anew_and_compared() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", limit=20).prepare(model)
    baseline = chosen.baseline(model, ())
    answers = chosen.last
    rows, columns = model.weight(module).shape
    generator = torch.Generator().manual_seed(0)
    side = LowRankSide(
        module=module,
        down_RI=torch.randn(1, columns, generator=generator),
        up_OR=torch.randn(rows, 1, generator=generator),
        scales_R=torch.ones(1),
    )
    for scales in (1.0, 2.0):
        model.attach(replace(side, scales_R=scales * side.scales_R))
        found = chosen.evaluate(model, (), baseline)
        assert chosen.last is not answers
        assert measured(found, "comparison")
        answers = chosen.last
    model.attach()
    assert not measured(chosen.evaluate(model, (), baseline), "comparison")


def test_a_likelihood_that_is_not_finite_is_a_failure_and_is_counted() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", limit=8)
    assert any(
        row["target"] == "True" for row in rows_of_samples(chosen.evaluate(model, (), {}), 0)
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
