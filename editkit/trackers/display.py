"""One run on the screen, opened by the `Console` tracker."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.records.tracker import RunInfo, Status
from editkit.report.tables import Table, default_protocol, formatted, number, summarise
from editkit.trackers.watch import Watch
from editkit.types import EvalRecord, StepRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ENDINGS = {
    "done": "done",
    "interrupted": "interrupted, state saved",
    "collapsed": "stopped at a number that is not finite",
    "failed": "failed",
}


def say_warning(text: str, *, out: Console | None = None) -> None:
    """Shows a warning, above the progress bar if there is one."""
    from rich.console import Console

    (out or Console(highlight=False)).print(
        f"warning: {text}", style="yellow", markup=False, soft_wrap=True
    )


class Display:
    """Follows the records of one run. It keeps those of milestones only, so that a run of 10,000
    edits does not fill the memory.
    """

    def __init__(self, info: RunInfo, watch: Watch) -> None:
        from rich.console import Console

        self._info = info
        self._watch = watch
        self._out = Console(highlight=False)
        self._steps: dict[int, StepRecord] = {}  # of milestones, by step
        # A run that measures nothing but weights has no evaluations at its milestones.
        self._milestones: tuple[int, ...] = ()  # in edits
        if info.unit == "edits":
            self._milestones = tuple(info.config.get("milestones") or ())
        self._measured = {-(-edits // info.batch_size) for edits in self._milestones}  # steps
        self._evals: dict[tuple[object, ...], EvalRecord] = {}
        self._last: StepRecord | None = None
        self._condition = math.nan  # the latest measured one, the maximum over the matrices
        self._seconds, self._edits = 0.0, 0  # spent on edits in this session, without measuring
        self._started = time.monotonic()
        if info.resumed_at:
            self._recall()
        past = f", resumed after step {info.resumed_at}" if info.resumed_at else ""
        self._print(f"{info.name}: {info.edits} {info.unit}; views: {', '.join(info.views)}{past}")
        self._bar: Progress | None = (
            _progress(self._out, info.unit) if self._out.is_terminal else None
        )
        if self._bar is not None:
            self._bar.add_task(
                "", total=info.edits, completed=self._edits_at(info.resumed_at), figures=""
            )
            self._bar.start()

    def step(self, record: StepRecord) -> None:
        self._print_milestone()
        self._last = record
        for text in self._watch.look(record):
            self.warn(text)
        self._condition = max(
            (figures.get("condition_number", math.nan) for figures in record.modules.values()),
            default=self._condition,
        )
        if record.step in (0, *self._measured):
            self._steps[record.step] = record
        self._edits += len(record.requests)
        self._seconds += sum(record.seconds.values())
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self._edits_at(record.step),
                figures=", ".join(
                    [*self._figures(), f"condition number {number(self._condition)}"]
                ),
            )

    def evaluation(self, record: EvalRecord) -> None:
        if self._last is not None and self._last.step == record.step:
            self._steps[record.step] = self._last
        self._evals[_identity(record)] = record

    def warn(self, text: str) -> None:
        say_warning(text, out=self._out)

    def close(self, status: Status) -> None:
        from editkit.report.show import Summary

        self._print_milestone()
        if self._bar is not None:
            self._bar.stop()
        title = f"{self._info.name}: {ENDINGS[status]}"
        self._out.print()
        try:
            self._out.print(
                Summary(title=title, table=self._table(list(self._evals.values()), self._steps))
            )
        except ConfigError as error:  # a table that cannot be drawn must not cost the run
            self._print(f"{title}; no table: {error}")
        if self._watch.num_nonfinite:
            self.warn(f"{self._watch.num_nonfinite} steps had numbers that are not finite")
        self._print(f"records, state and figures: {self._info.folder}")

    def _recall(self) -> None:
        """Reads the records of earlier sessions, so that the final table and the thresholds cover
        the whole run.
        """
        from editkit.records.reader import load_run

        try:
            past = load_run(self._info.folder)
        except ConfigError as error:
            self.warn(f"the table begins after step {self._info.resumed_at}: {error}")
            return
        self._evals = {
            _identity(record): record
            for record in past.evals
            if record.step <= self._info.resumed_at
        }
        measured = {0, *self._measured, *(record.step for record in self._evals.values())}
        for record in past.steps:
            if record.step <= self._info.resumed_at:
                list(self._watch.look(record))  # their warnings were shown then
                if record.step in measured:
                    self._steps[record.step] = record

    def _print(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)

    def _print_milestone(self) -> None:
        """Prints a line for a milestone once its measurements are complete, which the next record
        shows.
        """
        if self._last is None:
            return
        step = self._last.step
        evals = [record for record in self._evals.values() if record.step == step]
        if not evals and step not in self._measured:
            return
        try:
            table = self._table(evals, {step: self._steps[step]})
        except ConfigError as error:
            self.warn(str(error))
            return
        parts = [
            f"{self._edits_at(self._last.step)}/{self._info.edits} {self._info.unit}",
            *self._figures(),
        ]
        for row in table.rows:
            measured = zip(table.columns, formatted(table, row), row.cells, strict=True)
            parts.append(
                f"{row.view}: "
                + ", ".join(
                    f"{column.title} {text}" for column, text, cell in measured if cell is not None
                )
            )
        self._print(" | ".join(parts))

    def _table(self, evals: list[EvalRecord], steps: Mapping[int, StepRecord]) -> Table:
        shown = {*steps, *(record.step for record in evals)}
        edits = {step: self._edits_at(step) for step in sorted(shown)}
        return summarise(
            list(steps.values()),
            evals,
            edits=edits,
            protocol=default_protocol(evals),
            trajectory=self._info.views[0],
            milestones=self._milestones,
        )

    def _edits_at(self, step: int) -> int:
        return min(step * self._info.batch_size, self._info.edits)

    def _figures(self) -> list[str]:
        """Seconds an edit, the time left, and the loss of the last edit."""
        figures = []
        if self._edits and self._last is not None:
            remaining = self._info.edits - self._edits_at(self._last.step)
            # Wall time, measuring included. Later milestones measure more edits, so the time left
            # is somewhat underestimated.
            left_s = (time.monotonic() - self._started) / self._edits * remaining
            figures.append(f"{self._seconds / self._edits:.2f} s/edit")
            if remaining:
                figures.append(f"{datetime.timedelta(seconds=round(left_s))} left")
            if "loss" in self._last.target:
                figures.append(f"loss {self._last.target['loss']:.3g}")
        return figures


def _identity(record: EvalRecord) -> tuple[object, ...]:
    """Identifies a measurement: a resumed run may repeat the last milestone."""
    part = (record.measurement.block, record.measurement.subset)
    return (
        record.step,
        record.view,
        record.measurement.kind,
        record.measurement.suite,
        record.measurement.task,
        record.measurement.metric,
        record.measurement.protocol,
        record.measurement.timing,
        part,
    )


def _progress(out: Console, unit: str) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    return Progress(*columns, console=out)
