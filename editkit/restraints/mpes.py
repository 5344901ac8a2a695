"""Most-probable early stopping: a search ends once its target has been the most probable text a
number of times.

Gupta et al. 2025, "Lifelong Knowledge Editing requires Better Regularization" (arXiv 2502.01636,
Findings of EMNLP 2025): half of ENCORE (`restraint=encore` is the other). The search goes on as
without a restraint, and ends at the `times`-th loss at which every token of the target is the most
probable one in every context. These losses are counted, they need not follow each other: 4 times
for GPT-2 XL, 3 for Llama 2, 2 for Llama 3 (published).

Differs from the published code, which leaves out the clean prompt by mistake: it drops the first
context where the KL prompt, which stands last, is meant. Here every context counts, and the clean
prompt is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.errors import OptionError, message
from editkit.restraints.base import AbstractObjectiveRestraint

if TYPE_CHECKING:
    from editkit.targets.descent import Descent, TargetProblem
    from editkit.targets.objective import Site


@dataclass(frozen=True, kw_only=True)
class Mpes(AbstractObjectiveRestraint):
    """Ends each search early. `conf/restraint/mpes.yaml` documents the option.

    Raises:
        OptionError: the number is not positive.
    """

    needs_top: ClassVar[bool] = True

    times: int  # losses at which the target is the most probable text in every context

    def __post_init__(self) -> None:
        if self.times < 1:
            got, expected = self.times, "at least 1; published: 2, 3 and 4"
            raise OptionError(message("times", "out of range", got=got, expected=expected))

    def search(self, problem: TargetProblem, *, request_ids: Sequence[str], site: Site) -> Descent:
        return problem.descend(updates=problem.settings.steps - 1, times_at_top=self.times)
