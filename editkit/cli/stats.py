"""`editkit stats`: second moments of keys, computed once for a model and a corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed, console
from editkit.errors import ConfigError, message
from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.stats.store import StoredMoment

app = typer.Typer(
    help="Second moments of keys (covariance statistics), which ROME and MEMIT need. They are"
    " computed once for a model and a corpus.",
    no_args_is_help=True,
)


@app.command("build")
def build_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Compute the second moments that a run with these overrides needs.

    Stored second moments are not computed again, and an interrupted computation is resumed. Under
    torchrun or srun every process computes a share, on its own GPU if there are several. The last
    process merges the shares.
    """
    from editkit.config.build import model_and_stats
    from editkit.stats.build import fill_store, statistics
    from editkit.stats.shards import shard_from
    from editkit.trackers.collecting import collecting

    shard = shard_from(os.environ)
    chosen = composed(overrides, config_dir)
    config, editor, stats, runtime = model_and_stats(chosen.config, choices=chosen.choices)
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
            f"process {shard.rank} of {shard.of} has computed its share; the last process merges"
            " the shares"
        )
        return
    wanted.read()  # a damaged file is reported here, not in the run
    typer.echo(f"{len(wanted.keys)} second moments of {model.name} in {stats.folder}")


@app.command("import")
def import_stats(
    path: Annotated[
        Path,
        typer.Argument(
            help="Published file (.npz, .npy, .pt, .safetensors), or a folder of files that are"
            " named after their matrices.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer of a file whose name does not tell it.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of keys, for files that hold a matrix alone.", min=1, show_default=False
        ),
    ] = None,
    is_sum: Annotated[
        bool, typer.Option("--sum", help="A matrix alone is the sum of k k^T, not the mean.")
    ] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Check second moments that somebody else computed, and store them for a model.

    The files are those of ROME, MEMIT, AlphaEdit and EasyEdit, or matrices alone. stats=imported
    makes a run use them. Its records say that they were not computed here.
    """
    from editkit.config.parts import Parts
    from editkit.model.load import ModelConfig
    from editkit.resources.runtime import Runtime
    from editkit.stats.imported import import_moments, not_there

    chosen = composed(overrides, config_dir)
    parts = Parts(chosen.config, chosen.choices)
    config, runtime = parts.one("model", ModelConfig), parts.one("runtime", Runtime)
    if config is not None:
        parts.problems.add_all(config.source_problems())
    parts.problems.add_all(not_there(path.expanduser(), key="editkit stats import"))
    parts.finish()
    assert config and runtime
    folder = Path(str(chosen.config["stats"]["folder"])).expanduser()
    model = config.load(runtime.device)
    done = import_moments(
        model,
        path.expanduser(),
        folder,
        layer=layer,
        count=count,
        is_sum=is_sum,
        announce=typer.echo,
    )
    for each in done:
        typer.echo(f"{each.key.module}: {each.count} keys from {each.path}")
        if each.is_odd:
            typer.echo(
                f"  warning: the mean |k|^2 is {each.length:.2g} times that of the model's own keys"
                " in a short text; a sum that was taken for a mean (--sum), another layer or"
                " another model looks like that"
            )
        if not each.is_definite:
            typer.echo(
                "  it cannot be inverted, so ROME and MEMIT refuse it; AlphaEdit's null space does"
                " not need that"
            )
    typer.echo(f"{len(done)} second moments imported for {model.name} into {folder}")


@app.command("ls")
def list_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """List the stored second moments. Only the headers of the files are read."""
    from editkit.stats import store

    show_moments(store.list_stored(stats_folder(overrides, config_dir)))


@app.command("verify")
def verify_stats(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Read every stored file completely and check its key and checksum."""
    from editkit.stats import store

    moments = store.verify(stats_folder(overrides, config_dir))
    show_moments(moments)
    if problems := [moment.problem for moment in moments if moment.problem]:
        raise ConfigError(problems)


@app.command("compare")
def compare_stats(
    overrides: Overrides = None,
    keys: Annotated[int, typer.Option(help="Requests whose updates are compared.", min=1)] = 32,
    to: Annotated[Path, typer.Option(help="JSON file of the report.")] = Path("stats-compare.json"),
    config_dir: ConfigDir = None,
) -> None:
    """Compare the second moments of stats.preset=minimal with those of full.

    The updates that the two give are compared as well. Second moments that are not stored are
    computed.
    """
    from editkit.config.build import build
    from editkit.stats.compare import compare_presets, table, write_report
    from editkit.trackers.collecting import collecting

    chosen = composed(overrides, config_dir)
    experiment = build(chosen.config, choices=chosen.choices)
    if not experiment.editor.needs_moments:
        problem = "this editor needs no second moments, so there is nothing to compare"
        raise ConfigError(message("editor", problem, got=chosen.choices["editor"]))
    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    model = experiment.model.load(experiment.runtime.device)
    with collecting() as shown:
        report = compare_presets(
            model,
            experiment.editor.moment_modules(model),
            experiment.stats,
            requests=experiment.data.requests[:keys],
            weight=chosen.config["editor"].get("covariance_weight"),
            announce=shown.announce,
            progress=shown.progress,
        )
    write_report(report, to)
    console().print(table(report), highlight=False, markup=False)
    typer.echo(f"written: {to}")


def stats_folder(overrides: list[str] | None, config_dir: Path | None) -> str:
    return str(composed(overrides, config_dir).config["stats"]["folder"])


def show_moments(moments: Sequence[StoredMoment]) -> None:
    """A row for each stored file."""
    from rich.table import Table

    titles = ("model", "module", "documents", "tokens", "source", "MB", "file")
    table = Table(*titles, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for moment in moments:
        source = ("?", "?", "?", "?", "?")
        if moment.key:
            key = moment.key
            source = (
                key.model,
                key.module,
                str(key.num_documents or "?"),
                str(moment.num_tokens),
                f"imported from {key.imported}" if key.imported else "computed",
            )
        table.add_row(*source, f"{moment.num_bytes / 1e6:.1f}", moment.path.name)
    shown = table if moments else "no second moments are stored there yet"
    console().print(shown, highlight=False, markup=False)
