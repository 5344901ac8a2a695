"""A suite on a model that is edited: the same items every time, asked no more often than needed, compared with the unedited model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.base import Measurement, Samples
from editkit.evaluation.downstream import Suite
from editkit.evaluation.harness import harness_model, quiet
from editkit.evaluation.loading import Chosen, load_tasks
from editkit.evaluation.paired import bootstrap, bootstrap_stderr, compare, mcnemar
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from tests.helpers import tiny_model

WORLD = ("world_arithmetic", "world_entailment", "world_entailment_likelihood", "world_passage", "world_summary")


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
    return LowRank(size * torch.randn(rows, 1, generator=generator), torch.randn(columns, 1, generator=generator))


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
    assert {(each.suite, each.task_version, each.n, each.nonfinite, each.cut, each.variant) for each in found} == {
        ("world", 1, 3, 0, None, None)
    }
    assert all(each.value is not None and 0 <= each.value <= 1 and each.stderr is not None for each in found)


def test_samples_hold_prompt_output_and_score_of_every_item() -> None:
    model, _ = edited_model()
    found = suite(*WORLD).evaluate(model, (), {})
    samples = {each.name: each.rows for each in found if isinstance(each, Samples)}
    assert samples.keys() == {name.replace("world_", "world-") for name in WORLD}
    (passage, *others) = samples["world-passage"]
    assert len(others) == 2
    assert passage.keys() == {"item", "prompt", "target", "output", "exact_match"}
    assert isinstance(passage["output"], str)
    assert [continuation for continuation, _, _ in samples["world-entailment_likelihood"][0]["output"]] == [" True", " False"]


def test_the_unedited_model_is_asked_once_and_compared_with_nothing() -> None:
    model, _ = edited_model()
    chosen = suite("world_passage", "world_entailment_likelihood")
    baseline = chosen.baseline(model, ())
    answers = chosen._bench.last
    assert {name: tuple(scores.shape) for name, scores in baseline.items()} == {
        "world_passage|exact_match|none": (3,),
        "world_entailment_likelihood|accuracy_likelihood|none": (3,),
    }
    found = chosen.evaluate(model, (), baseline)
    assert chosen._bench.last is answers
    assert not measured(found, "comparison")


def test_an_edited_model_is_asked_anew_about_the_same_items_and_compared_with_the_frozen_scores() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", "world_summary", limit=20)
    baseline = chosen.baseline(model, ())
    before = chosen.evaluate(model, (), baseline)
    asked = chosen._bench.asked
    model.apply(module, an_update(model, module))
    after = chosen.evaluate(model, (), baseline)
    assert chosen._bench.asked is asked
    rows = [[row["prompt"] for each in found if isinstance(each, Samples) for row in each.rows] for found in (before, after)]
    assert rows[0] == rows[1]
    values = {each.metric: (each.value, each.stderr, each.n) for each in measured(after, "comparison")}
    old, new = ({each.metric: each.value for each in measured(found)} for found in (before, after))
    for metric in ("accuracy_likelihood", "rouge"):
        difference, error, n = values[f"{metric}_difference"]
        assert n == 20
        assert difference == pytest.approx(new[metric] - old[metric])
        assert error is not None
        p_value, _, _ = values[f"{metric}_p_value"]
        assert p_value is not None and 0 < p_value <= 1
    expected = compare(
        baseline["world_entailment_likelihood|accuracy_likelihood|none"].tolist(), [row["accuracy_likelihood"] for row in _rows(after, 0)]
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
    assert suite("world_passage", "world_entailment_likelihood").evaluate(model, (), baseline) == first.evaluate(model, (), baseline)


def test_a_view_that_restrains_nothing_is_not_asked_again_and_one_that_does_is() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood")
    model.apply(module, an_update(model, module))
    chosen.evaluate(model, (), {})
    answers = chosen._bench.last
    with model.temporarily({}):
        chosen.evaluate(model, (), {})
    assert chosen._bench.last is answers
    with model.temporarily({module: an_update(model, module, size=-0.5)}):
        chosen.evaluate(model, (), {})
    assert chosen._bench.last is not answers


def test_a_likelihood_that_is_not_finite_is_a_failure_and_is_counted() -> None:
    model, module = edited_model()
    chosen = suite("world_entailment_likelihood", limit=8)
    assert any(row["target"] == "True" for row in _rows(chosen.evaluate(model, (), {}), 0))  # the first choice: nan would win the argmax
    rows, columns = model.weight(module).shape
    with model.temporarily({module: LowRank(torch.full((rows, 1), math.nan), torch.ones(columns, 1))}):
        (found,) = measured(chosen.evaluate(model, (), {}))
    assert (found.value, found.n, found.nonfinite) == (0.0, 8, 8)


def test_batches_change_no_number() -> None:
    model, _ = edited_model()
    ways = [measured(suite(*WORLD, tokens_per_batch=tokens).evaluate(model, (), {})) for tokens in (1, 4096)]
    assert ways[0] == ways[1]


def test_a_group_counts_the_items_of_its_tasks_together() -> None:
    model, _ = edited_model()
    (alone,) = measured(suite("world_entailment").evaluate(model, (), {}))
    parts = [load_tasks(["world_entailment"], data=None, shots={}, seed=0)["world_entailment"] for _ in range(2)]
    group = suite("both")
    group._bench.chosen["both"] = Chosen(name="both", tasks=parts[0].tasks + parts[1].tasks, pooled=("accuracy",))
    (found,) = measured(group.evaluate(model, (), {}))
    assert (found.task, found.metric, found.n, found.value) == ("both", "accuracy", 6, alone.value)


def test_no_tasks_measure_nothing_and_need_nothing() -> None:
    nothing = suite()
    nothing.check()
    model, _ = edited_model()
    assert nothing.baseline(model, ()) == {}
    assert nothing.evaluate(model, (), {}) == []


def test_every_problem_of_the_options_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        suite("world_passage", "world_passage", limit=0, every=0, shots={"gsm8k": 5, "world_passage": -1})
    assert caught.value.problems == (
        "suite.limit: 0 was given; at least 1 is needed.",
        "suite.every: 0 was given; at least 1 is needed.",
        "suite.shots: gsm8k is none of suite.tasks: world_passage, world_passage.",
        "suite.shots.world_passage: -1 was given; at least 0 is needed.",
        "suite.tasks: world_passage is given more than once.",
    )


def test_missing_data_of_all_tasks_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        suite("paper_gsm8k", "world_passage", "paper_nq", data=str(tmp_path)).check()
    assert [problem.split(":")[1].strip() for problem in caught.value.problems] == ["paper_gsm8k", "paper_nq"]


def test_a_model_without_room_for_a_task_is_an_error_that_says_what_to_set() -> None:
    model = tiny_model("gpt2")
    model.network.config.n_positions = model.network.config.max_position_embeddings = 25
    with pytest.raises(ConfigError, match=r"world_summary generates up to 25 tokens.*suite\.max_new_tokens=12"):
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
    found = measured(suite("published_sst2", data=str(tmp_path), name="published_code").evaluate(model, (), {}))
    assert [(each.metric, each.value, each.n) for each in found] == [("accuracy", None, 0), ("total_accuracy", 0.0, 3)]
    assert all(each.variant is not None and each.variant.startswith("published code: ") for each in found)


@pytest.mark.slow
def test_the_harness_itself_finds_the_same_numbers() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from editkit.evaluation.catalogue import FOLDER

    model, _ = edited_model()
    found = measured(suite(*WORLD).evaluate(model, (), {}))
    with quiet():
        lm = HFLM(pretrained=model.network, tokenizer=harness_model(model, tokens_per_batch=1).tokenizer, max_length=128, batch_size=2)
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
        theirs = simple_evaluate(model=lm, tasks=list(WORLD), task_manager=manager, limit=3, bootstrap_iters=10)
    assert theirs is not None
    numbers = [
        (metric.removesuffix(",none"), value, theirs["results"][name][metric.replace(",none", "_stderr,none")])
        for name in WORLD
        for metric, value in theirs["results"][name].items()
        if metric.endswith(",none") and "_stderr" not in metric
    ]
    assert [(metric, pytest.approx(value), pytest.approx(error)) for metric, value, error in numbers] == [
        (each.metric, each.value, each.stderr) for each in found
    ]


# Comparisons


@pytest.mark.parametrize(("gained", "lost", "p_value"), [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 2 / 32), (1, 5, 2 * 7 / 64), (4, 4, 1.0)])
def test_mcnemars_test_is_exact(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p_value)


def test_a_comparison_is_that_of_paired_differences() -> None:
    found = compare([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert found.difference == -0.5
    assert found.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert found.p_value == mcnemar(0, 2)
    assert compare([0.5], [math.nan]).p_value is None


def test_the_bootstraps_p_is_small_for_a_clear_shift_and_one_for_none() -> None:
    assert bootstrap([0.0] * 10) == 1.0
    assert bootstrap([0.3, 0.2, 0.4, 0.25] * 5) == pytest.approx(2 / 10001)
    assert bootstrap([-0.3, 0.3] * 20) > 0.5
    assert bootstrap([0.1, -0.05, 0.2]) == bootstrap([0.1, -0.05, 0.2])


def test_the_bootstraps_standard_error_of_a_mean_is_near_the_formulas() -> None:
    values = [float(index % 7) for index in range(50)]
    mean = sum(values) / 50
    formula = math.sqrt(sum((value - mean) ** 2 for value in values) / 49 / 50)
    assert bootstrap_stderr(values, lambda drawn: sum(drawn) / len(drawn)) == pytest.approx(formula, rel=0.2)
    assert bootstrap_stderr([1.0], sum) is None
