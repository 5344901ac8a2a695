"""Settings, contexts and requests of small target searches, and searches over a given function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from editkit.model.logits import divergence
from editkit.targets.descent import ForwardResult, TargetProblem
from editkit.targets.search import Target, targets_of
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest
from tests.support.helpers import request

CONTEXTS = ("{}", "The capital. {}", "She was born in Bordeaux, and the guitar is in Rome. {}")


def settings(**changes: Any) -> TargetSettings:
    values: dict[str, Any] = {
        "steps": 20,
        "lr": 0.5,
        "lr_unit": "absolute",
        "weight_decay": 0.5,
        "clamp": 4.0,
        "kl_factor": 0.0625,
        "kl_position": "subject_last",
        "stop_loss": 0.05,
        "exact": False,
    }
    return TargetSettings(**values | changes)


def subject_at_the_end() -> EditRequest:
    """A request with a target of one token after the subject. In a network with random weights,
    later tokens hardly depend on the subject.
    """
    return dataclasses.replace(request(), prompt="The mother tongue of {}", target="Paris")


class Alone:
    """A `Forward` of one request, given by a function of its delta."""

    def __init__(
        self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.forward = forward

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        log_p_C, log_p_V = self.forward(delta_NO[0])
        before_NV = log_p_V.detach()[None] if before_NV is None else before_NV
        return ForwardResult(log_p_C[None], divergence(log_p_V[None], before_NV), log_p_V[None])

    def only(self, kept: Sequence[int]) -> Alone:
        assert list(kept) == [0]
        return self


def optimise(forward: Any, initial_O: torch.Tensor, chosen: TargetSettings) -> Target:
    """The search for one request in one descent, over a function of its delta."""
    problem = TargetProblem(forward=Alone(forward), initial_NO=initial_O[None], settings=chosen)
    [target] = targets_of(problem, problem.descend(updates=chosen.steps - 1))
    return target
