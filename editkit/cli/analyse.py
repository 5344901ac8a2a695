"""`editkit analyse`: why the edited model of a run breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def analyse(
    run: Annotated[Path, typer.Argument(help="Folder of a run: outputs/.../seed<k>.")],
    what: Annotated[
        str,
        typer.Argument(
            help="lens: ranks of the old and new answers after each block. update: what was"
            " written, by neuron and as words. failures: what the model says where an edit failed."
            " recall: hidden states of recalled facts on two components. circuit: the heads and"
            " MLPs that carry the facts. influence: which edits damaged which unrelated prompts."
            " objectives: the perplexity of the targets."
        ),
    ],
    view: Annotated[
        str | None,
        typer.Option(
            help="Name of a restraint on the total. By default the model as the run left it."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="At most so many of the first edits.")] = 50,
    edges: Annotated[
        int | None, typer.Option(help="Edges of a circuit, by default 3000.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of integrated gradients: of a circuit, by default 5; of influence, 8.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Analyse the edited model of a run beside the unedited one."""
    from rich import box
    from rich.table import Table

    from editkit.analysis.write import analyse as make
    from editkit.cli.arguments import console

    given = {"edges": edges, "steps": steps}
    options = {name: value for name, value in given.items() if value is not None}
    path, tables = make(run, what, view=view, requests=requests, options=options)
    shown = console()
    for table in tables:
        drawn = Table(title=table.title, title_justify="left", box=box.SIMPLE)
        for column in table.head:
            drawn.add_column(column)
        for row in table.rows:
            drawn.add_row(*row)
        shown.print(drawn, markup=False, highlight=False)
    typer.echo(f"written: {path}")
