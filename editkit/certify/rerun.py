"""Recomputing a sample of a run's measurements, from its checkpoint and its ledger.

A unit of the sample is what one evaluator measures of one view at one step. The unedited model and
that of the last step can always be measured; those between, if the run kept a ledger. The answers
of the unedited model are computed anew, too. What was noted right after an edit (`immediate`) and
the weights' telemetry are not recomputed.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.certify.certificate import Certificate
from editkit.config.build import build
from editkit.config.experiment import Experiment
from editkit.editors.base import AbstractEditor
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.ledger.replay import Restrained, totals_of
from editkit.linalg.total import Total
from editkit.model.shortcuts import Shortcuts
from editkit.records.ledger import LEDGER, Ledger, read_ledger
from editkit.records.reader import RunRecords, load_run
from editkit.runner.checkpoint import RunState, load_state
from editkit.runner.measure import corrections, measure
from editkit.runner.plan import DIGITS, Trajectory
from editkit.runner.step import attach
from editkit.stats.store import Moments
from editkit.types import EvalRecord, as_json

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel

VALUES = ("value", "stderr", "low", "high", "n")
# What rests on observations right after an edit, which are not made again.
NOTED = {"timing": "immediate", "metric": "forgetting", "subset": "succeeded"}


@dataclass(frozen=True, kw_only=True, order=True)
class Unit:
    """One measurement of the run."""

    step: int
    view: str
    evaluator: str

    def __str__(self) -> str:
        return f"{self.evaluator}, step {self.step}, {self.view}"


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """Recomputed measurements."""

    seed: int
    units: tuple[Unit, ...]  # that were recomputed
    possible: int  # units that could be
    pairs: tuple[Pair, ...]

    def problems(self, tolerance: float) -> list[str]:
        """The numbers that differ by more than the tolerance, and those that only one side has."""
        found = []
        for pair in self.pairs:
            key = f"numbers ({' '.join(pair.facts.values())})"
            if not pair.is_certified:
                problem = "it was measured, but is not among the certified numbers"
                found.append(message(key, problem, got=pair.now))
            elif not pair.is_measured:
                problem = "the certified number was not measured"
                found.append(message(key, problem, got=pair.stated))
            elif _differ(pair.stated, pair.now, tolerance):
                problem, now = "the recomputed number is another one", repr(pair.now)
                found.append(message(key, problem, got=pair.stated, expected=now))
        return found


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A value of a certified number, and the recomputed one. A value is None if it is not finite,
    or if there is no such number.
    """

    facts: Mapping[str, str]  # what it is about
    stated: float | None
    now: float | None
    is_certified: bool = True
    is_measured: bool = True


def _differ(stated: float | None, now: float | None, tolerance: float) -> bool:
    if stated is None or now is None:
        return stated is not now
    return not math.isclose(stated, now, rel_tol=tolerance, abs_tol=tolerance)


def rerun(
    certificate: Certificate,
    folder: Path,
    *,
    share: float,
    seed: int | None = None,
    device: str | None = None,
) -> Rerun:
    """Recomputes a share of the measurements, chosen at random, at least one.

    Raises:
        ConfigError: the run's inputs (dataset, model) are missing or not those that the certificate
            names, or nothing of the run can be measured again.
    """
    records = load_run(folder)
    if records.config.get("rollback"):
        problem = "with rollback=true no edited model was kept that could be measured"
        raise ConfigError(message("--rerun", problem))
    state = load_state(folder / "state")
    ledger = read_ledger(folder) if (folder / LEDGER).exists() else None
    experiment = build(records.config)
    _require_dataset(certificate, experiment)
    possible = units_of(records, state, experiment, ledger)
    if not possible:
        raise ConfigError(message("--rerun", "the run holds nothing that can be measured again"))
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    count = max(1, math.ceil(share * len(possible)))
    chosen = sorted(random.Random(seed).sample(possible, count))
    work = _Work.of(certificate, experiment, state, ledger, records, device)
    pairs = [pair for unit in chosen for pair in _pairs(unit, work.measured(unit), records.evals)]
    return Rerun(
        seed=seed,
        units=tuple(chosen),
        possible=len(possible),
        pairs=tuple(pairs),
    )


def _require_dataset(certificate: Certificate, experiment: Experiment) -> None:
    stated = (certificate.section("inputs").get("dataset") or {}).get("digest")
    if experiment.data.digest != stated:
        got = experiment.data.digest[:DIGITS]
        expected = f"a digest that begins with {str(stated)[:DIGITS]!r}"
        problem = f"{experiment.data.origin} is not the certified dataset"
        raise ConfigError(message("dataset", problem, got=got, expected=expected))


def units_of(
    records: RunRecords, state: RunState, experiment: Experiment, ledger: Ledger | None
) -> list[Unit]:
    """The measurements whose model can be made again."""
    totals = experiment.restraints.totals
    ends = [name for name, each in totals.items() if each.apply_at == "end"]
    views = [experiment.restraints.trajectory_view]
    views += [name for name, each in totals.items() if each.apply_at == "evaluation"]
    found: set[Unit] = set()
    for record in records.evals:
        step, view, name = record.step, record.view, evaluator_of(record)
        if name not in experiment.evaluators or (step not in (0, state.step) and ledger is None):
            continue
        # Of several restraints at the end, the models between are not kept.
        if view in views or (ends and view == ends[-1] and step == state.step):
            found.add(Unit(step=step, view=view, evaluator=name))
    return sorted(found)


def evaluator_of(record: EvalRecord) -> str:
    """The name of the evaluator that measured a number; empty if it was none, or if the number
    rests on what was observed right after an edit.
    """
    made = record.measurement
    if any(getattr(made, field) == value for field, value in NOTED.items()):
        return ""
    if made.kind == "editing":
        return "fluency" if made.protocol == "text" else "editing"
    kinds = {"downstream": "suite", "comparison": "suite", "language": "perplexity"}
    return kinds.get(made.kind, "")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a measurement needs, with the base model loaded."""

    run: Trajectory
    state: RunState  # with baselines that were computed anew
    ledger: Ledger | None

    @classmethod
    def of(
        cls,
        certificate: Certificate,
        experiment: Experiment,
        state: RunState,
        ledger: Ledger | None,
        records: RunRecords,
        device: str | None,
    ) -> _Work:
        if experiment.runtime.threads:
            torch.set_num_threads(experiment.runtime.threads)
        model = experiment.model.load(device or "cpu")
        inputs = certificate.section("inputs")
        stated = (inputs.get("model") or {}).get("fingerprint")
        if model.fingerprint != stated:
            problem = "this is not the certified model"
            got, expected = model.fingerprint, str(stated)
            raise ConfigError(message("model.id", problem, got=got, expected=expected))
        model.shortcuts = Shortcuts.from_report(state.shortcuts)
        by_id = {request.id: request for request in experiment.data.requests}
        ids: Sequence[str] = records.provenance["requests"]
        if missing := [name for name in ids if name not in by_id]:
            raise ConfigError(message("requests", "the dataset lacks some", got=missing[:5]))
        evaluators = {
            name: evaluator.prepare(model) for name, evaluator in experiment.evaluators.items()
        }
        run = Trajectory(
            model=model,
            editor=experiment.editor,
            restraints=experiment.restraints,
            requests=tuple(by_id[name] for name in ids),
            evaluators=evaluators,
            schedule=experiment.schedule,
            moments=Moments(),
            seed=experiment.seed,
            timings=tuple(each for each in experiment.measuring.timings if each != "immediate"),
            max_requests=experiment.measuring.max_requests,
            block_size=experiment.evaluation.block_size,
            dataset=experiment.data.digest[:DIGITS],
            data=experiment.data,
        )
        baselines = {
            name: evaluator.baseline(model, run.ever_measured())
            for name, evaluator in evaluators.items()
        }
        if isinstance(experiment.editor, AbstractEditor):
            model.edit(tuple(state.totals))
        fresh = replace(state, baselines=baselines, notes={})
        return cls(run=run, state=fresh, ledger=ledger)

    def measured(self, unit: Unit) -> list[EvalRecord]:
        """The records of a unit, measured now."""
        run, model = self.run, self.run.model
        one = {unit.evaluator: run.evaluators[unit.evaluator]}
        state = replace(self.state, step=unit.step, totals=self._totals(unit))
        model.restore(state.totals)
        attach(model, run.editor, self.state.editor) if unit.step else model.attach()
        with self._as_viewed(model, unit, state):
            events = measure(replace(run, evaluators=one), state, unit.view)
            return [event for event in events if isinstance(event, EvalRecord)]

    def _totals(self, unit: Unit) -> dict[str, Total]:
        state = self.state
        if unit.step == 0:
            return {name: Total(total.shape) for name, total in state.totals.items()}
        totals = self.run.restraints.totals
        ended = unit.view in totals and totals[unit.view].apply_at == "end"
        if unit.step == state.step:
            return dict(state.totals if ended else state.before_end or state.totals)
        assert self.ledger is not None  # of `units_of`
        blocks = [block for block in self.ledger.blocks if block.id <= unit.step]
        restrained = Restrained(every=totals, with_ends=False)
        return totals_of(blocks, self.run.model, restrained)

    def _as_viewed(
        self, model: EditableModel, unit: Unit, state: RunState
    ) -> contextlib.AbstractContextManager[None]:
        restraint = self.run.restraints.totals.get(unit.view)
        if restraint is None or restraint.apply_at != "evaluation":
            return contextlib.nullcontext()
        added: dict[str, Update] = corrections(restraint, state.totals, state.base_sigma_max)
        return model.temporarily(added)


def _pairs(
    unit: Unit, now: Sequence[EvalRecord], certified: Sequence[EvalRecord]
) -> Iterator[Pair]:
    """Each recomputed number with the certified one of the same facts, and those that only one side
    has.
    """
    mine = {_facts(record): record for record in now if evaluator_of(record) == unit.evaluator}
    theirs = {
        _facts(record): record
        for record in certified
        if (record.step, record.view, evaluator_of(record))
        == (unit.step, unit.view, unit.evaluator)
    }
    for facts in dict.fromkeys((*mine, *theirs)):
        ours, other = mine.get(facts), theirs.get(facts)
        for name in VALUES:
            values = [None if each is None else each.flat()[name] for each in (other, ours)]
            if name == "value" or values != [None, None]:
                yield Pair(
                    facts=dict(facts) | {"of": name},
                    stated=values[0],
                    now=values[1],
                    is_certified=other is not None,
                    is_measured=ours is not None,
                )


def _facts(record: EvalRecord) -> tuple[tuple[str, str], ...]:
    """What a number is about: everything on its line but the number."""
    left_out = (*VALUES, "nonfinite", "statistics")
    kept = {name: value for name, value in as_json(record).items() if name not in left_out}
    return tuple((name, str(value)) for name, value in kept.items())
