"""`editkit validate`: the checks of a run, without its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from editkit.cli.arguments import ConfigDir, Overrides, composed
from editkit.errors import ConfigError

if TYPE_CHECKING:
    from editkit.config.compose import Composed
    from editkit.config.experiment import Experiment

# The memory of a run whose model sizes are not on this machine.
UNKNOWN_MEMORY = ("memory", "unknown: the model's sizes are on the Hugging Face hub only")


def validate(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Check a configuration without loading a model.

    The dataset is read and the memory is estimated. If this machine lacks the GPU of the
    configuration, the estimate is compared with runtime.memory_gb only.
    """
    from rich.console import Console
    from rich.table import Table

    from editkit.config.build import build
    from editkit.resources.estimate import free_bytes, here

    chosen = composed(overrides, config_dir)
    experiment = build(chosen.config, choices=chosen.choices)
    memory = here(experiment.demand, free_bytes=free_bytes(experiment.demand))
    problems = memory.problems() if memory is not None else []
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in (
        *summary(experiment, chosen),
        *(memory.rows() if memory is not None else [UNKNOWN_MEMORY]),
    ):
        table.add_row(*row)
    console = Console()
    if not problems:
        console.print("[green]ok[/green]")
    console.print(table, highlight=False, markup=False)
    if problems:
        raise ConfigError(problems)


def summary(experiment: Experiment, chosen: Composed) -> Iterator[tuple[str, str]]:
    """The parts of an experiment as names and texts."""
    model, data, schedule = experiment.model, experiment.data, experiment.schedule
    device = experiment.runtime.device
    yield "model", f"{model.label} ({model.id}, {model.dtype}, {device})"
    recipe = chosen.config.get("recipe")
    source = f", numbers {recipe['provenance']}: {recipe['source']}" if recipe else ""
    yield "editor", f"{chosen.choices['editor']}{source}"
    yield "restraints", ", ".join(experiment.config["restraint"]) or "none"
    yield "dataset", f"{data.label}, {len(data.requests)} requests from {data.origin}"
    for kind, text in data.counts():
        yield f"  {kind.replace('_', ' ')}", text
    milestones = ", ".join(map(str, schedule.milestones))
    yield (
        "edits",
        f"{schedule.edits} in batches of {schedule.batch_size}, measured after {milestones}",
    )
    yield "folder", str(experiment.folder)
