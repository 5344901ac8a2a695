"""`editkit probe`: the structure of a model, and with --trace the layers to edit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed, console
from editkit.cli.validate import UNKNOWN_MEMORY
from editkit.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from editkit.config.compose import Composed
    from editkit.model.load import ModelConfig
    from editkit.model.probe import Probed

MOST_NAMES = 6  # a longer list of matrices is shortened


def probe(
    overrides: Overrides = None,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Load the model and find the layers that store the facts of the dataset, by causal"
            " tracing.",
        ),
    ] = False,
    facts: Annotated[
        int,
        typer.Option(
            help="Dataset records for --trace. Facts that the model does not know are skipped.",
            min=1,
        ),
    ] = 100,
    window: Annotated[
        int, typer.Option(help="Number of layers that --trace restores together.", min=1)
    ] = 1,
    noise: Annotated[
        float,
        typer.Option(
            help="Noise of --trace on the subject, in standard deviations of the embeddings."
        ),
    ] = 3.0,
    draws: Annotated[int, typer.Option(help="Noise samples of --trace for each fact.", min=1)] = 3,
    config_dir: ConfigDir = None,
) -> None:
    """Show the structure of a model without loading its weights.

    Modules, shapes, orientation of the matrices, tokenizer, and the memory of a run are listed.
    """
    from editkit.config.parts import Parts
    from editkit.model.load import ModelConfig
    from editkit.model.probe import probe as structure
    from editkit.resources.runtime import Runtime

    chosen = composed(overrides, config_dir)
    parts = Parts(chosen.config, chosen.choices)
    config, runtime = parts.one("model", ModelConfig), parts.one("runtime", Runtime)
    parts.finish()
    assert config and runtime
    shown = console(width=200)
    shown.print(structure_table(config, structure(config), chosen), highlight=False, markup=False)
    if trace:
        table = trace_table(config, chosen, facts=facts, window=window, noise=noise, draws=draws)
        shown.print(table, highlight=False, markup=False)


def structure_table(config: ModelConfig, probed: Probed, chosen: Composed) -> Table:
    """A row for each property of the model."""
    from rich.table import Table

    family, first, last = probed.family, probed.matrices[0], probed.matrices[-1]
    stored = "(d_in, d_out), the transpose of" if first.is_transposed else "as"
    same = all(matrix.shape == first.shape for matrix in probed.matrices)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    names = edited_names(chosen)
    rows = [
        ("model", f"{config.label} ({config.id}, {config.dtype}, {config.weights} weights)"),
        (
            "architecture",
            f"{probed.kind}, {len(probed.matrices)} layers, {probed.num_parameters:,} parameters",
        ),
        (
            "modules",
            f"base {family.base}, blocks {family.blocks}, final norm {family.final_norm},"
            f" MLP {family.mlp(0)}",
        ),
        ("matrices", f"{first.name} ... {last.name}, {first.type}"),
        *((("edited", names),) if names else ()),
        (
            "shape",
            f"d_out x d_in = {first.shape[0]} x {first.shape[1]}"
            f"{'' if same else ' (layer 0; the shapes differ)'}",
        ),
        ("orientation", f"stored {stored} (d_out, d_in)"),
        (
            "MLP output",
            "added to the residual stream unchanged"
            if family.adds_mlp_output
            else "normalized before it is added: the search for target vectors is slower",
        ),
        ("embeddings", "tied to the head" if probed.is_tied else "separate from the head"),
        ("positions", f"{probed.num_positions}; attention: {probed.attention}"),
        *(
            ("tokenizer" if index == 0 else "", f"{name}: {text}")
            for index, (name, text) in enumerate(probed.tokenizer)
        ),
    ]
    if probed.no_tokenizer:
        rows.append(("tokenizer", probed.no_tokenizer))
    for row in (*rows, *memory_rows(chosen)):
        table.add_row(*row)
    return table


def edited_names(chosen: Composed) -> str | None:
    """The names of the edited matrices. None if the editor's layers or the model's sizes are not
    known.
    """
    from editkit.config.build import memory_demand
    from editkit.resources.estimate import edited

    try:
        names = edited(memory_demand(chosen.config)) or ()
    except ConfigError:
        return None
    if len(names) < MOST_NAMES:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} matrices)"


def memory_rows(chosen: Composed) -> list[tuple[str, str]]:
    """The memory of a run with this configuration, or why it cannot be estimated."""
    from editkit.config.build import memory_demand
    from editkit.resources.estimate import free_bytes, here

    try:
        demand = memory_demand(chosen.config)
        memory = here(demand, free_bytes=free_bytes(demand))
    except ConfigError as error:
        return [("memory", f"unknown: {error.problems[0]}")]
    return memory.rows() if memory is not None else [UNKNOWN_MEMORY]


def trace_table(
    config: ModelConfig, chosen: Composed, *, facts: int, window: int, noise: float, draws: int
) -> Table:
    """The average indirect effect of every layer, under the layers that it suggests to edit."""
    from rich.table import Table

    from editkit.config.parts import Parts
    from editkit.datasets.base import AbstractDataset, loaded
    from editkit.datasets.separators import joined
    from editkit.evaluation.known import known_facts_of
    from editkit.model.trace import trace
    from editkit.resources.runtime import Runtime
    from editkit.runner.self_check import check_reading

    parts = Parts(chosen.config, chosen.choices)
    dataset, runtime = parts.one("dataset", AbstractDataset), parts.one("runtime", Runtime)
    parts.finish()
    assert dataset and runtime
    requests = loaded(dataset, int(chosen.config["seed"])).requests[:facts]
    model = config.load(runtime.device)
    for warning in check_reading(model, joined(requests[0].probe())):
        typer.echo(f"warning: {warning}", err=True)
    known = known_facts_of(model, requests)
    effects = trace(
        model, known, num_requests=len(requests), window=window, noise=noise, draws=draws
    )
    title = (
        f"Causal tracing of {len(known)} known facts (of {len(requests)}): the MLP at the subject's"
        f" last token, {window} layer{'s' if window > 1 else ''} restored; total effect"
        f" {effects.total_effect:.3f}. Peak: layer {effects.peak}. Suggested, from layer"
        f" {effects.first_suggested} on: ROME editor.layers=[{effects.rome_layer}], MEMIT"
        f" editor.layers={list(effects.memit_layers)}. The first layers are left out:"
        " restoring them undoes the noise itself. `editkit tune` measures which layer edits best."
    )
    columns = ("layer", "indirect effect", "standard error", "")
    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    largest = float(effects.average_L.abs().max()) or 1.0
    for layer, (effect, error) in enumerate(
        zip(effects.average_L.tolist(), effects.error_L.tolist(), strict=True)
    ):
        bar = "#" * max(0, round(40 * effect / largest))
        table.add_row(str(layer), f"{effect:.4f}", f"{error:.4f}", bar)
    return table
