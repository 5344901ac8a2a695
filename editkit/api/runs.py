"""`editkit.run`, `load_run`, `load_runs` and `export`: runs from Python."""

from __future__ import annotations

import signal
from pathlib import Path

from editkit.api.composing import composed_apart, kept_generators, kept_threads, override
from editkit.config.build import build
from editkit.config.explain import unwritable_is_invalid
from editkit.errors import ConfigError, message
from editkit.records import find, reader
from editkit.records.reader import RunRecords

STOPPED = 128  # plus the number of the signal


def run(*overrides: str, **settings: object) -> RunRecords:
    """Runs what `editkit run` would run, in this process, and returns the records.

    A run that is done already is not repeated, and an interrupted one is resumed. The records of a
    collapsed run have the status "failed".

    Args:
        overrides: as on the command line: "experiment=demo", "restraint.prune.alpha=1.5".
        settings: overrides without a dot, as Python values: edits=20, milestones=[0, 20].

    Raises:
        ConfigError: invalid settings or data; all problems are reported together.
        KeyboardInterrupt: Ctrl-C; the state is saved and the same call resumes the run.
    """
    lines = [*overrides, *(override(key, value) for key, value in settings.items())]
    configuration = composed_apart(lines)
    if sweep := configuration.choices.get("sweep"):
        problem = "a sweep is more than one run"
        fix = f"use `editkit run sweep={sweep}`, or call run for each of its runs"
        raise ConfigError(message("sweep", problem, got=sweep, fix=fix))
    experiment = build(configuration.config, choices=configuration.choices)

    from editkit.runner import session

    with unwritable_is_invalid(experiment.folder), kept_generators(), kept_threads():
        code = session.run(experiment)
    if code > STOPPED:
        signal.raise_signal(code - STOPPED)  # the run's own handler is gone
    return reader.load_run(experiment.folder)


def load_run(folder: str | Path) -> RunRecords:
    """The records of one run, from its folder: `outputs/<experiment>/<name>-<hash>/seed<k>`; or of
    a foreign run.

    Raises:
        ConfigError: the folder is not a run's, or holds malformed lines.
    """
    return find.load(Path(folder).expanduser())


def load_runs(*folders: str | Path) -> tuple[RunRecords, ...]:
    """The records of all runs at or below these folders.

    Raises:
        ConfigError: a folder holds no run, or a run cannot be read.
    """
    return find.load_runs(Path(folder).expanduser() for folder in folders)


def export(run: RunRecords | str | Path, to: str | Path, *, view: str | None = None) -> None:
    """Writes the edited model of a run's last checkpoint as a folder for `from_pretrained`.

    Args:
        run: its records or its folder.
        to: a folder that does not exist yet, or an empty one.
        view: a restrained view ("prune"); by default the model as the run left it.

    Raises:
        ConfigError: there is no such run, view or checkpoint, or `to` is not empty.
    """
    from editkit.runner.export import export as export_run

    folder = run.folder if isinstance(run, RunRecords) else Path(run).expanduser()
    export_run(folder, Path(to).expanduser(), view=view)
