"""A run's edited model as a Hugging Face folder, for use without editkit. What stands beside the
weights is written beside them, and `editkit.load_edited` puts it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import ConfigError, message
from editkit.files import with_usual_mode
from editkit.model.load import ModelConfig
from editkit.records.reader import RunRecords, load_run
from editkit.records.views import trajectory_view
from editkit.restraints.base import AbstractRestraint, AbstractTotalRestraint
from editkit.runner.adapter import Adapter, adapter_of, products, write_adapter
from editkit.runner.card import run_card, write_card
from editkit.runner.checkpoint import RunState, load_state
from editkit.runner.inputs import MODEL
from editkit.runner.side_files import write_sides
from editkit.runner.step import attach, restrain_totals

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


# The edited model; a LoRA adapter of peft; the factors of the totals.
Form = Literal["model", "lora", "delta"]


def export(
    run: Path, to: Path, *, view: str | None = None, form: Form = "model", rank: int | None = None
) -> dict[str, float]:
    """Writes the model of a run's last checkpoint as `save_pretrained` does (safetensors and
    tokenizer), or what the edits add to its base model.

    Args:
        run: the run's folder.
        to: the folder to write, which appears whole or not at all.
        view: None for the model as the run left it, or the name of a view, for that view of the
            model at that step.
        form: `model`; `lora` for an adapter that peft loads; `delta` for the factors of each total.
        rank: the largest rank of an adapter's matrices. None: that of the totals.

    Returns:
        The relative error of each matrix's total in the Frobenius norm; empty for a model.

    Raises:
        ConfigError: the folder is not a run or has no checkpoint; the run has no such view; the
            base model is missing or is not the one that was edited; `to` is not empty; the edits
            cannot be written in this form.
    """
    records = load_run(run)
    problems = option_problems(to, form=form, rank=rank)
    model, state = _edited(records, view, problems, device="cpu")

    def card(adapter: Adapter | None) -> str:
        sides = bool(model.sides)
        return run_card(
            records, step=state.step, view=view, adapter=adapter, form=form, has_sides=sides
        )

    about = _about(records, state, view)
    return write_edited(model, to, about=about, card=card, form=form, rank=rank)


def option_problems(to: Path, *, form: str, rank: int | None) -> Problems:
    """What is wrong with the options of an export, without the model."""
    problems = Problems()
    if form not in get_args(Form):
        expected = f"one of {', '.join(get_args(Form))}"
        problems.add(message("--as", "unknown form", got=form, expected=expected))
    if rank is not None and (form == "model" or rank < 1):
        expected = "1 or more, with --as lora or delta"
        problems.add(message("--rank", "cannot be used here", got=rank, expected=expected))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        problems.add(
            message(
                "--to", f"{to} exists and is not empty", fix="name a new folder, or an empty one"
            )
        )
    return problems


def write_edited(
    model: EditableModel,
    to: Path,
    *,
    about: Mapping[str, Any],
    card: Callable[[Adapter | None], str],
    form: Form,
    rank: int | None,
) -> dict[str, float]:
    """Writes an edited model in one of the forms of `export`, and returns the same.

    Args:
        about: the content of editkit.json.
        card: gives the content of README.md, from the factors that are written; None for a model.

    Raises:
        ConfigError: the edits cannot be written in this form, or the folder cannot be written.
    """
    if form == "model":
        save_model(model, to, about=about, card=card(None))
        return {}
    adapter = adapter_of(model, model.totals() or products(model.sides), rank=rank)
    _write(to, about, card(adapter), lambda folder: write_adapter(adapter, folder, form=form))
    return adapter.errors


def edited_model(
    run: Path, *, view: str | None = None, device: str | None = None
) -> tuple[EditableModel, RunRecords, RunState]:
    """The model of a run's last checkpoint or of a view of it, with the run's records and state.

    Raises:
        ConfigError: the folder is not a run or has no checkpoint; the run has no such view; the
            base model is missing or is not the one that was edited.
    """
    records = load_run(run)
    model, state = _edited(records, view, Problems(), device=device or "cpu")
    return model, records, state


def _edited(
    records: RunRecords, view: str | None, problems: Problems, *, device: str
) -> tuple[EditableModel, RunState]:
    """The same of records that were read. `problems` are those of the caller's own arguments."""
    run = records.folder
    config = construct(records.config.get("model"), "model", ModelConfig, problems)
    added = () if view is None else added_by(records.config.get("restraint"), view, problems)
    if config is None or problems.messages:
        raise ConfigError(
            [
                f"{run}: {problem}" if not problem.startswith("--") else problem
                for problem in problems.messages
            ]
        )
    state = load_state(run / "state")
    ends = [
        name
        for name, node in (records.config.get("restraint") or {}).items()
        if node.get("apply_at") == "end"
    ]
    # A checkpoint without inputs does not tell whether its totals are restrained already.
    if view is not None and ends and not state.inputs:
        raise ConfigError(
            message(
                str(run),
                "the checkpoint was written by an earlier version of editkit, which did not keep "
                f"the model from before {' and '.join(ends)} acted at the end",
                fix="export without --view, or run it again with resume=never",
            )
        )
    model = config.load(device)
    noted = (records.provenance.get("model") or {}).get("fingerprint", model.fingerprint)
    edited = state.inputs.get(MODEL, noted)  # the provenance is of the last session
    if edited != model.fingerprint:
        raise ConfigError(
            message(
                "model.id",
                f"this is not the model that was edited in {run}, its weights have changed since",
                got=config.id,
            )
        )
    model.edit(tuple(state.totals))
    model.restore(state.totals if view is None else state.before_end or state.totals)
    if state.editor and not state.totals:  # of an editor beside the weights, or of a user's own
        editor = construct(records.config.get("editor"), "editor", AbstractAnyEditor, problems)
        if editor is None:
            raise ConfigError([f"{run}: {problem}" for problem in problems.messages])
        attach(model, editor, state.editor)
    for restraint in added:
        restrain_totals(model, restraint, model.totals(), state.base_sigma_max)
    return model, state


def added_by(nodes: Any, view: str, problems: Problems) -> tuple[AbstractTotalRestraint, ...]:
    """The restraints that make this view of the edits, in their order. Adds to `problems` if the
    run has no such view.
    """
    made = {
        name: construct(node, f"restraint.{name}", AbstractRestraint, problems)
        for name, node in (nodes or {}).items()
    }
    totals = {
        name: restraint
        for name, restraint in made.items()
        if isinstance(restraint, AbstractTotalRestraint)
    }
    views: dict[str, tuple[AbstractTotalRestraint, ...]] = {
        trajectory_view({name: restraint.apply_at for name, restraint in totals.items()}): ()
    }
    ended: tuple[AbstractTotalRestraint, ...] = ()
    for name, restraint in totals.items():
        if restraint.apply_at == "end":
            views[name] = ended = (*ended, restraint)
        elif restraint.apply_at == "evaluation":
            views[name] = (restraint,)
    if view not in views:
        expected = f"one of {', '.join(views)}"
        problems.add(message("--view", "the run has no such view", got=view, expected=expected))
    return views.get(view, ())


def _about(records: RunRecords, state: RunState, view: str | None) -> dict[str, Any]:
    """The content of editkit.json: where the model comes from."""
    return {
        "run": records.folder.name,
        "step": state.step,
        "view": view,
        "config": records.config,
        "provenance": records.provenance,
    }


def save_model(model: EditableModel, to: Path, *, about: Mapping[str, Any], card: str) -> None:
    """Writes the model and what stands beside its weights as a folder, which appears whole or not
    at all.

    Args:
        about: the content of editkit.json.
        card: the content of README.md.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written.
    """

    def fill(folder: Path) -> None:
        model.network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        write_sides(model, folder)

    _write(to, about, card, fill)


def _write(to: Path, about: Mapping[str, Any], card: str, fill: Callable[[Path], object]) -> None:
    """Fills a folder under a temporary name in the same place, then renames it. Raises ConfigError
    if it cannot be written.
    """
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        fill(temporary)
        write_card(temporary, card)
        (temporary / "editkit.json").write_text(json.dumps(about, indent=1))
        for path in temporary.rglob("*.safetensors"):
            with_usual_mode(path)
        # An empty folder gives way; one that was filled in the meantime does not.
        os.replace(temporary, to)
    except OSError as error:
        raise ConfigError(message("--to", f"{to} cannot be written ({error})")) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
