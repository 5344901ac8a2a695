"""The measurements by name, their result files and their table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.bench import editing, memit, moments, rome, search, serve, solves, telemetry
from editkit.bench.base import Comparison, Options, machine
from editkit.bench.shapes import model_shapes
from editkit.errors import ConfigError, message
from editkit.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

FOLDER = Path("benchmarks/results")
# Further numbers, shown below the table.
NOTES = (
    *("phases_s", "telemetry_share", "batch", "batch_per_edit_s", "batch_gain", "batch_cpu_gain"),
    *("edit_1_s", "later_over_first", "later_over_first_cpu", "records", "plain_records"),
    *("tokens", "unstopped_s", "flop_ratio", "edit_growth", "entries"),
)


def measurements() -> dict[str, Callable[[Options], Comparison]]:
    """All measurements by name."""
    return {
        "telemetry": telemetry.measure,
        "rome": rome.measure,
        "attention": search.measure_attention,
        "products": search.measure_products,
        "memit": memit.measure,
        "d4s": memit.measure_d4s,
        "alphaedit": memit.measure_alphaedit,
        "editing": editing.measure,
        "moments": moments.measure,
        "serve": serve.measure,
        "ultraedit": solves.measure_ultraedit,
        "sphere": solves.measure_sphere,
        "lyaplock": solves.measure_lyaplock,
        "simie": solves.measure_simie,
    }


def run_bench(name: str, shape: str, *, folder: Path = FOLDER, **options: Any) -> dict[str, Any]:
    """Runs one measurement at the shape of a model and writes `<folder>/<name>-<shape>.json`. The
    file's name also states a reduced depth, a device and a dtype that are not the defaults.

    Args:
        options: the fields of `Options`.

    Returns:
        the content of the file.

    Raises:
        ConfigError: there is no such measurement or shape, or an option is out of range.
    """
    problems = []
    if name not in measurements():
        expected = f"one of {', '.join(measurements())}"
        problems.append(message("bench", "unknown measurement", got=name, expected=expected))
    try:
        chosen = Options(model=shape, **options)
        _ = chosen.shape
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    facts = {
        "name": name,
        "model": shape,
        "layers": chosen.shape.num_layers,
        "layers_of_the_model": model_shapes()[shape].num_layers,
        "dtype": chosen.dtype,
        "repeats": chosen.repeats,
        "command": chosen.command(name),
    }
    facts |= machine(chosen.device)  # before: the load is what else was running
    result = facts | measurements()[name](chosen).as_json()
    write_atomically(
        folder / f"{name}-{chosen.label()}.json", (json.dumps(result, indent=1) + "\n").encode()
    )
    return result


def table(results: Sequence[dict[str, Any]]) -> Group:
    """A row for each result, and further numbers of some results below."""
    from rich.console import Group
    from rich.table import Table

    rows = Table(
        "",
        "reference s",
        "editkit s",
        "ratio",
        "CPU ratio",
        "difference",
        "peak GB",
        box=None,
        pad_edge=False,
    )
    for column in rows.columns[1:]:
        column.justify, column.no_wrap = "right", True
    notes: list[Any] = []
    for result in results:
        name = f"{result['name']} {result['model']}"
        rows.add_row(
            name,
            f"{result['plain_s']:.3g}",
            f"{result['ours_s']:.3g}",
            f"{result['ratio']:.1f}x",
            f"{result['cpu_ratio']:.1f}x",
            f"{result['relative_difference']:.1e}",
            f"{result['plain_peak_bytes'] / 1e9:.1f} / {result['ours_peak_bytes'] / 1e9:.1f}",
        )
        facts = [f"{key} {_short(result[key])}" for key in NOTES if key in result]
        if result["layers"] < result["layers_of_the_model"]:
            facts.insert(0, f"{result['layers']} of {result['layers_of_the_model']} layers")
        notes += [f"{name}: {', '.join(facts)}"] if facts else []
        for editor, latencies in result.get("served", {}).items():
            shown = ", ".join(f"{kind} {_short(value)}" for kind, value in latencies.items())
            notes.append(f"{name}: {editor}: {shown}")
        if profile := result.get("profile"):
            kinds = [kind for kind in ("phase", "operation") if any(kind in row for row in profile)]
            notes += [note for kind in kinds for note in ("", _profile_table(profile, kind))]
    return Group(rows, *notes)


def _profile_table(profile: Sequence[dict[str, Any]], kind: str) -> Table:
    """The phases of a step, or the longest operations."""
    from rich.table import Table

    table = Table(kind, "s", "share", "calls", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in profile:
        if kind in row:
            table.add_row(
                row[kind], f"{row['seconds']:.3f}", f"{row['share']:.1%}", str(row["calls"])
            )
    return table


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " + ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)
