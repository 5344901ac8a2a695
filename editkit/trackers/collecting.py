"""Progress of what is collected before the first step, with the estimated time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY_S = 30.0  # without a terminal


class Collecting:
    """Shows on stderr how many of the documents, or of something else, are done."""

    def __init__(self, console: Console, bar: Progress, unit: str) -> None:
        self._console, self._bar, self._unit = console, bar, unit
        self._start: tuple[float, int] | None = (
            None  # when this process began, and how many documents were done before
        )
        self._last_line_at = 0.0

    def announce(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def progress(self, done: int, of: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
            self._last_line_at = now
            if self._console.is_terminal:
                self._bar.add_task(self._unit, total=of, completed=done, left="")
            return
        left = left_text(now - self._start[0], done=done - self._start[1], remaining=of - done)
        if self._console.is_terminal:
            self._bar.update(self._bar.task_ids[0], completed=done, left=left)
        elif now - self._last_line_at >= LINE_EVERY_S or done == of:
            self._last_line_at = now
            self.announce(f"{self._unit} {done} of {of}{', ' + left if left else ''}")


@contextlib.contextmanager
def collecting(unit: str = "documents") -> Iterator[Collecting]:
    """A progress bar on a terminal, a line every 30 seconds elsewhere. Nothing is shown if nothing
    is computed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        yield Collecting(console, bar, unit)


def left_text(seconds: float, *, done: int, remaining: int) -> str:
    """The remaining time at the pace so far; empty if it is unknown or nothing remains."""
    if done <= 0 or remaining <= 0:
        return ""
    left = seconds / done * remaining
    hours, minutes = divmod(round(left / 60), 60)
    return (
        f"{left:.0f} s left"
        if left < 90
        else f"{minutes} min left"
        if not hours
        else f"{hours} h {minutes} min left"
    )
