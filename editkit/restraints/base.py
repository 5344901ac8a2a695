"""The four kinds of restraint, one for each place at which a method can protect a sequentially
edited model (DESIGN section 2).

    objective  the optimisation that finds the target vector          (EAC)
    solve      the least squares that turns keys and residuals into an update   (D4S, AlphaEdit)
    update     one proposed update, before it is applied              (RECT, norm caps)
    total      the sum of all updates, D = W_N - W_0                  (PRUNE)

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from editkit.records.views import trajectory_view
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.linalg.lowrank import LowRank, Update
    from editkit.linalg.total import Total
    from editkit.model.editable import EditableModel
    from editkit.stats.least_squares import LeastSquares
    from editkit.stats.store import Moments
    from editkit.targets.descent import Descent, TargetProblem

Place = Literal["objective", "solve", "update", "total"]
PLACES: tuple[Place, ...] = get_args(Place)


class AbstractRestraint(abc.ABC):
    """Any restraint. Concrete ones are frozen dataclasses and subclass one of the four kinds
    below.
    """

    @property
    @abc.abstractmethod
    def place(self) -> Place:
        """Where it acts."""


class AbstractObjectiveRestraint(AbstractRestraint):
    """Acts on the search for the target vector: takes the place of its one descent."""

    @property
    def place(self) -> Place:
        return "objective"

    @abc.abstractmethod
    def search(
        self, problem: TargetProblem, *, request_ids: Sequence[str], site: Literal["mlp", "block"]
    ) -> Descent:
        """The descent whose deltas are the answer; with nothing to restrain,
        `problem.descend(updates=problem.settings.steps - 1)`.

        The problem is that of all these requests together, each for itself: a request must not
        depend on who else is in its batch. `site` says whose output delta is added to: an MLP's, as
        ROME wants it, or a whole block's, as MEMIT does.
        """


class AbstractSolveRestraint(AbstractRestraint):
    """Acts inside the least squares; may remember earlier keys and residuals in its state."""

    @property
    def place(self) -> Place:
        return "solve"

    @abc.abstractmethod
    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The state before the first edit."""

    @abc.abstractmethod
    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> Update:
        """The update that the restrained problem asks for."""

    @abc.abstractmethod
    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """The state after the whole batch has been applied; called for each of its problems in
        turn.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """Of W_0, the matrix before all edits; computed once a run."""

    sigma_max: float
    frobenius: float


class AbstractUpdateRestraint(AbstractRestraint):
    """Acts on one proposed update. Value in, value out."""

    @property
    def place(self) -> Place:
        return "update"

    @abc.abstractmethod
    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> Update:
        """The update to apply instead; `weight_OI` is the matrix before it (not modified), `base`
        are the norms of W_0.
        """


class AbstractTotalRestraint(AbstractRestraint):
    """Acts on the sum of updates of one matrix."""

    apply_at: Literal["evaluation", "end", "every"]
    every: int | None  # with apply_at=every: how many steps lie between

    @property
    def place(self) -> Place:
        return "total"

    @abc.abstractmethod
    def check(self, base_sigma_max: Mapping[str, float]) -> list[str]:
        """What forbids this restraint on matrices with these sigma_max(W_0), by module; empty if
        nothing does.
        """

    @abc.abstractmethod
    def correction(self, total: Total, base_sigma_max: float) -> LowRank | None:
        """What to add to the total so that it is restrained; None where nothing has to change."""


@dataclass(frozen=True, kw_only=True)
class Restraints:
    """The restraints of a run, each at its place. Updates and totals stack in their order; an
    objective and a solve have room for one.
    """

    objective: AbstractObjectiveRestraint | None = None
    solve: AbstractSolveRestraint | None = None
    updates: tuple[AbstractUpdateRestraint, ...] = ()
    totals: Mapping[str, AbstractTotalRestraint] = field(default_factory=dict)

    @property
    def trajectory_view(self) -> str:
        """What the model as the edits left it is called in records."""
        return trajectory_view(
            {name: restraint.apply_at for name, restraint in self.totals.items()}
        )
