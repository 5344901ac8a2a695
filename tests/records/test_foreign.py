"""Results of MEMIT's and EasyEdit's code are foreign runs: their numbers are those of the programs
themselves, and another layout is refused with file and field.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import editkit
from editkit.cli.main import app
from editkit.errors import ConfigError
from editkit.records.find import load, load_runs
from editkit.report.collect import collect
from editkit.report.show import show

# The mean negative log-likelihoods (new, true) of two edits: the first won, the second lost.
LIKELIHOODS = [(1.0, 3.0), (4.0, 2.0)]


def memit_case(case_id: int) -> dict[str, Any]:
    """A file of MEMIT's code for a CounterFact record."""
    new, true = LIKELIHOODS[case_id % 2]
    answers = {"target_new": new, "target_true": true}
    return {
        "case_id": case_id,
        "grouped_case_ids": [0, 1],
        "num_edits": 2,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "time": 7.5,
        "post": {
            "rewrite_prompts_probs": [answers],
            "paraphrase_prompts_probs": [answers, {"target_new": 1.0, "target_true": 2.0}],
            "neighborhood_prompts_probs": [{"target_new": 5.0, "target_true": 1.0}] * 2,
            "rewrite_prompts_correct": [case_id % 2 == 0],
            "paraphrase_prompts_correct": [True, False],
            "neighborhood_prompts_correct": [True, True],
            "ngram_entropy": 6.0 + case_id,
            "reference_score": 0.25,
            "text": ["Danielle Darrieux was"],
        },
    }


def memit_folder(folder: Path, number: int = 2) -> Path:
    run = folder / "results" / "MEMIT" / "run_000"
    run.mkdir(parents=True)
    for case_id in range(number):
        (run / f"2_edits-case_{case_id}.json").write_text(json.dumps(memit_case(case_id)))
    (run / "params.json").write_text(json.dumps({"layers": [3], "model_name": "gpt2-xl"}))
    # AlphaEdit's code writes other results below, under the names of cases
    (run / "glue_eval").mkdir()
    (run / "glue_eval" / "case_1.json").write_text(json.dumps({"edit_num": 2}))
    return run


def easyedit_entry(case_id: int) -> dict[str, Any]:
    """An entry of EasyEdit's list."""
    tokens = [[11, 12, 13, 14]]
    section: dict[str, Any] = {
        "rewrite_acc": [0.5 + case_id / 2],
        "rephrase_acc": 0.25,
        "locality": {"neighborhood_output": tokens},
        "portability": {"reasoning_acc": [1.0, 0.0], "Subject_Aliasing_acc": [[1.0]]},
        "fluency": {"ngram_entropy": 6.25},
    }
    before = copy.deepcopy(section) | {"rewrite_acc": [0.0]}
    after = copy.deepcopy(section)
    after["locality"]["neighborhood_output"] = [[11, 12, 99, 14]]
    after["locality"]["Forgetfulness_acc"] = [0.25]
    request = {"prompt": "Who published it?", "target_new": "ASM", "subject": "it"}
    kept = {"case_id": case_id, "requested_rewrite": request, "time": 3.0}
    return kept | {"pre": before, "post": after}


def easyedit_file(folder: Path, name: str = "ROME_results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps([easyedit_entry(case_id) for case_id in range(2)]))
    return folder / name


def shown(path: Path) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(show(path, protocol="all"))
    return output.getvalue()


def test_memits_files_have_its_own_summary_as_metrics_with_their_protocols(tmp_path: Path) -> None:
    run = load(memit_folder(tmp_path))
    assert run.status == "foreign" and len(run.steps[-1].requests) == 2
    by_probability = {"protocol": "probability", "step": 1}
    assert run.value(metric="efficacy", **by_probability) == 0.5
    assert run.value(metric="generalization", **by_probability) == 0.75  # (1 + 1/2) / 2
    assert run.value(metric="locality", **by_probability) == 1.0
    assert run.value(metric="score", **by_probability) == pytest.approx(3 / (2 + 4 / 3 + 1))
    differences = [math.exp(-new) - math.exp(-true) for new, true in LIKELIHOODS]
    expected = pytest.approx(sum(differences) / 2)
    assert run.value(metric="efficacy_magnitude", **by_probability) == expected
    assert run.value(metric="efficacy", protocol="argmax") == 0.5
    assert run.value(metric="specificity", protocol="argmax") == 1.0
    assert run.value(metric="fluency_bits", protocol="text") == 6.5
    assert run.value(metric="consistency", protocol="text") == 0.25
    (record,) = run.find(metric="efficacy", protocol="probability")
    assert record.measurement.variant == "measured by MEMIT" and record.measurement.timing is None
    assert record.measurement.stderr == pytest.approx(0.5)  # of 1 and 0
    assert run.steps[-1].seconds == {"edit": 7.5}  # one batch


def test_zsre_in_memits_layout_is_scored_token_by_token(tmp_path: Path) -> None:
    case = memit_case(0)
    case["requested_rewrite"]["target_true"]["str"] = "<|endoftext|>"
    case["post"] = {
        "rewrite_prompts_correct": [True, True, False, True],
        "paraphrase_prompts_correct": [False, True],
        "neighborhood_prompts_correct": [True, False],
    }
    (tmp_path / "case_0.json").write_text(json.dumps(case))
    run = load(tmp_path)
    found = {each.measurement.metric: each.measurement.value for each in run.find(protocol="token")}
    assert found == {"efficacy": 0.75, "generalization": 0.5, "specificity": 0.5}
    assert run.config["dataset"] == {"name": "zsre"}


def test_easyedits_list_has_both_phases_all_kinds_and_the_protocol_token(tmp_path: Path) -> None:
    run = load(easyedit_file(tmp_path / "output").parent)
    before, after = {"step": 0, "protocol": "token"}, {"step": 1, "protocol": "token"}
    assert run.value(metric="efficacy", **before) == 0.0
    assert run.value(metric="efficacy", **after) == 0.75
    assert run.value(metric="generalization", **after) == 0.25
    assert run.value(metric="locality", task="neighborhood", **after) == 0.75  # of four tokens
    assert run.value(metric="locality", task="forgetfulness", **after) == 0.25
    assert run.value(metric="locality", **after) == 0.5
    assert run.value(metric="portability", task="reasoning", **after) == 0.5
    assert run.value(metric="portability", task="subject_aliasing", **after) == 1.0
    assert run.value(metric="fluency_bits", step=1, protocol="text") == 6.25
    assert run.config["editor"]["name"] == "ROME (foreign, EasyEdit)"


def test_a_protocol_that_easyedit_names_is_kept(tmp_path: Path) -> None:
    entry = easyedit_entry(0)
    post = entry["post"]
    post["metric_meta"] = {
        "rewrite": {"protocol": "free_generation_judge"},
        "rephrase": {"protocol": "decoder_only_teacher_forcing"},
    }
    entry["pre"]["rewrite_gen_content"] = "text"
    file = tmp_path / "results.json"
    file.write_text(json.dumps([entry]))
    run = load(file)
    assert {each.measurement.protocol for each in run.find(metric="efficacy", step=1)} == {
        "EasyEdit free_generation_judge"
    }
    assert {each.measurement.protocol for each in run.find(metric="generalization", step=1)} == {
        "token"
    }
    assert {each.measurement.protocol for each in run.find(metric="efficacy", step=0)} == {
        "EasyEdit generation"
    }


def test_show_report_and_collect_mark_a_foreign_run(tmp_path: Path) -> None:
    run = memit_folder(tmp_path)
    easyedit_file(tmp_path / "easyedit")
    text = shown(run.parent)
    assert "(foreign)" in text and "a foreign run, 2 edits in the layout of MEMIT" in text
    assert "as another program measured them" in text and "edits until" not in text
    results, to = str(tmp_path / "results"), tmp_path / "page.html"
    arguments = ["report", results, str(tmp_path / "easyedit"), "--to", str(to)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    page = to.read_text()
    assert "counterfact, 2 edits: editing, protocol probability (measured by MEMIT)" in page
    for mark in ("MEMIT (foreign, MEMIT)", "ROME (foreign, EasyEdit)", "2 foreign", "gpt2-xl"):
        assert mark in page
    table = collect(load_runs([Path(results)]))
    assert set(table["status"]) == {"foreign"} and set(table["dataset"]) == {"counterfact"}
    assert editkit.load_run(str(run)).status == "foreign"


def test_several_foreign_runs_of_a_folder_are_compared_and_one_of_them_is_shown(
    tmp_path: Path,
) -> None:
    for method in ("ROME", "FT"):
        easyedit_file(tmp_path, f"{method}_results.json")
    runs = load_runs([tmp_path])
    assert [run.config["editor"]["name"].split()[0] for run in runs] == ["FT", "ROME"]
    with pytest.raises(ConfigError, match=r"2 foreign runs .*Fix: name one of them"):
        show(tmp_path)
    assert "foreign" in shown(tmp_path / "FT_results.json")


def at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """Sets the field at a path of a case."""

    def to(new: Any) -> Callable[[dict[str, Any]], None]:
        def change(case: dict[str, Any]) -> None:
            node: Any = case
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = new

        return change

    return to


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(case: dict[str, Any]) -> None:
        for name in names:
            del case[name]

    return change


MEMIT_WRONG: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (without("post"), "post is missing"),
    (without("requested_rewrite"), "requested_rewrite is no JSON object"),
    (at("post")([]), "post is no JSON object"),
    (at("post")({"accuracy": 1}), "post has no metric of this layout .got 'accuracy'"),
    (at("post", "rewrite_prompts_probs")({}), r"post\.rewrite_prompts_probs is no list"),
    (
        at("post", "rewrite_prompts_probs")([{"target_new": 1}]),
        r"post\.rewrite_prompts_probs\[0\]\.target_true is missing",
    ),
    (
        at("post", "rewrite_prompts_probs", 0, "target_new")("1"),
        r"post\.rewrite_prompts_probs\[0\]\.target_new is no number .got '1'",
    ),
    (at("post", "ngram_entropy")(None), r"post\.ngram_entropy is no number"),
    (at("post", "ngram_entropy")(10**350), r"post\.ngram_entropy is no number that fits"),
    (at("num_edits")(3), "the files differ in num_edits"),
]
EASYEDIT_WRONG: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (at("post", "rewrite_acc")("high"), r"post\.rewrite_acc is no number"),
    (at("post", "locality")([1]), r"post\.locality is no JSON object"),
    (
        at("post", "locality", "neighborhood_output")([[1]]),
        r"post\.locality\.neighborhood_output has another number of tokens",
    ),
    (
        at("post", "portability", "reasoning_acc")([[1, "x"]]),
        r"reasoning_acc\[0\]\[1\] is no number",
    ),
    (at("pre")(3), "pre is no JSON object"),
]


@pytest.mark.parametrize(
    ("layout", "change", "expected"),
    [
        *(("MEMIT", *each) for each in MEMIT_WRONG),
        *(("EasyEdit", *each) for each in EASYEDIT_WRONG),
    ],
    ids=[text for _, text in (*MEMIT_WRONG, *EASYEDIT_WRONG)],
)
def test_another_layout_is_one_message_with_file_and_field(
    tmp_path: Path, layout: str, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    if layout == "MEMIT":
        path = memit_folder(tmp_path)
        file = path / "2_edits-case_1.json"
        case = memit_case(1)
        change(case)
        file.write_text(json.dumps(case))
    else:
        path = file = easyedit_file(tmp_path)
        entries = [easyedit_entry(case_id) for case_id in range(2)]
        change(entries[1])
        file.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=expected) as raised:
        load(path)
    (problem,) = raised.value.problems
    assert problem.startswith(str(path)) and "\n" not in problem
    result = CliRunner().invoke(app, ["show", str(path)])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b'[{"case_id": 1}]', b"[" * 100_000]
)
def test_a_file_that_is_no_result_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ROME_results.json").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path)
    (problem,) = raised.value.problems
    assert "ROME_results.json" in problem and len(problem) < 600


def test_many_bad_files_are_reported_by_the_first_of_them(tmp_path: Path) -> None:
    run = memit_folder(tmp_path, number=40)
    for file in run.glob("*case_*.json"):
        file.write_text("{")
    with pytest.raises(ConfigError) as raised:
        load_runs([run])
    assert len(raised.value.problems) == 9 and "32 more problems" in raised.value.problems[-1]


def test_a_likelihood_that_is_not_a_number_counts_as_a_failure_and_is_counted(
    tmp_path: Path,
) -> None:
    run = memit_folder(tmp_path)
    case = memit_case(0)
    case["post"]["rewrite_prompts_probs"] = [{"target_new": math.nan, "target_true": 2.0}]
    (run / "2_edits-case_0.json").write_text(json.dumps(case))
    loaded = load(run)
    (record,) = loaded.find(metric="efficacy", protocol="probability")
    assert (record.measurement.value, record.measurement.nonfinite) == (0.0, 1)
    (magnitude,) = loaded.find(metric="efficacy_magnitude", protocol="probability")
    assert magnitude.measurement.value is None


def test_a_folder_without_any_run_says_what_it_could_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run .*MEMIT's case_\*\.json or EasyEdit's"):
        load_runs([tmp_path])
