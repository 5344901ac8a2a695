"""`editkit validate`: the checks of a run, without its model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.cli.arguments import ConfigDir, Multirun, Overrides, composed, console
from editkit.errors import ConfigError

if TYPE_CHECKING:
    from editkit.config.compose import Composed
    from editkit.config.experiment import Experiment
    from editkit.config.loads import Loads

# The parts that are shown once for a whole sweep. Memory and folders differ from cell to cell.
PARTS_OF_SWEEP = ("model", "editor", "restraints", "dataset", "edits")
# The memory of a run whose model sizes are not on this machine.
UNKNOWN_MEMORY = ("memory", "unknown: the model's sizes are on the Hugging Face hub only")


def validate(
    overrides: Overrides = None, config_dir: ConfigDir = None, multirun: Multirun = False
) -> None:
    """Check a configuration, or every cell of a sweep, without loading a model.

    The dataset is read and the memory is estimated. If this machine lacks the GPU of the
    configuration, the estimate is compared with runtime.memory_gb only.
    """
    from editkit.sweeps.grid import cells_of_command

    cells = cells_of_command(overrides or [], config_dir)
    if cells is None:
        show_run(composed(overrides, config_dir))
    else:
        show_sweep(cells, config_dir)


def show_run(chosen: Composed) -> None:
    """Checks a single run and shows its parts.

    Raises:
        ConfigError: with all problems.
    """
    from rich.console import Console
    from rich.table import Table

    rows, problems = checked(chosen, shows_tokens=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not problems:
        console.print("[green]ok[/green]")
    console.print(table, highlight=False, markup=False)
    if problems:
        raise ConfigError(problems)


def show_sweep(cells: Sequence[Sequence[str]], config_dir: Path | None) -> None:
    """Checks every cell of a sweep and shows the parts of all.

    Raises:
        ConfigError: with all problems, each with its cells.
    """
    from editkit.config.composer import Composer
    from editkit.config.loads import Loads
    from editkit.sweeps.grid import varying_keys, varying_values

    composer, loads, varying = Composer(config_dir), Loads(), varying_keys(cells)
    cells_by_problem: dict[str, list[int]] = {}
    rows_by_cell: dict[int, list[tuple[str, str]]] = {}
    for number, overrides in enumerate(cells):
        try:
            rows, problems = checked(composer.compose(overrides), loads)
            rows_by_cell[number] = rows
        except ConfigError as error:
            problems = list(error.problems)
        for problem in dict.fromkeys(problems):
            cells_by_problem.setdefault(problem, []).append(number)
    invalid = {number for numbers in cells_by_problem.values() for number in numbers}
    print_sweep(
        {number: varying_values(overrides, varying) for number, overrides in enumerate(cells)},
        {number: rows for number, rows in rows_by_cell.items() if number not in invalid},
    )
    if cells_by_problem:
        raise ConfigError(
            [
                f"{cells_text(numbers, cells, varying)}: {problem}"
                for problem, numbers in cells_by_problem.items()
            ]
        )


def cells_text(
    numbers: Sequence[int], cells: Sequence[Sequence[str]], varying: Collection[str]
) -> str:
    """Names some cells of a sweep: `cells 2, 5 (editor=mend)`. In parentheses are the values that
    these cells share and others do not have.
    """
    if len(numbers) == len(cells):
        return "all cells" if len(cells) > 1 else "the only cell"
    common = [
        value
        for value in cells[numbers[0]]
        if value.partition("=")[0] in varying and all(value in cells[number] for number in numbers)
    ]
    noun = "cell" if len(numbers) == 1 else "cells"
    shared = f" ({' '.join(common)})" if common else ""
    return f"{noun} {', '.join(map(str, numbers))}{shared}"


def print_sweep(
    values_by_cell: Mapping[int, str], rows_by_cell: Mapping[int, list[tuple[str, str]]]
) -> None:
    """Prints the parts of the valid cells, equal texts once, and a row for each cell."""
    from rich.table import Table

    from editkit.sweeps.summary import counted

    output = console()
    valid = len(rows_by_cell)
    count = counted(len(values_by_cell), "cell")
    if valid == len(values_by_cell):
        output.print(f"[green]ok[/green]: {count}", highlight=False)
    else:
        output.print(f"{valid} of {count} can be run", highlight=False)
    texts: dict[str, list[str]] = {}
    for rows in rows_by_cell.values():
        for name, whole in rows:
            # without the source of a recipe's numbers, which `validate` shows of a single run
            text = whole.partition(": ")[0] if name == "editor" else whole
            if text not in texts.setdefault(name, []):
                texts[name].append(text)
    parts = Table(box=None, pad_edge=False, show_header=False)
    for name, different in texts.items():
        if name in PARTS_OF_SWEEP:
            for place, text in enumerate(different):
                parts.add_row(name if place == 0 else "", text)
    if texts:
        first = values_by_cell[min(rows_by_cell)]
        parts.add_row("tokens", f"shown of a single run: editkit validate ... {first}")
        output.print(parts, highlight=False, markup=False)
    folders = Table("cell", "values", "folder", box=None, pad_edge=False)
    for number, values in values_by_cell.items():
        folder = dict(rows_by_cell.get(number, ())).get("folder", "invalid")
        folders.add_row(str(number), values, folder)
    output.print(folders, highlight=False, markup=False)


def checked(
    chosen: Composed, loads: Loads | None = None, *, shows_tokens: bool = False
) -> tuple[list[tuple[str, str]], list[str]]:
    """The parts of a run as names and texts, and the problems of its memory.

    Args:
        shows_tokens: with what takes the tokenizer.

    Raises:
        ConfigError: with all problems of the configuration.
    """
    from editkit.config.build import build
    from editkit.resources.estimate import free_bytes, here

    experiment = build(chosen.config, choices=chosen.choices, loads=loads)
    memory = here(experiment.demand, free_bytes=free_bytes(experiment.demand))
    rows = memory.rows() if memory is not None else [UNKNOWN_MEMORY]
    problems = memory.problems() if memory is not None else []
    tokens = token_rows(experiment) if shows_tokens else ()
    return [*summary(experiment, chosen), *tokens, *rows], list(problems)


def token_rows(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """The tokens of the first request, and the targets that no generation can match."""
    from editkit.evaluation.unmatchable import warnings
    from editkit.model.probe import local_tokenizer
    from editkit.model.split import split_of

    tokenizer, reason = local_tokenizer(experiment.model)
    if tokenizer is None:
        yield "tokens", f"unknown: {reason}"
        return
    chat, requests = experiment.model.chat_of(tokenizer), experiment.data.requests
    yield "tokens", f"{requests[0].id}: {split_of(tokenizer, requests[0], chat=chat)}"
    edited = requests if experiment.data.known_only else requests[: experiment.edits]
    for warning in warnings(tokenizer, edited, experiment.evaluation, chat=chat):
        yield "  warning", warning


def summary(experiment: Experiment, chosen: Composed) -> Iterator[tuple[str, str]]:
    """The parts of an experiment as names and texts."""
    model, data, schedule = experiment.model, experiment.data, experiment.schedule
    device = experiment.runtime.device
    chat = f", prompts by the chat template {model.chat_template}" if model.chat_template else ""
    yield "model", f"{model.label} ({model.id}, {model.dtype}, {device}){chat}"
    recipe = chosen.config.get("recipe")
    source = f", numbers {recipe['provenance']}: {recipe['source']}" if recipe else ""
    yield "editor", f"{chosen.choices['editor']}{source}"
    restraints = experiment.config["restraint"]
    yield "restraints", ", ".join(restraints) or "none"
    for name, options in restraints.items():
        if options.get("source"):
            yield f"  {name}", f"numbers {options['source']}"
    for warning in experiment.restraints.warnings():
        yield "  warning", warning
    yield "dataset", f"{data.label}, {len(data.requests)} requests from {data.origin}"
    for kind, text in data.counts():
        yield f"  {kind.replace('_', ' ')}", text
    milestones = ", ".join(map(str, schedule.milestones))
    yield (
        "edits",
        f"{schedule.edits} in batches of {schedule.batch_size}, measured after {milestones}",
    )
    if not experiment.evaluation.protocols:
        yield "  warning", "no edit is judged: evaluation.protocols is empty"
    yield "folder", str(experiment.folder)
