"""One W&B run, as the tracker and `editkit push` write it. wandb is imported when it is opened."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from editkit.errors import ConfigError, message
from editkit.files import read_object, write_atomically
from editkit.records.reader import load_run
from editkit.report.labels import labels
from editkit.trackers.history import STEP, evaluation_table, sample_key, sample_table
from editkit.trackers.remote import AbstractDestination
from editkit.types import SampleRecord

Mode = Literal["online", "offline", "disabled"]
MARKER = "wandb.json"  # in a run's folder: the location of its W&B run
MAX_TAG = 64  # characters, W&B's limit
INSTALL = "pip install 'editkit[wandb]'"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The destination of a run, and what is sent besides its numbers."""

    mode: Mode
    project: str
    entity: str | None
    job_type: str = "edit"
    tags: Sequence[str] = ()
    max_samples: int = 50
    figures: bool = True
    artifacts: bool = False
    timeout_s: float = 60.0


def require_wandb() -> str | None:
    """The reason why W&B cannot be used; None if it can."""
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed"
    return None


def read_marker(folder: Path) -> dict[str, Any]:
    """The content of `wandb.json`; empty if it cannot be read."""
    return read_object(folder / MARKER)


class WandbRun(AbstractDestination):
    """An open W&B run. Every method may raise W&B's errors; the caller handles them."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], target: Target, *, id: str, resume: bool
    ) -> None:
        """Opens it.

        Args:
            folder: of the cell.
            config: resolved.
            resume: whether to continue a run of this id. W&B then ignores rows of steps that it
                has; otherwise such a run is replaced.
        """
        import wandb

        self._folder, self._target = folder, target
        named = labels(config)
        tags = dict.fromkeys(
            [
                named["model"],
                named["editor"],
                *named["restraint"].split("+"),
                named["dataset"],
                named["suite"],
                *target.tags,
            ]
        )
        (folder / "wandb").mkdir(
            parents=True, exist_ok=True
        )  # without it W&B falls back to a temporary folder
        self._run = wandb.init(
            project=target.project,
            entity=target.entity,
            id=id,
            resume="allow" if resume else None,
            name=f"{config.get('name') or folder.parent.name}/{folder.name}",
            group=str(config.get("experiment_name") or folder.parent.parent.name),
            job_type=target.job_type,
            tags=[tag[:MAX_TAG] for tag in tags],
            config={
                **config,
                **{f"label_{key}": value for key, value in named.items()},
            },  # flat: W&B groups by them
            dir=str(folder),
            mode=target.mode,
            reinit="create_new",  # beside other runs of this process, none of which is "the" run
            settings=wandb.Settings(
                console="off",
                quiet=True,
                save_code=False,
                init_timeout=target.timeout_s,
                finish_timeout=target.timeout_s,
            ),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def mark(self, *, pushed: str | None) -> None:
        """Writes the location of the W&B run into the cell's folder. `pushed` is the digest of the
        files that were sent completely.
        """
        url = self._run.url if self._target.mode == "online" else None
        where = {
            "id": self._run.id,
            "project": self._run.project,
            "entity": self._run.entity or None,
            "mode": self._target.mode,
        }
        write_atomically(
            self._folder / MARKER,
            json.dumps(where | {"url": url, "pushed": pushed}, indent=1).encode(),
        )

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Adds to the row of a step. W&B keeps a row open until a later step comes."""
        self._run.log(dict(row), step=step)

    def samples(self, record: SampleRecord) -> None:
        """A table of generations, in the row of its step."""
        import wandb

        if self._target.max_samples and record.rows:
            columns, rows = sample_table(record.rows, self._target.max_samples)
            self._run.log(
                {
                    STEP: record.step,
                    sample_key(record): wandb.Table(
                        columns=list[str | int](columns), data=list[Iterable[Any]](rows)
                    ),
                },
                step=record.step,
            )

    def conclude(self, *, failed: bool) -> None:
        """Sends the table of evaluations, figures and artifacts from the cell's folder, and waits
        for the upload.
        """
        import wandb

        records = load_run(self._folder)
        last = {STEP: records.steps[-1].step} if records.steps else {}
        extras: dict[str, Any] = {}
        if records.evals:
            columns, rows = evaluation_table(records.evals)
            extras["evaluations"] = wandb.Table(
                columns=list[str | int](columns), data=list[Iterable[Any]](rows)
            )
        if self._target.figures:
            extras |= {
                f"figures/{path.stem}": wandb.Image(str(path))
                for path in sorted(self._folder.glob("figures/*.png"))
            }
        if extras:
            self._run.log(last | extras, step=last.get(STEP))
        if self._target.artifacts:
            self._log_artifacts()
        self.finish(failed=failed)

    def finish(self, *, failed: bool) -> None:
        """Closes it. Logged rows are sent, or stay on the disk."""
        self._run.finish(exit_code=int(failed))

    def _log_artifacts(self) -> None:
        import wandb

        pointer = self._folder / "state" / "latest.json"
        delta = (
            [self._folder / "state" / json.loads(pointer.read_text())["file"], pointer]
            if pointer.exists()
            else []
        )
        for kind, paths in {"config": [self._folder / "config.yaml"], "delta": delta}.items():
            if paths and all(path.exists() for path in paths):
                artifact = wandb.Artifact(f"{self._run.id}-{kind}", type=kind)
                for path in paths:
                    artifact.add_file(str(path))
                self._run.log_artifact(artifact)


def sweep_run_id() -> str | None:
    """The id that `wandb agent` chose, if it started this process."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def checked(target: Target, key: str = "tracker") -> None:
    """Raises ConfigError for values that W&B would refuse later, and if it is not installed."""
    problems = []
    if target.mode != "disabled" and (missing := require_wandb()):
        problems.append(message(f"{key}=wandb", missing, fix=INSTALL))
    if not target.project:
        problems.append(message(f"{key}.project", "must be a name", got=target.project))
    if target.max_samples < 0:
        got = target.max_samples
        problems.append(
            message(f"{key}.max_samples", "out of range", got=got, expected="0 or more")
        )
    if target.timeout_s <= 0:
        problems.append(message(f"{key}.timeout_s", "must be positive", got=target.timeout_s))
    if problems:
        raise ConfigError(problems)
