"""What a person sees of a run, on a terminal and in a file."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from editkit.config.schema import Problems, construct
from editkit.errors import ConfigError
from editkit.records.tracker import AbstractTracker, RunInfo
from editkit.report.show import show
from editkit.trackers.console import Console
from editkit.trackers.none import Silent
from editkit.trackers.watch import Watch
from editkit.types import EvalRecord, StepRecord, as_json
from tests.support.records import evaluation

MODULE = "transformer.h.3.mlp.c_proj"


def a_step(step: int, *, condition: float = 40.0, loss: float = 0.04) -> StepRecord:
    return StepRecord(
        step=step,
        requests=(f"world/{step}",) if step else (),
        seconds={"target": 0.25, "solve": 0.25} if step else {},
        target={"loss": loss} if step else {},
        modules={MODULE: {"condition_number": condition, "l1_norm": 512.0}},
    )


def efficacy(step: int, view: str, value: float = 0.875) -> EvalRecord:
    return evaluation(
        step=step,
        view=view,
        kind="editing",
        metric="efficacy",
        value=value,
        stderr=0.1,
        n=8,
        protocol="probability",
        timing="milestone",
    )


def a_run(folder: Path, *, resumed_at: int = 0) -> RunInfo:
    return RunInfo(
        name="tiny-rome",
        folder=folder,
        edits=10,
        batch_size=1,
        views=("unrestrained", "prune"),
        config={},
        resumed_at=resumed_at,
    )


def watch_run(
    tracker: AbstractTracker,
    folder: Path,
    *,
    begin: int = 0,
    end: int = 10,
    milestones: tuple[int, ...] = (5, 10),
) -> None:
    tracker.open(a_run(folder, resumed_at=max(begin - 1, 0)))
    for step in range(begin, end + 1):
        tracker.step(a_step(step, condition=40.0 + step))
        for view in ("unrestrained", "prune") if step in milestones else ():
            tracker.evaluation(efficacy(step, view))
    tracker.close("done" if end == 10 else "interrupted")


def write_records(folder: Path, *, end: int, milestones: tuple[int, ...] = (5, 10)) -> None:
    steps = [a_step(step, condition=40.0 + step) for step in range(end + 1)]
    evals = [
        efficacy(step, view)
        for step in milestones
        if step <= end
        for view in ("unrestrained", "prune")
    ]
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps(as_json(record)) + "\n" for record in steps)
    )
    (folder / "evals.jsonl").write_text(
        "".join(json.dumps(as_json(record)) + "\n" for record in evals)
    )


@pytest.fixture(autouse=True)
def wide_and_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def test_in_a_file_there_is_one_line_per_milestone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watch_run(Console(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    first, last = [line for line in lines if "/10 edits" in line]
    assert first.startswith("5/10 edits | 0.50 s/edit | ")
    assert (
        "loss 0.04 | unrestrained: efficacy 87.5, condition number 45.0, L1 norm 512.0 | prune: efficacy 87.5"
        in first
    )
    assert last.startswith("10/10 edits")
    assert "\x1b" not in "".join(lines)


def test_the_final_table_is_that_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import io

    from rich.console import Console as RichConsole

    watch_run(Console(), tmp_path)
    shown = capsys.readouterr().out
    write_records(tmp_path, end=10)
    again = RichConsole(width=120, file=io.StringIO())
    again.print(show(tmp_path))
    rows = [line for line in again.file.getvalue().splitlines() if "87.5" in line]
    assert len(rows) == 4
    assert all(row in shown for row in rows)


def test_on_a_terminal_there_is_a_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    watch_run(Console(), tmp_path)
    shown = capsys.readouterr().out
    assert "10/10" in shown
    assert "0.50 s/edit, loss 0.04, condition number 50.0" in shown


def test_after_a_resume_the_table_holds_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watch_run(Console(), tmp_path)
    whole = capsys.readouterr().out
    write_records(tmp_path, end=6)
    watch_run(Console(), tmp_path, begin=7)
    resumed = capsys.readouterr().out
    assert "resumed after step 6" in resumed
    assert resumed[resumed.index("tiny-rome: done") :] == whole[whole.index("tiny-rome: done") :]


def test_a_lost_record_file_costs_the_table_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watch_run(Console(), tmp_path, begin=7)
    assert "the table begins after step 6" in capsys.readouterr().out


def test_a_run_that_was_cut_off_before_any_milestone_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watch_run(Console(), tmp_path, end=3)
    assert (
        "tiny-rome: interrupted, state saved: no milestone was measured yet."
        in capsys.readouterr().out
    )


def test_a_run_that_measures_nothing_but_weights_ends_with_their_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tracker = Console()
    tracker.open(replace(a_run(tmp_path), config={"milestones": [0, 4, 10]}, batch_size=2))
    for step in range(6):
        tracker.step(a_step(step, condition=40.0 + step))
    tracker.close("done")
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "/10 edits" in line]
    assert [line.partition(" ")[0] for line in lines] == ["0/10", "4/10", "10/10"]
    assert "unrestrained: condition number 42.0, L1 norm 512.0" in lines[1]
    table = shown[shown.index("tiny-rome: done") :]
    rows = [line.split() for line in table.splitlines() if "512.0" in line]
    assert [row[-4:] for row in rows] == [
        [edits, condition, "512.0", "-"]
        for edits, condition in (("0", "40.0"), ("4", "42.0"), ("10", "45.0"))
    ]
    assert "no milestone" not in shown


def test_warnings_are_shown_before_during_and_after_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tracker = Console()
    tracker.warning("statistics [are] old")
    watch_run(tracker, tmp_path)
    tracker.warning("over")
    tracker.open(a_run(tmp_path))
    tracker.warning("meanwhile")
    tracker.close("failed")
    tracker.close("failed")  # closing twice does no harm
    shown = capsys.readouterr().out
    assert all(
        f"warning: {text}" in shown for text in ("statistics [are] old", "over", "meanwhile")
    )


def test_a_running_condition_number_and_loss_are_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tracker = Console(condition_ratio=2.0)
    tracker.open(a_run(tmp_path))
    for step in range(9):
        tracker.step(a_step(step, condition=40.0 * (step + 1)))
    tracker.step(a_step(9, loss=3.0))
    tracker.close("done")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning: step 2: condition number of {MODULE} 120, 3 times the unedited 40",
        "warning: step 9: loss 3, 75 times the median 0.04 of those before",
    ]


def warnings_of(records: list[StepRecord], **options: float) -> list[str]:
    watch = Watch(**({"condition_ratio": 100.0, "loss_ratio": 10.0, "loss_window": 50} | options))
    return [text for record in records for text in watch.look(record)]


def test_a_warning_is_repeated_when_it_is_ten_times_worse():
    found = warnings_of([a_step(step, condition=10.0**step) for step in range(8)])
    assert [text.split(":")[0] for text in found] == ["step 3", "step 5", "step 7"]


def test_a_sound_run_is_not_warned_of():
    assert (
        warnings_of(
            [
                a_step(step, condition=40.0 + step, loss=0.04 + 0.01 * (step % 5))
                for step in range(200)
            ]
        )
        == []
    )


def test_numbers_that_are_not_finite_are_warned_of_with_their_requests():
    records = [
        a_step(0),
        replace(a_step(1), nonfinite="weight of m"),
        a_step(2, loss=math.nan),
        a_step(3, condition=math.inf),
    ]
    assert warnings_of(records[:2]) == ["step 1: weight of m is not finite; requests world/1"]
    assert warnings_of([records[0], records[2]]) == ["step 2: loss is not finite; requests world/2"]
    assert warnings_of([records[0], records[3]]) == [
        f"step 3: condition number of {MODULE} is not finite; requests world/3"
    ]
    many = [replace(a_step(step), nonfinite="loss") for step in range(1, 101)]
    assert [text.split(":")[0] for text in warnings_of(many)] == ["step 1", "step 10", "step 100"]


def test_options_are_checked_and_frozen():
    with pytest.raises(ConfigError) as caught:
        Console(condition_ratio=0.5, loss_window=0)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "condition_ratio: out of range (got 0.5",
        "loss_window: out of range (got 0",
    ]
    with pytest.raises(FrozenInstanceError):
        Console().loss_ratio = 1.0  # type: ignore[misc]


def test_only_options_can_be_set_from_a_configuration():
    problems = Problems()
    assert construct({"loss_ratio": 5.0}, "tracker", Console, problems) == Console(loss_ratio=5.0)
    construct({"_open": []}, "tracker", Console, problems)
    assert problems.messages == [
        "tracker._open: unknown option of Console "
        "(expected one of condition_ratio, loss_ratio, loss_window)."
    ]


def test_silence_shows_nothing_and_logs_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    watch_run(Silent(), tmp_path)
    Silent().warning("old statistics")
    assert capsys.readouterr() == ("", "")
    assert caplog.messages == ["old statistics"]
