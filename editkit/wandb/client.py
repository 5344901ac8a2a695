"""One W&B run, as the tracker and `editkit push` write it. wandb is imported when one is opened."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from editkit.errors import ConfigError
from editkit.files import read_object, write_atomically
from editkit.records.reader import load_run
from editkit.report.labels import labels
from editkit.types import SampleRecord
from editkit.wandb.history import STEP, evaluation_table, sample_key, sample_table

Mode = Literal["online", "offline", "disabled"]
MARKER = "wandb.json"  # in a run's folder: where its W&B run is
MAX_TAG = 64  # characters, W&B's limit


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run is sent to, and what goes with its numbers."""

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
    """What is missing, in a sentence; None if nothing is."""
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed: pip install 'editkit[wandb]'."
    return None


def run_id(folder: Path) -> str:
    """The id of a cell's W&B run: experiment, name with the configuration's hash, and seed,
    wherever the outputs are.
    """
    cell = "/".join(folder.absolute().parts[-3:])
    return hashlib.sha256(cell.encode()).hexdigest()[:16]


def read_marker(folder: Path) -> dict[str, Any]:
    """What `wandb.json` says; empty where there is none that can be read."""
    return read_object(folder / MARKER)


class WandbRun:
    """An open W&B run. Everything may raise; whoever calls decides what that means."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], target: Target, *, id: str, resume: bool
    ) -> None:
        """Opens it.

        Args:
            folder: the cell's. config: resolved. resume: whether to go on in a run of this id. W&B
            then ignores rows of steps that it has; otherwise such a run is replaced.
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
        """Notes in the cell's folder where its W&B run is; `pushed` is the digest of the files that
        it holds completely.
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
        """Adds to the row of a step; W&B keeps it open until a later step comes."""
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
        """Sends what the cell's folder holds in the end (table of evaluations, figures, artifacts),
        and waits for the upload.
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
        """Closes it; rows that were logged are sent or stay on the disk."""
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
    """The id that `wandb agent` has chosen, where it started this process."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def checked(target: Target, key: str = "tracker") -> None:
    """Raises ConfigError for values that W&B would refuse later, or if it is not installed."""
    problems = []
    if target.mode != "disabled" and (missing := require_wandb()):
        problems.append(f"{key}=wandb: {missing}")
    if not target.project:
        problems.append(f"{key}.project: a name is needed.")
    if target.max_samples < 0:
        problems.append(f"{key}.max_samples: {target.max_samples} was given; at least 0.")
    if target.timeout_s <= 0:
        problems.append(
            f"{key}.timeout_s: {target.timeout_s} was given; more than 0 seconds are needed."
        )
    if problems:
        raise ConfigError(problems)
