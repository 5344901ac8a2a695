"""`editkit bench`: speed of editkit against a reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import console


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="Measurement, such as rome or telemetry, or all. An unknown name lists them."
        ),
    ] = "all",
    shape: Annotated[
        str,
        typer.Option(
            help="Model whose sizes are used, with random weights: tiny-gpt2, gpt2, gpt2-xl,"
            " llama3-8b, ..."
        ),
    ] = "gpt2",
    repeats: Annotated[
        int, typer.Option(help="Timings of each implementation. The median is reported.")
    ] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the weights.")] = "float32",
    layers: Annotated[
        int | None,
        typer.Option(help="Number of layers, if fewer than the model has.", show_default=False),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Requests in the MEMIT batch that is compared with single edits.")
    ] = 32,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show the operations that take the most time.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Compare the speed of editkit with a reference implementation of the published algorithms."""
    from editkit.bench import measurements, run_bench, table

    options = {
        "repeats": repeats,
        "device": device,
        "dtype": dtype,
        "layers": layers,
        "batch": batch,
        "profile": profile,
    }
    names = list(measurements()) if name == "all" else [name]
    results = [run_bench(measurement, shape, folder=folder, **options) for measurement in names]
    console().print(table(results), highlight=False, markup=False)
