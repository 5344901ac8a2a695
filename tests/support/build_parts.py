"""What `_target_` names in test_build: restraints that only stand at a place, and a dataset that is
read in no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.restraints.base import AbstractSolveRestraint, AbstractUpdateRestraint
from editkit.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class SolveRestraint(AbstractSolveRestraint):
    """Solves by giving the residuals back."""

    def init(self, model: Any, moments: Any) -> dict[str, Any]:
        return {}

    def solve(self, problem: Any, state: Any) -> Any:
        return problem.residuals_ON

    def observe(self, problem: Any, state: Any) -> Any:
        return state


@dataclass(frozen=True, kw_only=True)
class UpdateRestraint(AbstractUpdateRestraint):
    """Restrains nothing."""

    def restrain(self, update: Any, weight_OI: Any, base: Any) -> Any:
        return update


@dataclass(frozen=True, kw_only=True)
class FewRequests(AbstractDataset):
    """As many requests as it is told."""

    name: str
    size: int
    order: str = "file"

    def load(self, seed: int) -> LoadedDataset:
        requests = tuple(
            EditRequest(id=f"few/{index}", prompt="{} is", subject="it", target="so")
            for index in range(self.size)
        )
        return LoadedDataset(name=self.name, requests=requests, digest="few", origin="a test")
