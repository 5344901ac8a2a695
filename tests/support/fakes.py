"""Stand-ins for the parts of a run: real objects with the real interfaces, that do something small
and known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from editkit.config.schedule import Schedule
from editkit.editors.base import AbstractAnyEditor, AbstractEditor, Plan, Step
from editkit.evaluation.base import AbstractEvaluator
from editkit.linalg.lowrank import LowRank
from editkit.restraints.base import Restraints
from editkit.runner.plan import Trajectory
from editkit.stats.store import Moments
from editkit.types import EditRequest, Measurement


@dataclass(frozen=True, kw_only=True)
class FakeEditor(AbstractEditor[Plan]):
    """Adds a random rank-one update a step; draws from torch's global generator, so that a resumed
    run must restore it.
    """

    layers: tuple[int, ...] = (0, 1)
    scale: float = 0.01
    fails_at: str = ""  # id of a request whose update is not finite
    calls: list[str] | None = None

    def modules(self, model: Any) -> tuple[str, ...]:
        return tuple(model.family.down_projection(layer) for layer in self.layers)

    def contexts(self, model: Any, generator: torch.Generator) -> tuple[str, ...]:
        return ("{}", f"{int(torch.randint(1000, (1,), generator=generator))}. {{}}")

    def init(self, model: Any, moments: Moments) -> Mapping[str, torch.Tensor]:
        return {"seen": torch.zeros(1)}

    def plan(self, step: Step) -> Plan:
        self._note("plan")
        return Plan(summary={"loss": float(step.state["seen"])})

    def propose(self, step: Step, module: str, plan: Plan) -> LowRank:
        self._note(f"propose {module}")
        rows, columns = step.model.weight(module).shape
        left_OR = torch.randn(rows, 1) * self.scale
        if any(request.id == self.fails_at for request in step.requests):
            left_OR[0] = float("nan")
        return LowRank(left_OR, torch.randn(columns, 1))

    def observe(self, step: Step, plan: Plan) -> Mapping[str, torch.Tensor]:
        self._note("observe")
        return {"seen": step.state["seen"] + len(step.requests)}

    def _note(self, call: str) -> None:
        if self.calls is not None:
            self.calls.append(call)


@dataclass(frozen=True, kw_only=True)
class SumOfWeights(AbstractEvaluator):
    """Measures one edited matrix: a number that any change of any weight changes."""

    module: str

    def baseline(self, model: Any, requests: Sequence[EditRequest]) -> Mapping[str, torch.Tensor]:
        return {"sum": model.weight(self.module).double().sum()}

    def evaluate(
        self, model: Any, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> list[Measurement]:
        value = float(model.weight(self.module).double().sum() - baseline["sum"])
        return [
            Measurement(
                kind="editing",
                protocol="fake",
                metric="moved",
                value=value,
                stderr=0.0,
                n=len(requests),
            )
        ]


def trajectory(
    model: Any,
    requests: Sequence[EditRequest],
    *,
    editor: AbstractAnyEditor[Any] | None = None,
    restraints: Restraints | None = None,
    milestones: tuple[int, ...] = (0, 2, 6),
    batch_size: int = 1,
    checkpoint_every: int = 2,
    on_collapse: Any = "stop",
    should_stop: Callable[[], bool] = lambda: False,
) -> Trajectory:
    editor = editor or FakeEditor()
    first = model.family.down_projection(0)  # for an editor that writes no matrix
    return Trajectory(
        model=model,
        editor=editor,
        restraints=restraints or Restraints(),
        requests=tuple(requests),
        evaluators={"fake": SumOfWeights(module=(*editor.modules(model), first)[0])},
        schedule=Schedule(
            edits=len(requests),
            batch_size=batch_size,
            milestones=milestones,
            telemetry_every=1,
            checkpoint_every=checkpoint_every,
        ),
        moments=Moments(),
        seed=3,
        on_collapse=on_collapse,
        should_stop=should_stop,
    )
