"""`editkit stats`: second moments of keys, computed once for a model and a corpus, listed, checked,
compared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed_or_explained
from editkit.errors import ConfigError
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.stats.store import StoredMoment

app = typer.Typer(
    help="Second moments of keys, which ROME's covariance and MEMIT need: computed once for a model and a corpus.",
    no_args_is_help=True,
)


@app.command("build")
def build_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Compute the second moments that a run with these overrides would need, unless they are
    stored.

    Goes on where it was cut off. Under torchrun or srun each process takes its share, on a GPU of
    its own where there are several; the last one to end puts the shares together.
    """
    from editkit.config.build import model_and_stats
    from editkit.stats.build import fill_store, statistics
    from editkit.stats.shards import shard_from
    from editkit.trackers.collecting import collecting

    shard = shard_from(os.environ)
    composed = composed_or_explained(overrides, config_dir)
    config, editor, stats, runtime = model_and_stats(composed.config, choices=composed.choices)
    if not editor.needs_moments:
        typer.echo("this editor needs no second moments")
        return
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    model = config.load(shard.device(runtime.device))
    wanted = statistics(model, editor.moment_modules(model), stats)
    with collecting() as shown:
        is_complete = fill_store(
            wanted, shard=shard, announce=shown.announce, progress=shown.progress
        )
    if not is_complete:
        typer.echo(
            f"process {shard.rank} of {shard.of} is done with its share; the last one puts them together"
        )
        return
    wanted.read()  # a damaged file is told here, not in the run
    typer.echo(f"{len(wanted.keys)} second moments of {model.name} in {stats.folder}")


@app.command("ls")
def list_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """List the stored second moments; reads the files' headers only."""
    from editkit.stats import store

    show_moments(store.list_stored(stats_folder(overrides, config_dir)))


@app.command("verify")
def verify_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Read every stored file completely and check its key and checksum."""
    from editkit.stats import store

    found = store.verify(stats_folder(overrides, config_dir))
    show_moments(found)
    if problems := [each.problem for each in found if each.problem]:
        raise ConfigError(problems)


@app.command("compare")
def compare_stats(
    overrides: Overrides = None,
    keys: Annotated[
        int, typer.Option(help="Requests whose keys the updates are made for.", min=1)
    ] = 32,
    to: Annotated[Path, typer.Option(help="The report's JSON file.")] = Path("stats-compare.json"),
    config_dir: ConfigDir = None,
) -> None:
    """Compare stats.preset=minimal with full: how far apart the second moments are, and the updates
    made with them.

    Computes what of the two is not stored.
    """
    from rich.console import Console

    from editkit.config.build import build
    from editkit.stats.compare import compare_presets, table, write_report
    from editkit.trackers.collecting import collecting

    composed = composed_or_explained(overrides, config_dir)
    experiment = build(composed.config, choices=composed.choices)
    if not experiment.editor.needs_moments:
        raise ConfigError(
            f"editor={composed.choices['editor']} needs no second moments: there is nothing to compare."
        )
    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    model = experiment.model.load(experiment.runtime.device)
    with collecting() as shown:
        report = compare_presets(
            model,
            experiment.editor.moment_modules(model),
            experiment.stats,
            requests=experiment.data.requests[:keys],
            weight=composed.config["editor"].get("covariance_weight"),
            announce=shown.announce,
            progress=shown.progress,
        )
    write_report(report, to)
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(table(report), highlight=False, markup=False)
    typer.echo(f"written: {to}")


def stats_folder(overrides: list[str] | None, config_dir: Path | None) -> str:
    return str(composed_or_explained(overrides, config_dir).config["stats"]["folder"])


def show_moments(found: Sequence[StoredMoment]) -> None:
    """A line for each stored file."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "module", "documents", "tokens", "MB", "file", box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    console = Console()
    if not console.is_terminal:
        console.width = 240  # a line each, for grep
    for each in found:
        facts = (
            (each.key.model, each.key.module, str(each.key.num_documents), str(each.num_tokens))
            if each.key
            else ("?", "?", "?", "?")
        )
        table.add_row(*facts, f"{each.num_bytes / 1e6:.1f}", each.path.name)
    console.print(
        table if found else "no second moments are stored there yet", highlight=False, markup=False
    )
