"""`editkit tune`: the numbers of an editor or of a restraint for a model, by measurement."""

from __future__ import annotations

import shlex

import typer

from editkit.cli.arguments import ConfigDir, Overrides, console
from editkit.cli.run import run
from editkit.sweeps.plan import OK


def tune(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Search the numbers of an editor for a model: editkit tune model=tiny-llama editor=rome.

    Trials are drawn from conf/tune/EDITOR.yaml, or with restraint=NAME from that of the restraint.
    They are runs of a sweep: the same command resumes an interrupted search. `tune.trials`,
    `tune.edits` and `tune.sequential` set the budget. A swept value such as
    editor.target.lr=0.1,0.2 replaces the file's; a plain one is not searched. The table and the
    best recipe are written to outputs/tune/.
    """
    from rich.table import Table

    from editkit.tuning.prepare import prepare
    from editkit.tuning.table import outcome
    from editkit.tuning.write import facts, objective, table_rows, write

    tuning = prepare(overrides or [], config_dir)
    code = run(tuning.hydra_arguments)
    found = outcome(tuning)
    recipes = write(tuning, found)
    header, rows = table_rows(tuning, found)
    title = (
        f"{tuning.choices['editor']} on {tuning.label}. Score: {objective(tuning, found)}. Facts: "
        f"{facts(tuning)}."
    )
    shown = Table(*header, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console().print(shown, highlight=False, markup=False)
    typer.echo(f"written: {tuning.folder}/table.md, table.csv, table.json")
    choices = [f"{group}={tuning.choices[group]}" for group in ("model", "editor")]
    for recipe in recipes:
        options = ["--config-dir", f"{tuning.folder}/conf"] if "recipe=" in recipe.use[0] else []
        typer.echo(f"best: {recipe.path}")
        typer.echo(f"  use it: {shlex.join(['editkit', 'run', *options, *choices, *recipe.use])}")
        typer.echo(f"  or copy it to {recipe.where}, where it is chosen automatically")
    if not found.is_complete:
        typer.echo("not all trials have ended: repeat the command to resume; no recipe was written")
    if code != OK:
        raise typer.Exit(code)
