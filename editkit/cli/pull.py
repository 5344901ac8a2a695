"""`editkit pull` and `editkit share`: second moments and hypernetworks that a group shares."""

from __future__ import annotations

import fnmatch
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editkit.cli.arguments import console
from editkit.cli.stats import stats_folder
from editkit.errors import ConfigError, message

if TYPE_CHECKING:
    from editkit.stats.remote import Entry


def pull(
    remote: Annotated[
        str,
        typer.Argument(
            help="A folder, http(s)://..., or hub:owner/name (a dataset), with index.json.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names of files, * stands for any part. By default they are listed."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write. By default second moments go where runs look for them.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="The longest wait for an answer, in seconds.", min=0.1)
    ] = 20.0,
) -> None:
    """Fetch second moments and hypernetworks that others computed.

    Each file is compared with the checksum of the index and with its own. `stats.remote=REMOTE`
    makes runs and `editkit stats build` fetch what they need.
    """
    from editkit.stats.remote import Remote, absent, form_problems

    problems = [*form_problems(remote), *absent(remote)]
    if problems:
        raise ConfigError(problems)
    there = Remote(address=remote, timeout_s=timeout)
    entries = there.entries()
    if not names:
        _show(list(entries.values()))
        return
    chosen: dict[str, Entry] = {}
    for pattern in names:
        found = fnmatch.filter(entries, pattern)
        if not found:
            expected = f"one of the {len(entries)} names that `editkit pull {remote}` lists"
            problems.append(message("names", "not there", got=pattern, expected=expected))
        chosen |= {name: entries[name] for name in found}
    if problems:
        raise ConfigError(problems)
    for entry in chosen.values():
        folder = (to or _folder(entry)).expanduser()
        if (folder / entry.name).exists():
            typer.echo(f"there already: {folder / entry.name}")
            continue
        typer.echo(f"fetched: {there.fetch(entry, folder, partial(_check, entry))}")


def share(
    to: Annotated[
        Path,
        typer.Option(help="Folder to fill, for others to read, serve by HTTP or upload to a hub."),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of second moments and hypernetworks, or folders of them. By default all"
            " stored second moments.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Add second moments and hypernetworks to a shared folder and to its index.json."""
    from editkit.stats.remote import described, total
    from editkit.stats.remote import share as add

    found, problems = [], []
    for place in files or [Path(stats_folder(None, None)).expanduser()]:
        inside = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not inside or not place.exists():
            expected = "a file of second moments or of a hypernetwork, or a folder of such files"
            problems.append(message("files", "nothing there", got=str(place), expected=expected))
            continue
        found += inside
    for path in found:
        try:
            _check(described(path), path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    entries = add(found, to.expanduser())
    for entry in entries:
        typer.echo(f"{entry.num_bytes / 1e6:>9.1f} MB  {entry.name}")
    typer.echo(f"{len(entries)} files in {to}, {total(entries) / 1e6:.1f} MB")


def _check(entry: Entry, path: Path) -> None:
    """Raises ConfigError if the content of a file is damaged or does not belong to its name."""
    from editkit.hypernet.store import read_tensors
    from editkit.stats.remote import described
    from editkit.stats.store import read

    if described(path).name != entry.name:
        raise ConfigError(message(str(path), "its content belongs to another name"))
    if entry.kind == "hypernetwork":
        read_tensors(str(path))
    else:
        read(path)


def _folder(entry: Entry) -> Path:
    if entry.kind == "statistics":
        return Path(stats_folder(None, None))
    return Path(os.environ.get("EDITKIT_CACHE", "~/.cache/editkit")) / "hypernetworks"


def _show(entries: list[Entry]) -> None:
    from rich.table import Table

    if not entries:
        typer.echo("nothing is there")
        return
    table = Table("kind", "model", "module", "MB", "name", box=None, pad_edge=False)
    for entry in entries:
        model, module = (str(entry.about.get(key, "")) for key in ("model", "module"))
        table.add_row(entry.kind, model, module, f"{entry.num_bytes / 1e6:.1f}", entry.name)
    for column in table.columns:
        column.overflow = "fold"
    console().print(table, highlight=False, markup=False)
