"""Our tasks: what their yamls say, where their data comes from, and how generations are scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.datasets.world import generate_world, task_items
from editkit.errors import ConfigError
from editkit.evaluation.harness.catalogue import FOLDER, OPTIONS, own_tasks
from editkit.evaluation.tasks import published, scores
from editkit.evaluation.tasks.data import check_rows, read, read_file

YAMLS = sorted(FOLDER.rglob("*.yaml"))
OWN = own_tasks()
PASSAGES = {"test": "nq_open/nq_open_with_passages.jsonl"}


def write(folder: Path, file: str, text: str) -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# What the yamls say


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_task_says_what_it_is_where_it_is_from_and_its_version(path: Path) -> None:
    about, source, *_ = path.read_text().splitlines()
    assert about.startswith("# ") and len(about) > 20
    assert source.startswith("# Source: ")
    (task,) = [
        each
        for each in OWN.values()
        if each["task_alias"] and f"task: {each['task']}\n" in path.read_text()
    ]
    assert task["metadata"]["version"] >= 1
    examples = task.get("fewshot_config", {"samples": []})["samples"]
    assert task["num_fewshot"] == len(examples)
    assert task["metric_list"]


@pytest.mark.parametrize(
    "task",
    [each for each in OWN.values() if each["output_type"] == "generate_until"],
    ids=lambda each: each["task"],
)
def test_every_generation_is_greedy_and_bounded_in_so_many_words(task: dict[str, Any]) -> None:
    settings = task["generation_kwargs"]
    assert (settings["do_sample"], settings["temperature"]) == (False, 0.0)
    assert settings["max_gen_toks"] >= 1
    assert isinstance(settings["until"], list)


def test_whatever_is_published_says_so() -> None:
    published_tasks = {name: each for name, each in OWN.items() if name.startswith("published_")}
    assert len(published_tasks) == 5
    assert all(
        each["metadata"]["variant"].startswith("published code: ")
        for each in published_tasks.values()
    )
    assert not [
        name
        for name, each in OWN.items()
        if "variant" in each["metadata"] and name not in published_tasks
    ]


def test_the_names_of_all_tasks_differ() -> None:
    assert len(OWN) == len(YAMLS)


# Data


def test_the_worlds_items_are_the_generated_ones_with_their_answers() -> None:
    items = task_items(generate_world(0), "entailment", n=3)
    assert read(world="entailment")["test"][:3] == [
        {"prompt": item.prompt, "answer": item.answer, "choices": ["True", "False"]}
        for item in items
    ]
    assert {name: len(rows) for name, rows in read(world="passage").items()} == {"test": 500}


@pytest.mark.parametrize("below", ["", "downstream"])
def test_a_folder_may_hold_the_files_itself_or_in_downstream(tmp_path: Path, below: str) -> None:
    write(
        tmp_path / below,
        "gsm8k/test.jsonl",
        '{"question": "Q", "answer": "A"}\n\n{"question": "R", "answer": "B"}\n',
    )
    found = read(**OWN["paper_gsm8k"][OPTIONS], data=str(tmp_path))
    assert found == {"test": [{"question": "Q", "answer": "A"}, {"question": "R", "answer": "B"}]}


def test_the_environment_names_the_folder_where_the_suite_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        "samsum/samsum_818.json",
        json.dumps([{"dialogue": "A: hi", "summary": "A greets."}] * 3),
    )
    monkeypatch.setenv("EDITKIT_DATA", str(tmp_path))
    assert len(read(**OWN["paper_samsum"][OPTIONS])["test"]) == 3


def test_quotation_marks_of_a_tsv_are_text_unless_the_published_reader_takes_them_for_syntax(
    tmp_path: Path,
) -> None:
    text = 'index\tsentence1\tsentence2\tlabel\n0\t"Well," he said.\tHe spoke.\tentailment\n'
    write(tmp_path, "rte/rte_dev_262.tsv", text)
    write(tmp_path, "rte/rte_train.tsv", text)
    (right,) = read(**OWN["paper_rte"][OPTIONS], data=str(tmp_path))["test"]
    (theirs,) = read(**OWN["published_rte"][OPTIONS], data=str(tmp_path))["test"]
    assert (right["sentence1"], theirs["sentence1"]) == ('"Well," he said.', "Well, he said.")


def test_mmlus_csv_has_no_line_of_names(tmp_path: Path) -> None:
    path = write(tmp_path, "mmlu/test/x_test.csv", 'What?,"one, two",2,3,4,D\n')
    assert read_file(path) == [
        {"question": "What?", "A": "one, two", "B": "2", "C": "3", "D": "4", "answer": "D"}
    ]


def test_the_published_tasks_take_the_first_records(tmp_path: Path) -> None:
    write(tmp_path, "sst2/sst2_dev.tsv", "sentence\tlabel\n" + "fine . \t1\n" * 400)
    assert len(read(**OWN["published_sst2"][OPTIONS], data=str(tmp_path))["test"]) == 299
    assert len(read(**OWN["paper_sst2"][OPTIONS], data=str(tmp_path))["test"]) == 400


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.jsonl", '{"question": "Q", "answer": " "}', "record 0: answer is empty"),
        ("a.jsonl", '{"question": "Q", "answer": []}', "record 0: answer is empty"),
        ("a.jsonl", '{"question": "Q"}', "record 0: has no column 'answer' (got 'question')."),
        ("a.jsonl", "[1]", "record 0: not an object with columns (got 'list')."),
        ("a.jsonl", "{", "cannot be read"),
        ("a.jsonl", "", "has no records"),
        ("a.json", '{"question": "Q"}', "not a list of records (got 'dict'; expected a list)."),
        ("a.tsv", "question\tanswer\nQ\tA\tB\n", "cannot be read"),
    ],
)
def test_bad_data_is_named_with_file_record_and_column(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    path = write(tmp_path, file, text)
    with pytest.raises(ConfigError) as caught:
        read(files={"test": file}, columns=["question", "answer"], data=str(tmp_path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_many_bad_records_are_counted_not_listed() -> None:
    problems = check_rows([{}] * 20, ["answer"], where="here")
    assert len(problems) == 6
    assert problems[-1] == "here: 15 more problems."


def test_missing_data_says_where_it_was_looked_for_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    with pytest.raises(ConfigError) as caught:
        read(files=PASSAGES, data=str(tmp_path))
    assert all(
        part in str(caught.value)
        for part in (str(tmp_path / "downstream"), "suite.data=FOLDER", PASSAGES["test"])
    )
    with pytest.raises(ConfigError, match=r"EDITKIT_DATA is not set; no hub dataset is known"):
        read(files=PASSAGES)
    with pytest.raises(
        ConfigError, match=r"EDITKIT_DATA is not set; hub dataset nyu-mll/glue cannot be read"
    ):  # offline
        read(**OWN["paper_rte"][OPTIONS])


# Scores


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
def test_exact_match_ignores_case_punctuation_articles_and_blanks(
    generation: str, answer: str, match: int
) -> None:
    assert scores.exact_match(generation, ["elsewhere", answer]) == match


def test_normalisation_keeps_words_whole() -> None:
    assert scores.normalise("A man, a plan: the canal!") == "man plan canal"


@pytest.mark.parametrize(
    ("generation", "solved"),
    [(" 12", 1), ("12.", 1), ("-12", 0), ("12 apples", 0), ("112", 0), ("", 0)],
)
def test_a_story_of_the_world_is_solved_by_its_number_alone(generation: str, solved: int) -> None:
    assert scores.number({"answer": "12"}, [generation]) == {"solve_rate": solved}


def test_rouge_is_the_f_measure() -> None:
    found = scores.rouge_of("the cat sat", "the cat ran off")
    rouge_1 = rouge_l = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    rouge_2 = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    assert found["rougeL"] == pytest.approx(rouge_l)
    assert found["rouge"] == pytest.approx((rouge_1 + rouge_2 + rouge_l) / 3)


@pytest.mark.parametrize(
    ("generation", "solved"),
    [
        (" 1,200 dollars", 1),
        (" $1200.00", 1),
        (" 12", 0),
        (" 5 + 1200", 0),
        ("", 0),
        (" many", 0),
        ("-1200", 0),
    ],
)
def test_gsm8k_takes_the_first_number(generation: str, solved: int) -> None:
    assert scores.gsm8k({"answer": "Long story\n#### 1,200"}, [generation]) == {
        "solve_rate": solved
    }


@pytest.mark.parametrize(
    ("label", "word"),
    [("entailment", "True"), (0, "True"), ("not_entailment", "False"), (1, "False")],
)
def test_the_files_and_the_hubs_labels_mean_the_same(label: object, word: str) -> None:
    assert scores.entailment_answer({"label": label}) == word


@pytest.mark.parametrize(
    ("generation", "accuracy"),
    [(" True, since", 1), ("true", 1), (" False", 0), (" Not True", 0), ("", 0)],
)
def test_an_entailment_is_judged_by_its_first_word(generation: str, accuracy: int) -> None:
    assert scores.rte({"label": "entailment"}, [generation]) == {"accuracy": accuracy}


def test_sentiments_are_judged_by_their_first_word() -> None:
    assert [scores.sst2({"label": label}, [" Positive."])["accuracy"] for label in ("1", 0)] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("generation", "match"),
    [
        (" Paris\nQ:", 1),
        ("\n\nAnswer: Paris", 1),
        ("answer: the Paris.", 1),
        (" It is Paris", 0),
        ("", 0),
    ],
)
def test_a_question_is_answered_by_the_first_line(generation: str, match: int) -> None:
    assert scores.nq({"answer": ["Rome", "Paris"]}, [generation]) == {"exact_match": match}


def test_the_more_probable_choice_counts_and_of_equals_the_first() -> None:
    doc = {"choices": ["True", "False"], "answer": "False"}
    ways = [
        [(-2.0, False), (-1.0, True)],
        [(-1.0, True), (-2.0, False)],
        [(-1.0, False), (-1.0, False)],
    ]
    assert [scores.choice(doc, way)["accuracy_likelihood"] for way in ways] == [1, 0, 0]


def test_entities_are_spans_of_their_kind_whether_tags_are_words_or_the_hubs_numbers() -> None:
    tokens = ["Jo", "Smith", "met", "EU", "officials", "in", "New", "York"]
    words = ["B-PER", "I-PER", "O", "B-ORG", "O", "O", "B-LOC", "I-LOC"]
    numbers = [scores.CONLL_TAGS.index(word) for word in words]
    for tags in (words, numbers):
        assert scores.entities(tokens, tags, "PER") == ["Jo Smith"]
        assert scores.entities(tokens, tags, "LOC") == ["New York"]
        assert scores.entities(tokens, tags, "MISC") == []
    assert scores.entities(["A", "B", "C"], ["I-PER", "B-PER", "I-PER"], "PER") == ["A", "B C"]
    assert len(scores.entity_questions([{"tokens": tokens, "ner_tags": numbers}])) == 4


def test_entity_f1_is_over_all_questions_together() -> None:
    doc = {"entities": ["Jo Smith", "Ann"]}
    right = scores.conll03(doc, ["Jo Smith, Bob; Ann"])["entity_f1"]
    none = scores.conll03({"entities": []}, [" "])["entity_f1"]
    assert (right, none) == ((2, 3, 2), (0, 0, 0))
    assert scores.entity_f1([right, none]) == pytest.approx(2 * 2 / (3 + 2))
    assert scores.entity_f1([none]) == 1.0


# The published scripts' traps


def test_published_gsm8k_finds_the_answer_anywhere() -> None:
    assert [
        published.gsm8k({"answer": "story\n#### 18"}, [text])["solve_rate"]
        for text in (" 1180", "18", " 1,8")
    ] == [1, 1, 0]


def test_published_accuracy_leaves_out_what_is_neither() -> None:
    assert published.rte({"label": "not_entailment"}, [" FALSE"]) == {
        "accuracy": 1.0,
        "total_accuracy": 1.0,
    }
    assert published.rte({"label": "not_entailment"}, [" True"]) == {
        "accuracy": 0.0,
        "total_accuracy": 0.0,
    }
    assert published.rte({"label": "entailment"}, [" maybe"]) == {"total_accuracy": 0.0}
    assert published.sst2({"label": "1"}, [" positively"]) == {
        "accuracy": 1.0,
        "total_accuracy": 1.0,
    }


def counted(*items: tuple[str, list[str]]) -> float:
    return published.nq_count(
        [published.nq({"answer": answers}, [said])["exact_match"] for said, answers in items]
    ) * len(items)


def test_published_spans_are_counted_as_the_script_counts_them() -> None:
    assert counted(("Paris it is", ["Paris"])) == 1  # the first word
    assert (
        counted(("it is Answer: Rome or Paris", ["Paris"])) == 1
    )  # behind the last "Answer:", the last word
    assert counted(("so Paris and Paris then", ["Paris"])) == 2  # twice in one record
    assert counted(("in New York then", ["New York"])) == 1
    flagged = ("in New York then", ["New York"])
    assert counted(("so Rio and Rio then", ["Rio"]), flagged) == 3
    assert (
        counted(flagged, ("so Rio and Rio then", ["Rio"])) == 1
    )  # the flag stops every later record after its first word
    assert counted(flagged, ("the New York now", ["New York"])) == 2  # which may begin the answer
    assert counted(flagged, ("Rio", ["Rio"])) == 2
    assert counted(("", ["Rio"])) == 0


def test_published_summaries_lose_thirteen_characters() -> None:
    doc = {"summary": "Ann will meet Bob at noon."}
    assert published.samsum(doc, ["Ann will meet Bob at noon." + "x" * 13])[
        "rouge"
    ] == pytest.approx(1.0)
    assert published.samsum(doc, ["x" * 14]) == {"rouge": 0.0, "bleu": 0.0}
    assert published.samsum(doc, ["... ." + "x" * 13]) == {"rouge": 0.0, "bleu": 0.0}
    shorter = published.samsum(doc, ["Ann will meet Bob at noon."])
    assert 0 < shorter["rouge"] < 1
    assert published.samsum(doc, ["Ann will meet Bob at noon." + "x" * 13])[
        "bleu"
    ] == pytest.approx(1.0)


def test_published_rouge_counts_every_ngram_once() -> None:
    doc = {"summary": "to be or not to be"}
    repeated = published.samsum(doc, ["be be be to or not" + "x" * 13])["rouge"]
    ours = scores.rouge_of("be be be to or not", doc["summary"])["rouge"]
    assert not math.isclose(repeated, ours, abs_tol=0.01)


def test_yamls_hold_no_folder_of_a_machine() -> None:
    for path in YAMLS:
        content = yaml.safe_load(path.read_text().replace("!function", ""))
        files = (content[OPTIONS].get("files") or {}).values()
        assert not [file for file in files if Path(file).is_absolute()]
