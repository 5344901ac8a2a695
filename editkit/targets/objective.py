"""What may take the place of a search's one descent: the interface that restraints on the objective
implement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from editkit.targets.descent import Descent, TargetProblem

Site = Literal[
    "mlp", "block"
]  # whose output delta is added to: an MLP's (ROME), or a whole block's (MEMIT)


class Objective(Protocol):
    """A way of minimising the loss of a target search."""

    @property
    def needs_top(self) -> bool:
        """Whether forward passes also tell the most probable tokens."""

    def search(self, problem: TargetProblem, *, request_ids: Sequence[str], site: Site) -> Descent:
        """The descent whose deltas are the answer; with nothing to restrain,
        `problem.descend(updates=problem.settings.steps - 1)`.

        The problem is that of all these requests together, each for itself: a request must not
        depend on who else is in its batch.
        """
