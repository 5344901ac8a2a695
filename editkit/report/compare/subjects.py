"""What belongs together when runs are compared: a view of a run as one measured subject, with its
labels, its seed and its twins.

Runs that differ in the seed alone are repetitions of one subject. What a restraint on the total
adds to a view counts as part of that view alone: the unrestrained model of a run with PRUNE is the
same subject as the same run without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from editkit.config.identity import UNHASHED, canonical, config_hash
from editkit.records.reader import RunRecords
from editkit.report.labels import NONE, labels, restraint_label

# Options that tell two subjects apart only if nothing else does: they say when and how the subjects
# were measured, which the tables show themselves.
UNTOLD = ("milestones", "suite.", "evaluation.")
MOST_TOLD = 3  # options in a row's label
AT_THE_VIEW = ("evaluation", "end")  # the values of apply_at that do not change the trajectory


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One view of one run."""

    run: RunRecords
    view: str
    subject: str  # the same for repetitions that differ in the seed alone: a hash
    bare: str  # the same for all subjects that differ in their restraints alone
    model: str
    editor: str
    restraint: str  # "none", "eac", "eac+prune"
    dataset: str
    seed: int
    # by what it differs from other subjects of these labels, "" if there are none
    options: str = ""

    @property
    def label(self) -> tuple[str, str, str]:
        """What a table's row is called: model, editor, restraint with the options that tell it from
        others.
        """
        return (
            self.model,
            self.editor,
            f"{self.restraint} ({self.options})" if self.options else self.restraint,
        )

    @property
    def is_restrained(self) -> bool:
        return self.restraint != NONE

    @property
    def is_trajectory(self) -> bool:
        """Whether the step records describe this view."""
        return self.view == self.run.trajectory_view


def measured(runs: Iterable[RunRecords]) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """Every view of every run, and sentences on what was left out because it is there twice."""
    run_views: dict[tuple[str, int], Measured] = {}
    notes: list[str] = []
    configs: dict[str, dict[str, Any]] = {}
    for run in runs:
        for view in run.views:
            config = _config_of_view(run.config, view)
            run_view = _measured(run, view, config)
            earlier = run_views.setdefault((run_view.subject, run_view.seed), run_view)
            configs[run_view.subject] = config
            if earlier is not run_view:
                keeper = _further(earlier, run_view)
                run_views[run_view.subject, run_view.seed] = keeper
                other = run_view if keeper is earlier else earlier
                notes.append(
                    f"{other.run.folder} ({other.view}) is the same cell as {keeper.run.folder} "
                    "and was left out"
                )
    return _with_options(tuple(run_views.values()), configs), tuple(notes)


def pairs(subjects: Sequence[Measured]) -> dict[str, str]:
    """The unrestrained twin of each restrained subject that has one: the same configuration but for
    the restraints.
    """
    bare = {run_view.bare: run_view.subject for run_view in subjects if not run_view.is_restrained}
    return {
        run_view.subject: bare[run_view.bare]
        for run_view in subjects
        if run_view.is_restrained and run_view.bare in bare
    }


def _config_of_view(config: Mapping[str, Any], view: str) -> dict[str, Any]:
    """The configuration with the restraints that act on this view."""
    nodes: Mapping[str, Any] = config.get("restraint") or {}
    kept = {
        name: node
        for name, node in nodes.items()
        if name == view or (node or {}).get("apply_at") not in AT_THE_VIEW
    }
    return {**config, "restraint": kept}


def _measured(run: RunRecords, view: str, config: Mapping[str, Any]) -> Measured:
    named = labels(config)
    editor = {
        name: value for name, value in (config.get("editor") or {}).items() if name != "name"
    }  # d4s is memit with a restraint
    restraints = [restraint_label(name, node) for name, node in config["restraint"].items()]
    return Measured(
        run=run,
        view=view,
        subject=config_hash(config),
        bare=config_hash({**config, "editor": editor, "restraint": {}}),
        model=named["model"],
        editor=named["editor"],
        restraint="+".join(restraints) or NONE,
        dataset=named["dataset"],
        seed=int(config.get("seed", run.provenance.get("seed", 0)) or 0),
    )


def _further(one: Measured, other: Measured) -> Measured:
    """The one whose run has more steps; the first of equals."""
    return other if len(other.run.steps) > len(one.run.steps) else one


def _with_options(
    subjects: tuple[Measured, ...], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[Measured, ...]:
    """Names the values by which subjects of the same labels differ, so that no two rows of a table
    look alike.
    """
    alike: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for run_view in subjects:
        flat = _flat(
            canonical(
                {
                    name: value
                    for name, value in configs[run_view.subject].items()
                    if name not in UNHASHED
                }
            )
        )
        alike.setdefault((*run_view.label, run_view.dataset), {})[run_view.subject] = flat
    experiments = {
        run_view.subject: str(run_view.run.config.get("experiment_name")) for run_view in subjects
    }
    told = {
        subject: text
        for group in alike.values()
        for subject, text in _told(group, experiments).items()
    }
    return tuple(replace(run_view, options=told[run_view.subject]) for run_view in subjects)


def _told(group: Mapping[str, Mapping[str, str]], experiments: Mapping[str, str]) -> dict[str, str]:
    """A short text for each of some subjects of the same labels: the values in which they differ,
    or their experiment, or their hash.
    """
    keys = dict.fromkeys(key for flat in group.values() for key in flat)
    differing = [key for key in keys if len({flat.get(key) for flat in group.values()}) > 1]
    shown = [key for key in differing if not key.startswith(UNTOLD)] or differing
    texts = {
        subject: ", ".join(f"{_short(key)}={flat[key]}" for key in shown if key in flat)
        for subject, flat in group.items()
    }
    if len(shown) <= MOST_TOLD and len(set(texts.values())) == len(group):
        return texts
    if len({experiments[subject] for subject in group}) == len(group):
        return {subject: f"of {experiments[subject]}" for subject in group}
    short = {
        subject: ", ".join(f"{_short(key)}={flat[key]}" for key in shown[:MOST_TOLD] if key in flat)
        for subject, flat in group.items()
    }
    return {subject: f"{text}, ... #{subject[:4]}".lstrip(", ") for subject, text in short.items()}


def _flat(node: Any, key: str = "") -> dict[str, str]:
    if isinstance(node, Mapping):
        return {
            inner: value
            for name, child in node.items()
            for inner, value in _flat(child, f"{key}.{name}" if key else str(name)).items()
        }
    return {key: str(node)}


def _short(key: str) -> str:
    """The last part of a dotted key, with the one before it where it would say nothing alone."""
    parts = key.split(".")
    return parts[-1] if len(parts[-1]) > 4 or len(parts) == 1 else ".".join(parts[-2:])
