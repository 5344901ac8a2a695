"""The suites: what their files choose, the papers' prompts word for word, and what a mistaken
choice is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.config.build import build
from editkit.config.compose import compose, options
from editkit.config.schedule import Schedule
from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractSuite
from editkit.evaluation.harness.catalogue import local_data, own_tasks, takes_examples_from_test
from editkit.evaluation.harness.load_tasks import build_requests, load_tasks
from editkit.evaluation.harness.suite import LoadedSuite, Suite
from editkit.runner.inputs import require_same
from tests.support.helpers import real_data, tiny_model
from tests.test_imports import loaded_after

OWN = own_tasks()
SUITES = [
    "d4s",
    "knowedit",
    "memoe",
    "none",
    "paper",
    "published_code",
    "small",
    "standard",
    "world",
]
HINT = "She has 2 and gets 3: 2 + 3 = <<2+3=5>>5\n"
RECORDS: dict[str, Any] = {
    "gsm8k/test.jsonl": [{"question": "How many?", "answer": f"{HINT}#### 5"}],
    "rte/rte_dev_262.tsv": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n",
    "rte/rte_train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n",
    "nq_open/nq_open_with_passages.jsonl": [
        {"question": "where is it?", "answer": ["here", "there"], "output": ["\n\nIt is here."]}
    ],
    "samsum/samsum_818.json": [{"dialogue": "A: Hi!\r\nB: Hello.", "summary": "A and B greet."}],
    "sst2/sst2_dev.tsv": "sentence\tlabel\nfine . \t1\n",
}
GSM8K = "Q: How many? A:Let's think step by step. "
NUMERALS = "Therefore, the answer (arabic numerals) is:"
ENTAILS = "It rains. entails the It is wet.. True or False? answer:"
PASSAGE = "Refer to the passage below and answer the following question. Passage: \n\nIt is here. Question: where is it?"
SENTIMENT = (
    "For each snippet of text, label the sentiment of the text as positive or negative. "
    "The answer should be exact 'positive' or 'negative'. text: fine .  answer:"
)
PROMPTS = {
    "paper_gsm8k": GSM8K + NUMERALS,
    "paper_gsm8k_hint": f"{GSM8K}{HINT} {NUMERALS}",
    "paper_rte": ENTAILS,
    "paper_rte_likelihood": ENTAILS,
    "paper_nq": PASSAGE,
    "paper_samsum": "A: Hi!\r\nB: Hello. TL;DR:",
    "paper_sst2": SENTIMENT,
    "paper_sst2_likelihood": SENTIMENT,
    "published_gsm8k": f"{GSM8K}{HINT} {NUMERALS}",
    "published_rte": ENTAILS,
    "published_nq": f"{PASSAGE}. Answer:",
    "published_samsum": "A: Hi!\r\nB: Hello.\nTL;DR:",
    "published_sst2": SENTIMENT.replace(", label", ",label").replace(". The", ".The"),
}
CHOICES = {
    "paper_rte_likelihood": [" True", " False"],
    "paper_sst2_likelihood": [" positive", " negative"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one record of everything."""
    for file, records in RECORDS.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(record) for record in records] if not isinstance(records, str) else []
        path.write_text(
            records
            if isinstance(records, str)
            else json.dumps(records)
            if file.endswith(".json")
            else "\n".join(lines)
        )
    return tmp_path


def node(name: str) -> dict[str, Any]:
    return compose([f"suite={name}"]).config["suite"]


def test_all_suites_are_there() -> None:
    assert set(SUITES) <= {option.name for option in options() if option.group == "suite"}


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_bears_its_files_name(name: str) -> None:
    assert node(name)["name"] == name


def test_the_papers_suites_are_complete() -> None:
    assert set(node("paper")["tasks"]) | set(node("published_code")["tasks"]) == PROMPTS.keys()
    assert node("d4s")["shots"] == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    named = {task for name in SUITES for task in node(name)["tasks"]}
    assert OWN.keys() <= named, "a task that no suite chooses"


def test_prompts_are_word_for_word_the_papers(folder: Path) -> None:
    loaded = load_tasks(list(PROMPTS), data=str(folder), shots={}, seed=0)
    for name, prompt in PROMPTS.items():
        (task,) = loaded[name].tasks
        (requests,) = build_requests(task, limit=None).values()
        assert {request.args[0] for request in requests} == {prompt}
        if name in CHOICES:
            assert [request.args[1] for request in requests] == CHOICES[name]
        else:
            assert requests[0].args[1]["do_sample"] is False


def test_a_run_that_began_with_another_text_of_a_task_is_not_resumed(folder: Path) -> None:
    values = {key: value for key, value in node("paper").items() if key != "_target_"}
    options = Suite(**values | {"tasks": ("paper_sst2",), "data": str(folder)})
    model = tiny_model("gpt2")
    loaded = options.load(options.tasks)
    now = options.inputs(model)
    (task,) = loaded["paper_sst2"].tasks
    task.config.doc_to_text = task.config.doc_to_text.replace("text, label", "text,label")
    before = LoadedSuite(options, loaded).inputs(model)
    with pytest.raises(
        ConfigError, match=r"suite\.tasks: paper_sst2: the data is not what the run"
    ):
        require_same(before, now, source="the data")
    require_same(options.inputs(model), now, source="the data")


def test_validation_reads_every_tasks_data(tmp_path: Path, folder: Path) -> None:
    config = compose(["suite=paper", f"suite.data={folder}", f"paths.outputs={tmp_path}"]).config
    assert isinstance(build(config).evaluators["suite"], AbstractSuite)
    (folder / "rte" / "rte_dev_262.tsv").write_text(
        "index\tsentence1\tlabel\n0\tIt rains.\tentailment\n"
    )
    (folder / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        build(config)
    text = str(caught.value)
    assert "suite.tasks: paper_rte: " in text and "record 0: has no column 'sentence2'" in text
    assert "suite.tasks: paper_gsm8k_hint: no data" in text


def test_nothing_of_the_harness_is_imported_without_need() -> None:
    code = """
sys.argv = ['editkit', 'validate', 'edits=3', 'seed=0,1', 'suite={}']  # a sweep reads no tokenizer
from editkit.cli.main import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
assert 'lm_eval' not in sys.modules
"""
    for name in ("none", "world"):
        assert not loaded_after(code.format(name))


def test_a_suite_without_tasks_never_imports_the_harness() -> None:
    code = """
from editkit.evaluation.harness.suite import Suite
nothing = Suite(name='none', tasks=(), shots=None, limit=None, seed=0, data=None, max_new_tokens=None, tokens_per_batch=1, every=1)
assert nothing.baseline(None, ()) == {} and nothing.evaluate(EmptyModel(), (), {}) == []
assert 'lm_eval' not in sys.modules and 'datasets' not in sys.modules
"""
    loaded_after("class EmptyModel:\n    edited_modules = sides = ()\n" + code)


@pytest.mark.parametrize(
    ("step", "every", "is_measured"),
    [
        (0, 2, True),
        (10, 2, False),
        (20, 2, True),
        (30, 2, True),
        (30, 3, True),
        (20, 3, False),
        (10, 1, True),
    ],
)
def test_every_counts_milestones_and_keeps_the_first_and_the_last(
    step: int, every: int, is_measured: bool
) -> None:
    schedule = Schedule(
        edits=30, batch_size=1, milestones=(0, 10, 20, 30), telemetry_every=1, checkpoint_every=1
    )
    assert schedule.is_every(step, every) == is_measured


def a_suite(*tasks: str, **given: Any) -> Suite:
    options: dict[str, Any] = {
        "shots": None,
        "limit": 2,
        "seed": 1234,
        "data": None,
        "max_new_tokens": None,
        "tokens_per_batch": 64,
    }
    return Suite(**options | {"name": "mine", "tasks": tasks, "every": 1} | given)


def test_examples_that_would_be_tested_records_are_refused_for_all_tasks_at_once(
    folder: Path,
) -> None:
    with pytest.raises(ConfigError) as caught:
        a_suite(
            "paper_rte",
            "paper_nq",
            "paper_sst2",
            data=str(folder),
            shots={"paper_rte": 2, "paper_nq": 0, "paper_sst2": 1},
        ).check()
    assert caught.value.problems == (
        "suite.shots.paper_rte: the task has no examples apart from the tested records (got 2; expected 0).",
        "suite.shots.paper_sst2: the task has no examples apart from the tested records (got 1; expected 0).",
    )
    with pytest.raises(
        ConfigError, match=r"suite\.shots\.paper_nq: the task has no examples .*\(got 3; "
    ):
        load_tasks(["paper_rte", "paper_nq"], data=str(folder), shots={"paper_nq": 3}, seed=0)


@pytest.mark.parametrize(
    ("options", "is_tested"),
    [
        ({"test_split": "test"}, True),
        ({"training_split": "train", "test_split": "test"}, False),
        ({"validation_split": "validation", "test_split": "test"}, False),
        ({"validation_split": "validation"}, True),
        ({"training_split": "train", "test_split": "test", "fewshot_split": "test"}, True),
        ({"test_split": "test", "fewshot_config": {"split": "dev"}}, False),
        ({"test_split": "test", "fewshot_config": {"samples": [{"question": "?"}]}}, False),
        ({"test_split": "test", "fewshot_config": {"sampler": "first_n"}}, True),
    ],
)
def test_examples_are_looked_for_where_the_harness_takes_them(
    options: dict[str, Any], is_tested: bool
) -> None:
    assert takes_examples_from_test(options.get) == is_tested


def test_a_model_too_short_for_a_task_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_positions": 10})
    )
    for name in ("tokenizer.json", "model.safetensors"):  # these are not read
        (tmp_path / "short" / name).touch()
    config = compose(
        [f"model.id={tmp_path / 'short'}", f"paths.outputs={tmp_path}", "suite=world", "edits=3"]
    ).config
    with pytest.raises(
        ConfigError,
        match=r"world_arithmetic generates up to 10 tokens.* context length of 10\)\. Fix: set suite\.max_new_tokens=5",
    ):
        build(config)
    config["suite"]["max_new_tokens"] = 5
    assert build(config)


# The harness's own tasks: looking at all of them takes seconds


@pytest.mark.slow
def test_a_misspelt_task_is_told_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        a_suite("gsm8kk", "paper_rtee").check()
    first, second = caught.value.problems
    assert first.startswith(
        "suite.tasks: unknown task (got 'gsm8kk'; expected a task; nearest: gsm8k"
    )
    assert "paper_rte" in second


@pytest.mark.slow
def test_a_task_of_the_harness_without_data_names_the_hubs_dataset() -> None:
    with pytest.raises(
        ConfigError,
        match=r"suite\.tasks: arc_easy: hub dataset allenai/ai2_arc cannot be read \(got ",
    ):
        a_suite("arc_easy").check()


@pytest.mark.slow
def test_tasks_that_need_more_than_greedy_text_are_refused() -> None:
    from lm_eval.tasks import TaskManager

    from editkit.evaluation.harness.catalogue import FOLDER
    from editkit.evaluation.harness.load_tasks import _prepare

    (task,) = (
        TaskManager(include_path=str(FOLDER), include_defaults=False)
        .load(["world_passage"])["tasks"]
        .values()
    )
    task.set_config("generation_kwargs", {"do_sample": True}, update=True)
    with pytest.raises(ConfigError, match="world_passage samples its outputs"):
        _prepare(task, "world_passage", shots=None, seed=0)


@pytest.mark.slow
def test_local_files_stand_in_for_the_hubs(tmp_path: Path, folder: Path) -> None:
    (folder / "gsm8k" / "train.jsonl").write_text(
        "\n".join([json.dumps({"question": f"Q{i}?", "answer": f"#### {i}"}) for i in range(9)])
    )
    for split, rows in (("dev", 5), ("test", 3)):
        path = folder / "mmlu" / split / f"anatomy_{split}.csv"
        path.parent.mkdir(parents=True)
        path.write_text("What is it?,a,b,c,d,C\n" * rows)
    names = ["gsm8k", "rte", "sst2", "mmlu_anatomy"]
    loaded = load_tasks(names, data=str(folder), shots={"gsm8k": 2, "mmlu_anatomy": 3}, seed=1234)
    requests = {
        name: next(iter(build_requests(loaded[name].tasks[0], limit=1).values())) for name in names
    }
    assert requests["gsm8k"][0].args[0].count("Question: ") == 3
    assert requests["rte"][0].args == (
        "It rains.\nQuestion: It is wet. True or False?\nAnswer:",
        " True",
    )
    assert loaded["rte"].tasks[0].doc_to_target(requests["rte"][0].doc) == 0
    assert loaded["sst2"].tasks[0].doc_to_target(requests["sst2"][0].doc) == 1
    assert requests["mmlu_anatomy"][0].args[0].count("Answer: C") == 3
    with pytest.raises(
        ConfigError,
        match=r"the split 'train', .* has the examples .*\(got '4 examples'; expected 0",
    ):
        load_tasks(["sst2"], data=str(folder), shots={"sst2": 4}, seed=0)
    with pytest.raises(ConfigError, match=r"nq_open: no data \(expected .*NQ-open\.dev\.jsonl"):
        load_tasks(["nq_open"], data=str(folder), shots={}, seed=0)


@pytest.mark.slow
@pytest.mark.data
def test_the_real_files_feed_every_task_that_has_local_ones() -> None:
    data = real_data("downstream/gsm8k/test.jsonl").parents[1]
    a_suite(*(name for name in PROMPTS), data=str(data)).check()
    chosen = a_suite(
        "gsm8k", "rte", "nq_open", "sst2", "boolq", "mmlu", data=str(data), shots={"mmlu": 5}
    )
    loaded = chosen.check().loaded
    assert len(loaded["mmlu"].tasks) == 57
    assert loaded["mmlu"].pooled == {"acc": True}


def test_hub_datasets_without_a_local_layout_have_no_stand_in() -> None:
    assert local_data("allenai/ai2_arc", "ARC-Easy") is None
