"""`editkit ledger`: what was edited when, and taking it back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from editkit.cli.arguments import console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from editkit.ledger.measure import Measured
    from editkit.records.ledger import Block

app = typer.Typer(
    help="Show the edits of a run with ledger.keep=true, take some back, compare and merge runs.",
    no_args_is_help=True,
)
Folder = Annotated[
    Path, typer.Argument(help="Folder of a run with ledger.keep=true, or of a session's ledger.")
]
To = Annotated[
    Path | None,
    typer.Option(help="Folder to write the model to. Without it the model is only measured."),
]
As = Annotated[
    str,
    typer.Option("--as", help="model, lora or delta, as `editkit export` writes them."),
]
Rank = Annotated[
    int | None,
    typer.Option(help="Largest rank with --as lora or delta.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where the model is measured; cpu by default.", show_default=False),
]


@app.command("list")
def list_blocks(run: Folder) -> None:
    """List the edits of a ledger: one line for each block, which one step made."""
    from rich.table import Table

    from editkit.records.ledger import read_ledger

    ledger = read_ledger(run)
    table = Table(box=None, pad_edge=False)
    for name in ("id", "time", "edits", "matrices", "norm", "author", "note", "digest"):
        table.add_column(name, no_wrap=name != "edits", style="cyan" if name == "id" else None)
    for block in ledger.blocks:
        table.add_row(
            str(block.id),
            block.time[:19],
            _edits(block),
            str(len(block.updates)),
            f"{_norm(block):.4g}",
            block.author or "",
            block.note or "",
            block.digest[:12],
        )
    console().print(table, highlight=False, markup=False)
    if ledger.undone:
        typer.echo(f"taken back by the session: {', '.join(map(str, ledger.undone))}")


@app.command("show")
def show(
    run: Folder,
    id: Annotated[str, typer.Argument(help="Id of a block, or of a request.", metavar="ID")],
) -> None:
    """Show one edit: its requests, its updates, and how it is recorded."""
    from editkit.ledger.revert import blocks_with
    from editkit.records.ledger import read_ledger

    for block in blocks_with(read_ledger(run), id):
        lines = [f"block {block.id}, {block.time}"]
        lines += [f"author: {block.author}"] if block.author else []
        lines += [f"note: {block.note}"] if block.note else []
        for request in block.requests:
            lines.append(f"{request.id}: {request.full_prompt!r} -> {request.target!r}")
            lines += [f"  before: {request.target_old!r}"] if request.target_old else []
        for module, update in block.updates.items():
            rank = "dense" if update["rank"] is None else f"rank {update['rank']}"
            rows, columns = update["shape"]
            lines.append(f"{module}: ({rows}, {columns}), {rank}, norm {update['norm']:.4g}")
        for name in (*block.restrained, *block.ends):
            lines.append(f"afterwards restrained by {name}")
        lines.append(f"factors: {block.path.relative_to(block.folder)}, sha256 {block.factors}")
        lines.append(f"content: {block.content}")
        lines.append(f"digest:  {block.digest}")
        block.load()  # raises if the file of the factors is another one
        typer.echo("\n".join(lines))


@app.command("revert")
def revert(
    run: Folder,
    ids: Annotated[
        list[str],
        typer.Argument(help="Ids of blocks, or of the only request of a block.", metavar="ID..."),
    ],
    to: To = None,
    form: As = "model",
    view: Annotated[
        str | None,
        typer.Option(help="Name of a restraint on the total: W_0 + F(D) of the reverted D."),
    ] = None,
    rank: Rank = None,
    device: Device = None,
) -> None:
    """Take edits back: the sum of all others is measured and, with --to, written.

    Later edits keep their updates, which were computed on a model with the reverted ones.
    """
    from editkit.ledger.revert import revert as take_back

    made = take_back(run, ids, to=to, form=cast(Any, form), view=view, rank=rank, device=device)
    for block in made.blocks:
        typer.echo(f"reverted: block {block.id}, {_edits(block)}")
    if made.later:
        numbers = _numbers(list(made.later))
        typer.echo(f"made after it: {len(made.later)} blocks ({numbers}); {made.saw}")
        shared: dict[tuple[str, ...], list[int]] = {}
        for number, modules in made.later.items():
            if modules:
                shared.setdefault(modules, []).append(number)
        for modules, own in shared.items():
            typer.echo(f"at the same matrices: {_numbers(own)} ({', '.join(modules)})")
    _print({"all edits": made.before, "reverted": made.after})
    _written(to, made.errors)


@app.command("diff")
def diff(a: Folder, b: Folder, device: Device = None) -> None:
    """Compare two ledgers of one base model: their edits, and their sums matrix by matrix."""
    from rich.table import Table

    from editkit.ledger.pair import diff as compare

    found = compare(a, b, device=device)
    typer.echo(f"the same edits with the same factors: {found.same}")
    for title, requests in (
        ("in both with other factors", found.changed),
        ("only in A", found.only["A"]),
        ("only in B", found.only["B"]),
    ):
        typer.echo(f"{title}: {len(requests)}")
        for request in requests:
            typer.echo(f"  {request.id}: {request.full_prompt!r} -> {request.target!r}")
    for conflict in found.conflicts:
        typer.echo(f"conflict: {conflict}")
    table = Table(box=None, pad_edge=False)
    for name in ("matrix", "|A|", "|B|", "|A - B|", "cosine"):
        table.add_column(name, no_wrap=True)
    for module, values in found.totals.items():
        table.add_row(module, *(f"{value:.4g}" for value in values.values()))
    console().print(table, highlight=False, markup=False)


@app.command("merge")
def merge(
    a: Folder,
    b: Folder,
    to: To = None,
    form: As = "model",
    rank: Rank = None,
    device: Device = None,
) -> None:
    """Add the edits of two runs of one base model: the sum is measured and, with --to, written.

    Edits of the same prompt, or of the same subject and relation, are reported.
    """
    from editkit.ledger.pair import merge as add

    made = add(a, b, to=to, form=cast(Any, form), rank=rank, device=device)
    typer.echo(f"conflicts: {len(made.conflicts)}")
    for conflict in made.conflicts:
        typer.echo(f"  {conflict}")
    _print(made.variants)
    _written(to, made.errors)


def _edits(block: Block) -> str:
    first = block.requests[0]
    text = f"{first.id}: {first.full_prompt} -> {first.target}"
    others = len(block.requests) - 1
    return f"{text} (and {others} more)" if others else text


def _norm(block: Block) -> float:
    return float(sum(update["norm"] ** 2 for update in block.updates.values()) ** 0.5)


def _numbers(numbers: list[int]) -> str:
    """1-3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _print(variants: Mapping[str, Measured]) -> None:
    """The figures of each variant of the model, in percent."""
    from rich.table import Table

    from editkit.ledger.card import percent

    table = Table(box=None, pad_edge=False)
    for name in ("", *variants):
        table.add_column(name, no_wrap=True, justify="left" if not name else "right")
    first = next(iter(variants.values()))
    for group, figures in first.groups.items():
        for metric in ("efficacy", "unedited"):
            label = "efficacy" if metric == "efficacy" else "as unedited"
            values = [getattr(each.groups[group], metric) for each in variants.values()]
            table.add_row(f"{label}, {figures.n} {group}", *map(percent, values))
    local = [each.locality for each in variants.values()]
    table.add_row(f"locality, {first.num_locality} prompts", *map(percent, local))
    console().print(table, highlight=False, markup=False)


def _written(to: Path | None, errors: Mapping[str, float]) -> None:
    if to is None:
        return
    typer.echo(f"written: {to}")
    if errors and max(errors.values()) > 1e-6:
        module, error = max(errors.items(), key=lambda item: item[1])
        typer.echo(f"relative error of the truncated edits: up to {error:.2g} ({module})")
