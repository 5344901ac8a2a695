"""The card of an exported folder (README.md): what was edited and how, what was measured with which
protocol, what it cannot do, and how to load it.

Its front matter has the keys of the Hugging Face hub's model cards:
https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError
from editkit.records.reader import RunRecords
from editkit.report.escape import escape_cell
from editkit.report.labels import labels
from editkit.report.show import run_table
from editkit.report.tables import Table, editing_protocols, edits_by_step, markdown
from editkit.runner.adapter import DELTA, Adapter

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

README = "README.md"
ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # a repository's name
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
LOAD_SIDES = """\
import editkit

model = editkit.load_edited("FOLDER")  # with what stands beside the weights"""
LOAD_LORA = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "FOLDER")"""
LOAD_DELTA = f"""\
from safetensors.torch import load_file

factors = load_file("FOLDER/{DELTA}")
# add factors["<module>.left"] @ factors["<module>.right"].T to the matrix (d_out, d_in)"""


def write_card(folder: Path, text: str) -> None:
    """Writes the card. It takes the place of one that a library wrote."""
    (folder / README).write_text(text, encoding="utf-8")


def run_card(
    records: RunRecords,
    *,
    step: int,
    view: str | None,
    adapter: Adapter | None = None,
    form: str = "model",
    has_sides: bool = False,
) -> str:
    """The card of a run's model.

    Args:
        step: of the checkpoint.
        view: that was exported; None for the model as the run left it.
        adapter: the factors of the folder; None for a whole model.
        form: `model`, `lora` or `delta`.
        has_sides: whether something stands beside the weights of the folder's model.
    """
    config, provenance = records.config, records.provenance
    base = base_name(config)
    names = labels(config)
    edits = edits_by_step(records.steps).get(step)
    shown = view or left_view(records)
    lines = [
        *front(str((config.get("model") or {}).get("id")), form),
        "",
        f"# {escape_cell(names['model'])}, edited",
        "",
        "A language model with facts that were written into it after its training, one batch after"
        " another. Made with editkit.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {escape_cell(value)} |" for name, value in _facts(records, base, names)),
        f"| edits | {'?' if edits is None else edits} ({step} steps) |",
        f"| view | {escape_cell(shown)} |",
        f"| run | {escape_cell(_run_name(records.folder))} |",
        "",
        "## Measurements",
        "",
        *_measurements(records, shown, edits),
        *([] if adapter is None else factors_of(adapter)),
        "## Limits",
        "",
        *(f"- {limit}" for limit in _limits(records, form, provenance)),
        "",
        "## How to load it",
        "",
        "```python",
        loading(form, base, has_sides),
        "```",
        "",
        "`FOLDER` is this folder, or its name on the hub."
        + (
            f" `BASE` is the unedited model, {escape_cell(base)}."
            if "BASE" in LOADING[form]
            else ""
        ),
        "",
    ]
    return "\n".join(lines)


def session_card(model: EditableModel, *, editor: str, num_edits: int) -> str:
    """The card of a model that a session edited: nothing was measured."""
    model_id = model.network.config.name_or_path or model.name
    base = base_name({"model": {"id": model_id}})
    lines = [
        *front(model_id, "model"),
        "",
        f"# {escape_cell(base)}, edited",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {escape_cell(base)} |",
        f"| editor | {escape_cell(editor)} |",
        f"| edits | {num_edits} batches; editkit.json lists them |",
        "",
        "No measurements were written with it: it was edited in a session, not in a run.",
        "",
        "## How to load it",
        "",
        "```python",
        loading("model", base, bool(model.sides)),
        "```",
        "",
    ]
    return "\n".join(lines)


LOADING = {"model": LOAD_MODEL, "lora": LOAD_LORA, "delta": LOAD_DELTA}


def left_view(records: RunRecords) -> str:
    """The name of the view that a run leaves as its model."""
    nodes: Mapping[str, Any] = records.config.get("restraint") or {}
    ended = [name for name, node in nodes.items() if (node or {}).get("apply_at") == "end"]
    return ended[-1] if ended and records.status == "done" else records.trajectory_view


def base_name(config: Mapping[str, Any]) -> str:
    """The id of the base model. Of a path the last part: folders of a machine stay private."""
    model_id = str((config.get("model") or {}).get("id") or "?")
    return Path(model_id).name if _is_path(model_id) else model_id


def _is_path(model_id: str) -> bool:
    is_local = model_id.startswith(("/", "~", ".")) or model_id.count("/") > 1
    return is_local or Path(model_id).exists()


def _run_name(folder: Path) -> str:
    """The folder's name with those of its configuration and its experiment."""
    return "/".join(folder.resolve().parts[-3:])


def front(model_id: str, form: str) -> list[str]:
    """The front matter, in YAML. The hub links a base model that it has."""
    import yaml

    front: dict[str, Any] = {
        "library_name": "peft" if form == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "model-editing", "editkit"],
    }
    if ON_HUB.fullmatch(model_id) and not _is_path(model_id):
        relation = "finetune" if form == "model" else "adapter"
        front = {"base_model": model_id, "base_model_relation": relation} | front
    return ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---"]


def _facts(records: RunRecords, base: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    config, provenance = records.config, records.provenance
    yield "base model", base
    if print_ := (provenance.get("model") or {}).get("fingerprint"):
        yield "fingerprint of its weights", str(print_)
    yield "editor", names["editor"]
    yield "restraint", names["restraint"]
    data = provenance.get("dataset") or {}
    yield "dataset", names["dataset"]
    if digest := data.get("digest"):
        yield "digest of the dataset (SHA-256)", str(digest)
    recipe = config.get("recipe")
    if isinstance(recipe, Mapping) and recipe.get("provenance"):
        yield "origin of the editor's numbers", str(recipe["provenance"])
    if "seed" in config:
        yield "seed", str(config["seed"])
    packages = provenance.get("packages") or {}
    if packages:
        yield "versions", ", ".join(f"{name} {version}" for name, version in packages.items())


def _measurements(records: RunRecords, view: str, edits: int | None) -> list[str]:
    """A table for each protocol: the unedited model, and the last milestone of the view."""
    parts = []
    for protocol in editing_protocols(records.evals) or (None,):
        try:
            table = run_table(records, protocol=protocol)
        except ConfigError as error:  # records that no table can hold
            return [f"The measurements of the run are no table: {escape_cell(str(error))}", ""]
        kept = _kept(table, view, edits)
        if kept.rows:
            parts += [f"Protocol `{protocol}`:" if protocol else "Weights:", "", markdown(kept)]
    if not parts:
        return ["This view was not measured up to this step.", ""]
    return parts


def _kept(table: Table, view: str, edits: int | None) -> Table:
    rows = [row for row in table.rows if row.view == view and (edits is None or row.edits <= edits)]
    ends = [row for row in rows if row is rows[0] or row is rows[-1]]
    titles = [replace(column, title=escape_cell(column.title)) for column in table.columns]
    return replace(table, rows=tuple(ends), columns=tuple(titles))


def factors_of(adapter: Adapter) -> list[str]:
    """The section about the exactness of factors."""
    rows = [
        f"| `{name}` | {factor.rank} | {adapter.errors[name]:.2g} |"
        for name, factor in adapter.factors.items()
    ]
    return [
        "## Exactness of the factors",
        "",
        "The measurements are those of the whole edits. The error is that of the sum of all updates"
        " of a matrix, relative, in the Frobenius norm.",
        "",
        "| matrix | rank | error |",
        "|---|---:|---:|",
        *rows,
        "",
    ]


def _limits(records: RunRecords, form: str, provenance: Mapping[str, Any]) -> list[str]:
    limits = [
        "Edits are written for the prompts of the dataset. Other wordings, languages and what"
        " follows from a fact may still give the old answer: see generalization.",
        "Other knowledge may have changed: see locality and the tasks, where they were measured.",
        "Numbers of different protocols are not comparable.",
        "An edited fact is what somebody asked for, and may be false on purpose.",
    ]
    if form != "model":
        limits.append("It needs the base model with the fingerprint above.")
    if records.status != "done":
        limits.append(f"The run was not complete when it was exported: {records.status}.")
    if provenance.get("statistics_imported"):
        limits.append("The covariance statistics were imported and not computed in this run.")
    return limits


def loading(form: str, base: str, has_sides: bool) -> str:
    """The lines of Python that load a folder."""
    if form == "model" and has_sides:
        return LOAD_SIDES
    return LOADING[form].replace("BASE", base)


def total_size(sizes: Sequence[int]) -> str:
    """Bytes for a reader."""
    size = float(sum(sizes))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
