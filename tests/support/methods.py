"""What tests of editing methods share: second moments and keys out of a generator, a small MEMIT, a
solve that is watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from editkit.editors.base import AbstractEditor, Step
from editkit.editors.memit import Memit
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.linalg.lowrank import dense
from editkit.restraints.base import AbstractSolveRestraint, Base
from editkit.stats.least_squares import LeastSquares
from editkit.stats.store import Moments, SecondMoment
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest
from tests.support.helpers import SENTENCES


def noise(*shape: int, seed: int) -> torch.Tensor:
    """Gaussian numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def second_moment(size: int, *, seed: int = 0, condition: float = 100.0) -> torch.Tensor:
    """A symmetric positive definite matrix whose eigenvalues lie between 1 / condition and 1."""
    vectors_II, _ = torch.linalg.qr(noise(size, size, seed=seed))
    values_I = torch.logspace(
        0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64
    )
    matrix_II = (vectors_II * values_I) @ vectors_II.T
    return (matrix_II + matrix_II.T) / 2


def moments_of(matrices: dict[str, torch.Tensor]) -> Moments:
    return Moments(
        {
            name: SecondMoment(name, matrix_II, 10 * len(matrix_II))
            for name, matrix_II in matrices.items()
        }
    )


def model_moments(model: Any, modules: Sequence[str]) -> Moments:
    """Second moments for a model's matrices, not its own, with texts."""
    moments = moments_of(
        {
            name: second_moment(model.weight(name).shape[1], seed=seed)
            for seed, name in enumerate(modules)
        }
    )
    return replace(moments, documents=SENTENCES)


def step(
    model: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[str] = ("{}",),
    *,
    moments: Moments | None = None,
    **options: Any,
) -> Step:
    """A step as the runner makes one."""
    return Step(
        model=model,
        requests=tuple(requests),
        contexts=tuple(contexts),
        moments=moments or Moments(),
        **options,
    )


def write(model: Any, editor: AbstractEditor[Any], request: EditRequest) -> float:
    """Edits one request in its bare prompt, with second moments that are not the model's own.
    Returns the probability of the target afterwards.
    """
    modules = editor.modules(model)
    model.edit(modules)
    asked = step(model, [request], moments=model_moments(model, modules))
    plan = editor.plan(asked)
    for module in modules:
        model.apply(module, editor.propose(asked, module, plan))
    [scored] = score(model, [request.probe()], tokens_per_batch=512).values()
    return scored.probability


def memit(**changes: Any) -> Memit:
    settings: dict[str, Any] = {
        "steps": 6,
        "lr": 0.2,
        "lr_unit": "relative",
        "weight_decay": 0.0,
        "clamp": 4.0,
        "kl_factor": 0.0,
        "kl_position": "subject_last",
        "stop_loss": 0.0,
        "exact": False,
    } | changes.pop("target", {})
    options: dict[str, Any] = {
        "name": "memit",
        "layers": (0, 1),
        "covariance_weight": 0.1,
        "spread": "recomputed",
        "context_lengths": ((4, 2),),
    } | changes
    return Memit(**options, target=TargetSettings(**settings))


@dataclass(frozen=True)
class Watched(AbstractSolveRestraint):
    """Passes everything on and remembers the problems and the updates, in order."""

    inner: AbstractSolveRestraint
    problems: list[LeastSquares] = field(default_factory=list)
    updates: list[Any] = field(default_factory=list)
    base: Base = "trajectory"

    def init(self, model: Any, moments: Moments) -> Any:
        return self.inner.init(model, moments)

    def solve(self, problem: LeastSquares, state: Any, moments: Moments) -> Any:
        self.problems.append(problem)
        self.updates.append(self.inner.solve(problem, state, moments))
        return self.updates[-1]

    def observe(self, problem: LeastSquares, state: Any, moments: Moments) -> Any:
        return self.inner.observe(problem, state, moments)


@dataclass
class Edited:
    """One matrix that a restraint on the solve edits, in float64, as the runner does."""

    restraint: AbstractSolveRestraint
    moments: Moments
    weight: float
    matrix: torch.Tensor  # W_0
    total: torch.Tensor = field(init=False)
    state: Any = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros_like(self.matrix)
        self.state = self.restraint.init(None, self.moments)  # type: ignore[arg-type]

    def edit(self, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """Solves, applies and observes one batch. Returns the update."""
        (module,) = self.moments.by_module
        problem = LeastSquares(
            module=module,
            keys_IN=keys,
            residuals_ON=residuals,
            weight=self.weight,
            total=lambda columns: self.total @ columns,
            matrix=lambda: self.matrix + self.total,
        )
        update = self.restraint.solve(problem, self.state, self.moments)
        found = dense(update).double()
        self.total = self.total + found
        self.state = self.restraint.observe(
            replace(problem, update=update), self.state, self.moments
        )
        return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative difference in the Frobenius norm."""
    return float((found.double() - wanted).norm() / wanted.norm())
