"""`editkit probe`: what editkit finds in a model, without loading it; with --trace, at which layers
it should be edited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed_or_explained
from editkit.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from editkit.model.load import ModelConfig
    from editkit.model.probe import Probed
    from editkit.model.trace import Trace

app = typer.Typer()
UNKNOWN = ("memory", "not known: its sizes are on the hub, and none of it is on this machine")
SHOWN = 6  # matrices that are named; of more, some


@app.command()
def probe(
    overrides: Overrides = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Load the model and trace which layers hold facts of the dataset."
        ),
    ] = False,
    facts: Annotated[
        int,
        typer.Option(
            help="Of the dataset, asked by --trace; those that the model knows count.", min=1
        ),
    ] = 100,
    window: Annotated[int, typer.Option(help="Layers that --trace restores together.", min=1)] = 1,
    noise: Annotated[
        float, typer.Option(help="On the subject, in standard deviations of the embeddings.")
    ] = 3.0,
    draws: Annotated[int, typer.Option(help="Of the noise, for each fact.", min=1)] = 3,
    config_dir: ConfigDir = None,
) -> None:
    """Show a model's modules, shapes, orientation and tokenizer without loading its weights, and
    the memory that a run would take.
    """
    from rich.console import Console

    from editkit.config.parts import Parts
    from editkit.model.load import ModelConfig
    from editkit.model.probe import probe as look
    from editkit.resources.runtime import Runtime

    composed = composed_or_explained(overrides, config_dir)
    parts = Parts(composed.config, composed.choices)
    config, runtime = parts.one("model", ModelConfig), parts.one("runtime", Runtime)
    parts.finish()
    assert config and runtime
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a line each, for grep
    console.print(described(config, look(config), composed.config), highlight=False, markup=False)
    if trace:
        console.print(
            traced(config, composed, facts=facts, window=window, noise=noise, draws=draws),
            highlight=False,
            markup=False,
        )


def described(config: ModelConfig, found: Probed, composed: dict[str, Any]) -> Table:
    """The answers, a line each."""
    from rich.table import Table

    family, first, last = found.family, found.matrices[0], found.matrices[-1]
    stored = "(d_in, d_out), the transpose of" if first.is_transposed else "as"
    same = all(matrix.shape == first.shape for matrix in found.matrices)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    rows = [
        ("model", f"{config.label} ({config.id}, {config.dtype}, {config.weights} weights)"),
        (
            "architecture",
            f"{found.kind}, {len(found.matrices)} layers, {found.num_parameters:,} parameters",
        ),
        (
            "modules",
            f"base {family.base}, blocks {family.blocks}, final norm {family.final_norm}, MLP {family.mlp(0)}",
        ),
        ("matrices", f"{first.name} ... {last.name}, {first.type}"),
        *(("edited", names) for names in (edited_names(composed),) if names),
        (
            "shape",
            f"d_out x d_in = {first.shape[0]} x {first.shape[1]}{'' if same else ' (layer 0; they differ)'}",
        ),
        ("orientation", f"stored {stored} (d_out, d_in)"),
        (
            "MLP output",
            "added to the residual stream as it is"
            if family.adds_mlp_output
            else "normed before it is added: targets search slower",
        ),
        ("embeddings", "tied to the head" if found.is_tied else "apart from the head"),
        ("positions", f"{found.num_positions}; attention: {found.attention}"),
        *(
            ("tokenizer" if index == 0 else "", f"{name}: {text}")
            for index, (name, text) in enumerate(found.tokenizer)
        ),
    ]
    if found.no_tokenizer:
        rows.append(("tokenizer", found.no_tokenizer))
    rows += memory_rows(composed)
    for row in rows:
        table.add_row(*row)
    return table


def edited_names(composed: dict[str, Any]) -> str | None:
    """The matrices that the editor would change; None where its layers or the model's sizes are not
    known.
    """
    from editkit.config.build import memory_demand
    from editkit.resources.estimate import edited

    try:
        found = edited(memory_demand(composed)) or ()
    except ConfigError:
        return None
    return (
        ", ".join(found)
        if len(found) < SHOWN
        else f"{found[0]}, {found[1]}, ... {found[-1]} ({len(found)} matrices)"
    )


def memory_rows(composed: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run with this configuration would take; why it is not known, where an editor's numbers
    are missing.
    """
    from editkit.config.build import memory_demand
    from editkit.resources.estimate import free_bytes, here

    try:
        demand = memory_demand(composed)
        found = here(demand, free_bytes=free_bytes(demand))
    except ConfigError as error:
        return [("memory", f"not known: {error.problems[0]}")]
    return found.rows() if found is not None else [UNKNOWN]


def traced(
    config: ModelConfig, composed: Any, *, facts: int, window: int, noise: float, draws: int
) -> Table:
    """The average indirect effect of every layer, and what follows from it."""
    from rich.table import Table

    from editkit.config.parts import Parts
    from editkit.datasets.base import AbstractDataset
    from editkit.model.trace import known_facts_of
    from editkit.model.trace import trace as run
    from editkit.resources.runtime import Runtime

    parts = Parts(composed.config, composed.choices)
    dataset, runtime = parts.one("dataset", AbstractDataset), parts.one("runtime", Runtime)
    parts.finish()
    assert dataset and runtime
    requests = dataset.load(int(composed.config["seed"])).requests[:facts]
    model = config.load(runtime.device)
    known = known_facts_of(model, requests)
    found: Trace = run(
        model, known, num_asked=len(requests), window=window, noise=noise, draws=draws
    )
    title = (
        f"Causal tracing of {len(known)} facts that it knows, of {len(requests)}: the MLP at the subject's last token "
        f"({window} layer{'s' if window > 1 else ''} restored); total effect {found.total_effect:.3f}. "
        f"Suggested: ROME editor.layers=[{found.rome_layer}], MEMIT editor.layers={list(found.memit_layers)}"
    )
    table = Table(
        "layer",
        "indirect effect",
        "standard error",
        "",
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    largest = float(found.average_L.abs().max()) or 1.0
    for layer, (effect, error) in enumerate(
        zip(found.average_L.tolist(), found.error_L.tolist(), strict=True)
    ):
        table.add_row(
            str(layer), f"{effect:.4f}", f"{error:.4f}", "#" * max(0, round(40 * effect / largest))
        )
    return table
