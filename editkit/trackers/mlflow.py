"""MLflow: one MLflow run for each cell, in the experiment of the run's `experiment_name`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.records.tracker import RunInfo
from editkit.trackers.remote import (
    AbstractDestination,
    AbstractRemote,
    cell_id,
    cell_name,
    label_values,
)
from editkit.trackers.require import require_package

if TYPE_CHECKING:
    from mlflow import MlflowClient

CELL = "editkit.cell"  # the tag by which a resumed run is found again
AT_ONCE = 1000  # metrics of one request, MLflow's limit
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # characters that MLflow refuses in a metric's name


@dataclass(frozen=True, kw_only=True)
class Mlflow(AbstractRemote):
    """Sends a run's numbers as metrics, its labels as parameters and its configuration as a file.

    Raises:
        OptionError: the package mlflow is not installed.
    """

    title: ClassVar[str] = "MLflow"

    uri: str | None  # of the tracking server or store; None: MLflow's own default
    experiment: str | None  # None: the run's experiment_name

    def __post_init__(self) -> None:
        require_package("mlflow", extra="mlflow")

    def connect(self, run: RunInfo) -> AbstractDestination:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        name = self.experiment or str(run.config.get("experiment_name") or "editkit")
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        cell = cell_id(run.folder)
        earlier = client.search_runs([experiment], f"tags.`{CELL}` = '{cell}'", max_results=1)
        if run.resumed_at and earlier:
            return _MlflowRun(client, earlier[0].info.run_id)
        tags = {CELL: cell, "mlflow.runName": cell_name(run.folder).partition("/")[2]}
        made = _MlflowRun(client, client.create_run(experiment, tags=tags).info.run_id)
        for key, value in label_values(run.config).items():
            client.log_param(made.id, key, value)
        client.log_dict(made.id, json.loads(json.dumps(run.config, default=str)), "config.json")
        return made


class _MlflowRun(AbstractDestination):
    def __init__(self, client: MlflowClient, id: str) -> None:
        self._client, self.id = client, id

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(FORBIDDEN.sub("_", name), float(value), now, step) for name, value in row.items()
        ]
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self.id, metrics[start : start + AT_ONCE])

    def conclude(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
