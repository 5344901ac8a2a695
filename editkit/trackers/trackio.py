"""Trackio: a local database, and a dashboard by `trackio show`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.errors import OptionError, message
from editkit.records.tracker import RunInfo
from editkit.trackers.remote import AbstractDestination, AbstractRemote, cell_name, label_values
from editkit.trackers.require import require_package

if TYPE_CHECKING:
    from trackio.run import Run


@dataclass(frozen=True, kw_only=True)
class Trackio(AbstractRemote):
    """Writes a run's numbers into Trackio's database.

    Raises:
        OptionError: the package trackio is not installed, or the project has no name.
    """

    title: ClassVar[str] = "Trackio"

    project: str
    space: str | None  # a Hugging Face Space that shows the runs; None: this machine only

    def __post_init__(self) -> None:
        require_package("trackio", extra="trackio")
        if not self.project:
            raise OptionError([message("project", "must be a name", got=self.project)])

    def connect(self, run: RunInfo) -> AbstractDestination:
        import trackio

        name = cell_name(run.folder)
        config = json.loads(json.dumps(run.config, default=str))
        opened = trackio.init(
            project=self.project,
            name=name,
            group=name.partition("/")[0],
            space_id=self.space,
            config=config
            | {f"label_{key}": text for key, text in label_values(run.config).items()},
            resume="allow" if run.resumed_at else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return _TrackioRun(opened)


class _TrackioRun(AbstractDestination):
    def __init__(self, run: Run) -> None:
        self._run = run

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        self._run.log(dict(row), step=step)

    def conclude(self, *, failed: bool) -> None:
        with _silent():
            self._run.log({"run/failed": int(failed)})
            self._run.finish()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Trackio prints advice; the terminal is the console's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
