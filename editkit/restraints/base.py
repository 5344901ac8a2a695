"""The four kinds of restraint, one for each place at which a method can protect a sequentially
edited model (docs/architecture.md, "The four places").

    objective  the optimisation that finds the target vector                     EAC
    solve      the least squares that turn keys and residuals into an update     D4S, AlphaEdit
    update     one proposed update, before it is applied                         RECT, norm caps
    total      the sum of all updates, D = W_N - W_0                             PRUNE

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, get_args

from editkit.errors import message
from editkit.linalg.recursive import memory_numbers
from editkit.records.views import trajectory_view
from editkit.resources.workload import SolveMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.linalg.lowrank import LowRank, Update
    from editkit.linalg.total import Total
    from editkit.model.editable import EditableModel
    from editkit.stats.least_squares import LeastSquares
    from editkit.stats.store import Moments
    from editkit.targets.descent import Descent, TargetProblem
    from editkit.targets.objective import Site

Place = Literal["objective", "solve", "update", "total"]
Base = Literal["trajectory", "unedited"]
PLACES: tuple[Place, ...] = get_args(Place)
KindT = TypeVar("KindT")


def history_memory(work: Workload) -> SolveMemory:
    """The memory of a solve that keeps the keys of all edits so far for each matrix."""
    size = work.architecture.inner
    numbers, is_matrix = memory_numbers(size, work.edits)
    return SolveMemory(
        kept=work.num_matrices * numbers * work.solve_bytes,
        working=float(size * size * work.solve_bytes) if is_matrix else 0.0,
    )


class AbstractRestraint(abc.ABC):
    """Any restraint. Concrete restraints are frozen dataclasses of one of the four kinds below."""

    @property
    @abc.abstractmethod
    def place(self) -> Place:
        """The place that it acts at."""

    def warnings(self) -> list[str]:
        """What to know about these options before a run; nothing by default."""
        return []


class AbstractObjectiveRestraint(AbstractRestraint):
    """Acts on the search for a target vector: it replaces the search's one descent.

    It implements the protocol `editkit.targets.objective.Objective`.
    """

    # Whether forward passes also tell the most probable tokens.
    needs_top: ClassVar[bool] = False

    @property
    def place(self) -> Place:
        return "objective"

    @abc.abstractmethod
    def search(self, problem: TargetProblem, *, request_ids: Sequence[str], site: Site) -> Descent:
        """As `Objective.search`."""


class AbstractSolveRestraint(AbstractRestraint):
    """Acts inside the least squares. Its state may remember earlier keys and residuals."""

    # The model on which an edit is planned and measured: as the earlier edits left it, or with
    # each matrix at W_0 until its own update is written.
    base: Base = "trajectory"

    @property
    def place(self) -> Place:
        return "solve"

    def memory(self, work: Workload) -> SolveMemory:
        """The bytes that its state takes; nothing by default."""
        return SolveMemory()

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The state before the first edit; empty by default."""
        return {}

    @abc.abstractmethod
    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> Update:
        """The update that solves the restrained problem."""

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """The state after the whole batch was applied. It is called for each problem of the batch
        in turn; by default the state stays as it is.
        """
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of W_0, the unedited matrix; computed once a run."""

    sigma_max: float
    frobenius: float


class AbstractUpdateRestraint(AbstractRestraint):
    """Acts on one proposed update, which it does not modify."""

    @property
    def place(self) -> Place:
        return "update"

    @abc.abstractmethod
    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> Update:
        """The update to apply instead.

        Args:
            weight_OI: the matrix before the update; not modified.
            base: the norms of W_0.
        """


class AbstractTotalRestraint(AbstractRestraint):
    """Acts on the total of one matrix: the sum of its updates, D = W_N - W_0."""

    apply_at: Literal["evaluation", "end", "every"]
    every: int | None  # with apply_at=every: the interval in steps

    @property
    def place(self) -> Place:
        return "total"

    def is_due(self, step: int) -> bool:
        """Whether the trajectory is restrained after this step."""
        every = self.every or 0
        return self.apply_at == "every" and every > 0 and step % every == 0

    @abc.abstractmethod
    def check(self, base_sigma_max: Mapping[str, float]) -> list[str]:
        """The options that do not suit matrices with these sigma_max(W_0), by module, as problems
        of an OptionError.
        """

    @abc.abstractmethod
    def correction(self, total: Total, base_sigma_max: float) -> LowRank | None:
        """The correction that restrains the total; None if nothing has to change."""


@dataclass(frozen=True, kw_only=True)
class Restraints:
    """The restraints of a run by place. There is at most one objective and one solve. Restraints on
    updates and on totals stack in their order.
    """

    objective: AbstractObjectiveRestraint | None = None
    solve: AbstractSolveRestraint | None = None
    updates: tuple[AbstractUpdateRestraint, ...] = ()
    totals: Mapping[str, AbstractTotalRestraint] = field(default_factory=dict)
    solve_name: str = "solve"  # the name of `solve` in the configuration, for messages

    @classmethod
    def by_place(cls, named: Mapping[str, AbstractRestraint]) -> Restraints:
        """Restraints by name, sorted by place. Of several at a place for one, the first is taken;
        `conflicts` names the others.
        """
        objectives = _of_kind(named, AbstractObjectiveRestraint)
        solves = _of_kind(named, AbstractSolveRestraint)
        return cls(
            objective=next(iter(objectives.values()), None),
            solve=next(iter(solves.values()), None),
            solve_name=next(iter(solves), "solve"),
            updates=tuple(_of_kind(named, AbstractUpdateRestraint).values()),
            totals=_of_kind(named, AbstractTotalRestraint),
        )

    def warnings(self) -> list[str]:
        """Of all restraints."""
        alone = [part for part in (self.objective, self.solve) if part is not None]
        parts: list[AbstractRestraint] = [*alone, *self.updates, *self.totals.values()]
        return [warning for part in parts for warning in part.warnings()]

    @property
    def trajectory_view(self) -> str:
        """The name in records of the model as the edits left it."""
        return trajectory_view(
            {name: restraint.apply_at for name, restraint in self.totals.items()}
        )


def unsupported(
    named: Mapping[str, AbstractRestraint], places: Collection[Place], *, editor: str
) -> list[str]:
    """A problem for each restraint at a place that the editor does not have.

    Args:
        editor: its name in messages.
    """
    supported = [place for place in PLACES if place in places]
    return [
        message(
            f"restraint.{name}",
            f"{editor} cannot be restrained at this place",
            got=restraint.place,
            expected=f"one of {', '.join(supported)}" if supported else "no restraint",
        )
        for name, restraint in named.items()
        if restraint.place not in supported
    ]


def conflicts(named: Mapping[str, AbstractRestraint]) -> list[str]:
    """A problem for each place that takes one restraint and has several."""
    kinds = {"objective": AbstractObjectiveRestraint, "solve": AbstractSolveRestraint}
    several = {place: list(_of_kind(named, kind)) for place, kind in kinds.items()}
    return [
        message(
            "restraint",
            f"{' and '.join(names)} act on the {place}",
            expected=f"at most one restraint on the {place}",
        )
        for place, names in several.items()
        if len(names) > 1
    ]


def _of_kind(named: Mapping[str, AbstractRestraint], kind: type[KindT]) -> dict[str, KindT]:
    return {name: part for name, part in named.items() if isinstance(part, kind)}
