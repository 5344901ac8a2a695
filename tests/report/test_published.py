"""The papers' numbers next to the measured ones, collapse points, and files of numbers that cannot
be read.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from editkit.errors import ConfigError
from editkit.records.find import load_runs
from editkit.report import formats
from editkit.report.compare.against_published import (
    HEAD,
    cells_of,
    compare_with_published,
    notes_of,
)
from editkit.report.compare.collapse import collapses
from editkit.report.compare.published import load_published
from editkit.report.compare.subjects import Measured, measured
from editkit.report.page import Content, page
from tests.support.records import editing
from tests.support.sweeps import add_run, config_of, evals_of


def subjects_in(root: Path) -> tuple[Measured, ...]:
    return measured(load_runs([root]))[0]


HEADER = "preset,source,table,row,value,unit,model,editor,restraint,dataset,edits,metric,protocol\n"


def published(folder: Path, *lines: str) -> Path:
    path = folder / "published.csv"
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


def test_published_numbers_stand_beside_those_of_the_preset_that_repeats_them(
    tmp_path: Path,
) -> None:
    for seed, value in enumerate((0.5, 0.7)):
        add_run(
            tmp_path / "runs",
            config_of(seed, restraint={}, model="gptj-6b", name="d4s-table2_gptj"),
            evals_of(efficacy={"unrestrained": value}),
        )
    path = published(
        tmp_path,
        "d4s/table2_gptj,D4S,Table 2,ROME,1.17,%,gptj-6b,rome,none,world,4,efficacy,probability",
        "d4s/table2_gptj,D4S,Table 2,MEMIT,98.25,%,gptj-6b,memit,none,world,4,efficacy,probability",
        "d4s/table2_gptj,D4S,Table 2,ROME,1.17,%,gptj-6b,rome,none,world,4,efficacy,token",
        "d4s/table2_gptj,D4S,Table 2,ROME,3.5,,gptj-6b,rome,none,world,4,total_sigma_max,",
        "d4s/table9,D4S,Table 9,ROME,1,%,gptj-6b,rome,none,world,4,efficacy,",
    )
    found = compare_with_published(subjects_in(tmp_path / "runs"), load_published([path]))
    assert [each.measured.mean if each.measured else None for each in found] == [
        pytest.approx(60.0),
        None,
        None,
        None,
    ]
    assert not any(each.is_stand_in for each in found)


def test_a_bundled_model_stands_in_at_the_milestones_of_the_same_place_whatever_their_number(
    tmp_path: Path,
) -> None:
    config = config_of(
        0, restraint={}, model="tiny-gptj", name="d4s-table2_gptj-tiny", milestones=[0, 2, 4]
    )
    evals = [editing(step, "efficacy", value) for step, value in ((0, 0.0), (1, 0.75), (2, 0.25))]
    add_run(tmp_path / "runs", config, evals)
    lines = [
        f"d4s/table2_gptj,D4S,Table 2,ROME,9,%,gptj-6b,rome,none,zsre,{edits},efficacy,probability"
        for edits in (4, 1000)  # 4 is the first of the paper's milestones and the last of ours
    ]
    found = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, *lines)])
    )
    assert [
        (each.published.edits, each.edits, each.measured.mean if each.measured else None)
        for each in found
    ] == [
        (4, 2, 75.0),
        (1000, 4, 25.0),
    ]
    assert all(each.is_stand_in for each in found)
    assert notes_of(found) == [
        "milestones are matched by their place in the run: 4, 1,000 edits of the paper beside 2, 4 "
        "of ours."
    ]


def test_a_real_models_milestone_is_that_of_the_published_number_and_no_other(
    tmp_path: Path,
) -> None:
    config = config_of(0, restraint={}, model="gptj-6b", name="d4s-table4", milestones=[0, 2, 4])
    add_run(tmp_path / "runs", config, evals_of(efficacy={"unrestrained": 0.25}, steps=(0, 1, 2)))
    lines = [
        f"d4s/table4,D4S,Table 4,ROME,9,%,gptj-6b,rome,none,world,{edits},efficacy,probability"
        for edits in (2, 3)
    ]
    found = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, *lines)])
    )
    assert [(each.edits, each.measured is None) for each in found] == [(2, False), (None, True)]
    assert notes_of(found) == []


def test_zsres_locality_has_its_own_name_and_a_stand_in_without_it_gives_its_locality(
    tmp_path: Path,
) -> None:
    """The papers' average takes the locality that the dataset has."""
    metrics = {"efficacy": 0.9, "generalization": 0.6, "locality_out_of_distribution": 0.3}
    for name, model, named in (
        ("d4s-table2_gptj", "gptj-6b", metrics),
        ("d4s-table2_gptj-tiny", "tiny-gptj", {**metrics, "locality": 0.6}),
    ):
        if model == "tiny-gptj":
            named.pop("locality_out_of_distribution")
        config = config_of(0, restraint={}, model=model, name=name, milestones=[0, 4])
        evals = [editing(2, metric, value) for metric, value in named.items()]
        add_run(tmp_path / "runs", config | {"dataset": {"name": "zsre"}}, evals)
    lines = [
        f"d4s/table2_gptj,D4S,Table 2,ROME,9,%,gptj-6b,rome,none,zsre,4,{metric},probability"
        for metric in ("locality_out_of_distribution", "average")
    ]
    found = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, *lines)])
    )
    assert [each.measured and each.measured.mean for each in found] == [
        pytest.approx(value) for value in (30.0, 60.0, 60.0, 70.0)
    ]
    assert [each.remark != "" for each in found] == [False, False, True, False]
    assert "measured is its locality" in found[2].remark


def test_locality_and_specificity_are_each_compared_with_their_own_kind(tmp_path: Path) -> None:
    config = config_of(0, restraint={}, model="gptj-6b", name="d4s-table2_gptj")
    evals = [editing(2, "locality", 1.0), editing(2, "specificity", 0.0004)]
    add_run(tmp_path / "runs", config, evals)
    lines = [
        f"d4s/table2_gptj,X,Table 2,ROME,9,%,gptj-6b,rome,none,world,4,{metric},probability"
        for metric in ("locality", "specificity")
    ]
    found = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, *lines)])
    )
    assert [each.measured and each.measured.mean for each in found] == [100.0, 0.04]


WIDE = HEADER.replace("protocol\n", "protocol,options,not_measured,note\n")


def test_a_row_that_no_run_can_have_is_published_only_and_says_why(tmp_path: Path) -> None:
    add_run(
        tmp_path / "runs",
        config_of(0, restraint={}, model="gptj-6b", name="d4s-table2_gptj"),
        evals_of(efficacy={"unrestrained": 0.5}),
    )
    path = tmp_path / "published.csv"
    start = "d4s/table2_gptj,D4S,Table 2"
    path.write_text(
        f"{WIDE}{start},GRACE,99,%,gptj-6b,grace,none,world,4,efficacy,argmax,,editkit has none.,\n"
        f"{start},MEMIT,98,%,gptj-6b,memit,none,world,4,efficacy,argmax,,,\n"
    )
    found = compare_with_published(subjects_in(tmp_path / "runs"), load_published([path]))
    assert [cells_of(each)[-4:] for each in found] == [
        ["", "", "", "published only"],
        ["-", "-", "-", "-"],
    ]
    assert notes_of(found) == ["published only: editkit has none."]
    nothing = dict.fromkeys(("runs", "notes", "tables", "drawings", "collapses"), ())
    text = page(Content(title="a", published=found, comparisons={}, **nothing))
    assert text.count("<tr class=only>") == 1


def test_a_row_can_name_options_that_a_run_must_have(tmp_path: Path) -> None:
    for objective, value in (("target", 0.9), ("prompt_last", 0.2)):
        config = config_of(0, restraint={}, editor="ft", model="gptj-6b", name="memoe-table2")
        config["editor"]["objective"] = objective
        add_run(tmp_path / "runs", config, evals_of(efficacy={"unrestrained": value}))
    path = tmp_path / "published.csv"
    path.write_text(
        WIDE
        + "".join(
            f"memoe/table2,M,Table 2,{row},9,%,gptj-6b,ft,none,world,4,efficacy,probability,"
            f"editor.objective={objective},,\n"
            for row, objective in (("FT-L", "prompt_last"), ("FT-M", "target"), ("FT-X", "none"))
        )
    )
    found = compare_with_published(subjects_in(tmp_path / "runs"), load_published([path]))
    assert [each.measured and each.measured.mean for each in found] == [20.0, 90.0, None]


def test_fluency_is_compared_in_hundredths_of_a_bit(tmp_path: Path) -> None:
    config = config_of(0, restraint={}, model="gptj-6b", name="knowedit-table4")
    add_run(tmp_path / "runs", config, [editing(2, "fluency_bits", 5.5, protocol="text")])
    line = "knowedit/table4,K,Table 4,ROME,574.28,bits x 100,gptj-6b,rome,none,world,4,fluency_bits,text"
    (found,) = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, line)])
    )
    assert cells_of(found)[-5:] == ["574.28 bits x 100", "gptj-6b", "world", "4", "550.0"]


def test_two_datasets_of_one_row_are_told_apart_also_where_one_stands_in_for_both(
    tmp_path: Path,
) -> None:
    config = config_of(0, restraint={}, model="tiny-gptj", name="d4s-table3-tiny")
    add_run(tmp_path / "runs", config, evals_of(efficacy={"unrestrained": 0.25}))
    lines = [
        f"d4s/table3,D4S,Table 3,ROME,{v},%,gptj-6b,rome,none,{d},4,efficacy,probability"
        for d, v in (("counterfact", 32.8), ("mquake", 17))
    ]
    found = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, *lines)])
    )
    rows = [dict(zip(HEAD, cells_of(each), strict=True)) for each in found]
    assert len(HEAD) == len(set(HEAD))
    assert [
        (row["paper's dataset"], row["published"], row["our dataset"], row["measured"])
        for row in rows
    ] == [
        ("counterfact", "32.8 %", "world", "25.0"),
        ("mquake", "17 %", "world", "25.0"),
    ]
    assert "| mquake | 4 | 17 % | tiny-gptj | world | 4 | 25.0 |" in formats.published_markdown(
        found
    )
    assert r"mquake & 4 & 17 \% & tiny-gptj & world & 4 & 25.0 \\" in formats.published_latex(found)


def test_the_only_published_number_of_edits_is_compared_with_a_stand_ins_last_milestone(
    tmp_path: Path,
) -> None:
    config = config_of(
        0, restraint={}, model="tiny-llama", name="d4s-table4-tiny", milestones=[0, 2, 4]
    )
    add_run(
        tmp_path / "runs",
        config,
        evals_of(efficacy={"unrestrained": 0.1}, entailment=0.9, steps=(0, 1, 2)),
    )
    line = "d4s/table4,D4S,Table 4,D4S,43,%,llama2-7b,rome,none,zsre,10000,entailment,"
    (found,) = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, line)])
    )
    assert (found.edits, found.measured and found.measured.mean) == (4, 90.0)


@pytest.mark.parametrize(
    ("efficacy", "measured"),
    [((0.9, 0.8), "at least 4"), ((0.9, 0.4), "2"), ((0.4, 0.9), "0"), ((0.9, None), "2")],
)
def test_effective_edits_end_at_the_collapse_point_and_name_its_threshold(
    efficacy: tuple[float, float | None], measured: str, tmp_path: Path
) -> None:
    evals = [
        editing(step, "efficacy", value)
        for step, value in zip((0, 1, 2), (0.0, *efficacy), strict=True)
    ]
    config = config_of(
        0,
        restraint={},
        model="gptj-6b",
        name="d4s-figure4",
        evaluation={"thresholds": {"efficacy": 0.45}},
    )
    add_run(tmp_path / "runs", config, evals)
    line = "d4s/figure4,D4S,Section 4.2,ROME,100,edits,gptj-6b,rome,none,world,,effective_edits,probability"
    (found,) = compare_with_published(
        subjects_in(tmp_path / "runs"), load_published([published(tmp_path, line)])
    )
    assert cells_of(found)[-1] == measured
    assert "of 0.45 or more" in notes_of([found])[0] and "0.45" in formats.published_markdown(
        [found]
    )


def test_the_collapse_points_of_all_subjects_are_a_table_seed_by_seed(tmp_path: Path) -> None:
    for seed, value in enumerate((0.2, 0.8)):
        add_run(
            tmp_path,
            config_of(seed, restraint={}),
            evals_of(efficacy={"unrestrained": value}, entailment=0.9),
        )
    (found,) = collapses(subjects_in(tmp_path))
    (cells,) = found.cells
    assert found.labels == (("tiny-gpt2", "rome", "none"),)
    assert dict(zip(found.columns, cells, strict=True)) == {
        "efficacy (probability) < 0.5": "4; more than 4",
        "efficacy (argmax) < 0.5": "more than 4",
        "entailment accuracy < 0.5 x unedited": "more than 4",
    }


def test_malformed_lines_of_a_published_file_are_all_told(tmp_path: Path) -> None:
    lines = [
        "a,b,c,d,much,,m,e,r,d,1,x,p",
        "a,,c,d,1,,m,e,r,d,1,x,p",
        "a,b,c,d,NaN,,m,e,r,d,1,x,p",
        "a,b,c,d,1,,m,e,r,d,1e2,x,p",
    ]
    path = published(tmp_path, *lines, "a,b, and more,c,d,1,,m,e,r,d,1,x,p")
    with pytest.raises(ConfigError) as error:
        load_published([path])
    told = [problem.removeprefix(f"{path}:") for problem in error.value.problems]
    assert [each.split(": ", 1)[1].split(" ")[0] for each in told] == [
        "value:",
        "source:",
        "value:",
        "edits:",
        "more",
    ]
    assert [each[0] for each in told] == ["2", "3", "4", "5", "6"]


def test_published_files_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    contents = {
        "latin.csv": HEADER.encode() + b"\xe9",
        "short.csv": b"preset,source\n",
        "long.csv": HEADER.encode() + b"x" * 200_000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_published([tmp_path, tmp_path / "nofile.csv", *(tmp_path / name for name in contents)])
    reasons = (
        "Is a directory",
        "No such file",
        "no text in UTF-8",
        "without the columns table, row",
        "comma-separated",
    )
    assert [
        reason
        for reason, problem in zip(reasons, error.value.problems, strict=True)
        if reason not in problem
    ] == []


def test_a_published_file_from_a_spreadsheet_begins_with_a_mark(tmp_path: Path) -> None:
    path = published(tmp_path, "a,b,c,d,1.5,,m,e,r,d,,x,p")
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    (found,) = load_published([path])
    assert (found.preset, found.value, found.note) == ("a", 1.5, "")
