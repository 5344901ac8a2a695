from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.mpes import Mpes
from editkit.targets.descent import ForwardResult, TargetProblem
from editkit.targets.search import search_targets
from tests.support.helpers import tiny_model
from tests.support.searches import settings, subject_at_the_end

# By request, whether the target is on top at loss 0, 1, 2, ... in each of the two contexts.
ON_TOP = {
    "after the second of them": [(1, 1), (0, 1), (1, 1), (1, 1), (1, 1)],
    "never in the clean prompt": [(0, 1)] * 5,
    "from the beginning": [(1, 1)] * 5,
}


class Scripted:
    """A forward pass whose top tokens are written down; the loss falls with delta."""

    def __init__(self, rows: list[list[tuple[int, int]]], calls: list[int]) -> None:
        self.rows, self.calls = rows, calls

    def __call__(self, delta_NO: Any, before_NV: Any) -> ForwardResult:
        step = self.calls[0]
        self.calls[0] += 1
        log_p_NC = delta_NO.sum(dim=1, keepdim=True).expand(-1, 2) - 5.0
        above = torch.tensor([[1.0 - top for top in row[step]] for row in self.rows])
        zeros_N = torch.zeros(len(self.rows))
        return ForwardResult(log_p_NC, zeros_N, zeros_N[:, None], log_p_NC.detach() + above)

    def only(self, kept: Any) -> Scripted:
        return Scripted([self.rows[index] for index in kept], self.calls)


def test_a_search_ends_at_the_loss_that_is_counted_last_in_every_context() -> None:
    """Counted, not one after the other; the clean prompt, which comes first, counts."""
    problem = TargetProblem(
        forward=Scripted(list(ON_TOP.values()), [0]),
        initial_NO=torch.ones(3, 4),
        settings=settings(steps=5, stop_loss=0.0, lr=0.01, weight_decay=0.0),
    )
    found = Mpes(times=2).search(problem, request_ids=["a", "b", "c"], site="block")
    # Losses 0 and 2; the last loss; losses 0 and 1. A loss is followed by an update unless it ends.
    assert found.updates_N.tolist() == [2, 4, 1]


def test_a_model_whose_target_is_on_top_is_searched_no_further() -> None:
    model, asked = tiny_model("gpt2"), [subject_at_the_end()]
    options = settings(steps=25, stop_loss=0.0, lr=0.5, clamp=50.0, weight_decay=0.0, kl_factor=0.0)
    site, contexts = model.family.block(1), ("{}", "It is so. {}")

    def search(objective: Any) -> Any:
        [found] = search_targets(
            model, asked, site=site, contexts=contexts, settings=options, objective=objective
        )
        return found

    plain, early, later = search(None), search(Mpes(times=1)), search(Mpes(times=3))
    assert plain.updates == 24
    assert 0 < early.updates < plain.updates
    assert early.updates + 2 <= later.updates < plain.updates
    assert torch.linalg.vector_norm(early.delta_O) < torch.linalg.vector_norm(plain.delta_O)


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(OptionError, match="times: out of range"):
        Mpes(times=0)
