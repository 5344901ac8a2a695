"""A run's edited model as a Hugging Face folder, for whoever wants to use it without editkit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError
from editkit.model.load import ModelConfig
from editkit.report.load import RunRecords, load_run
from editkit.restraints.base import AbstractRestraint, AbstractTotalRestraint
from editkit.schema import Problems, construct
from editkit.state import RunState, load_state
from editkit.views import UNRESTRAINED, corrections

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel


def export(run: Path, to: Path, *, view: str | None = None) -> None:
    """Writes the model of a run's last checkpoint into the folder `to`, as `save_pretrained` does (safetensors and tokenizer).

    `view` None is the model as the edits left it, the name of a restraint on the total that view of it. `to` appears whole or not at all.
    Raises ConfigError for a folder that is no run or has no checkpoint, a view that the run has not, a base model that is not there or is
    no longer the one that was edited, and a target that is not empty.
    """
    records = load_run(run)
    problems = Problems()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        problems.add(f"--to: {to} is there already and not empty. Name a new folder, or an empty one.")
    config = construct(records.config.get("model"), "model", ModelConfig, problems)
    restraint = None if view is None or view == UNRESTRAINED else _restraint(records.config.get("restraint"), view, problems)
    if config is None or problems.found:
        raise ConfigError([f"{run}: {problem}" if not problem.startswith("--") else problem for problem in problems.found])
    state = load_state(run / "state")
    model = config.load("cpu")
    edited = (records.provenance.get("model") or {}).get("fingerprint", model.fingerprint)
    if edited != model.fingerprint:
        raise ConfigError(f"model.id: {config.id!r} is not the model that was edited in {run}: its weights have changed since.")
    model.edit(tuple(state.totals))
    model.restore(state.totals)
    with model.temporarily(_added(restraint, state, has_ended=records.status == "done")):
        _save(model, to, about=_about(records, state, view))


def _restraint(nodes: Any, view: str, problems: Problems) -> AbstractTotalRestraint | None:
    """The restraint that makes this view; None after noting why there is none."""
    made = {name: construct(node, f"restraint.{name}", AbstractRestraint, problems) for name, node in (nodes or {}).items()}
    totals = {name: restraint for name, restraint in made.items() if isinstance(restraint, AbstractTotalRestraint)}
    if view not in totals:
        problems.add(f"--view: the run has no view {view!r}. Views: {', '.join([UNRESTRAINED, *totals])}.")
    return totals.get(view)


def _added(restraint: AbstractTotalRestraint | None, state: RunState, *, has_ended: bool) -> dict[str, Update]:
    """What the view adds to the totals; nothing where the run has put it into them itself."""
    if restraint is None or restraint.apply_at == "every" or (restraint.apply_at == "end" and has_ended):
        return {}
    return corrections(restraint, state.totals, state.base_sigma_max)


def _about(records: RunRecords, state: RunState, view: str | None) -> dict[str, Any]:
    """What the folder holds, for whoever finds it later."""
    return {"run": records.folder.name, "step": state.step, "view": view, "config": records.config, "provenance": records.provenance}


def _save(model: EditableModel, to: Path, *, about: Mapping[str, Any]) -> None:
    """Under a temporary name beside `to`, then renamed. Raises ConfigError where it cannot be written."""
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        model.network.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        (temporary / "editkit.json").write_text(json.dumps(about, indent=1))
        os.replace(temporary, to)  # an empty folder gives way, one that was filled meanwhile does not
    except OSError as error:
        raise ConfigError(f"--to: {to} cannot be written ({error}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
