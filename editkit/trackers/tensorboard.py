"""TensorBoard: event files in the run's folder. `tensorboard --logdir outputs` shows all runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.records.tracker import RunInfo
from editkit.trackers.remote import AbstractDestination, AbstractRemote, label_values
from editkit.trackers.require import require_package

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"  # in a run's folder


@dataclass(frozen=True, kw_only=True)
class Tensorboard(AbstractRemote):
    """Writes a run's numbers as scalars. The x axis is the step.

    Raises:
        OptionError: the package tensorboard is not installed.
    """

    title: ClassVar[str] = "TensorBoard"

    def __post_init__(self) -> None:
        require_package("tensorboard", extra="tensorboard")

    def connect(self, run: RunInfo) -> AbstractDestination:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops the events of earlier sessions from this step on: they are made again.
        first = run.resumed_at + 1 if run.resumed_at else 0
        writer = SummaryWriter(str(run.folder / FOLDER), purge_step=first)
        if not run.resumed_at:
            table = [f"| {name} | {value} |" for name, value in label_values(run.config).items()]
            writer.add_text("run", "\n".join(["| key | value |", "|---|---|", *table]), 0)
        return _Events(writer)


class _Events(AbstractDestination):
    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def conclude(self, *, failed: bool) -> None:
        self._writer.add_text("status", "failed" if failed else "ended")
        self._writer.close()
