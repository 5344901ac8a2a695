"""EAC's options, and a target problem of known form to search in."""

from __future__ import annotations

from typing import Any, Literal

import torch

from editkit.restraints.eac import Eac
from editkit.targets.descent import TargetProblem
from editkit.targets.search import Target, targets_of
from editkit.targets.settings import TargetSettings
from tests.support.searches import Alone, settings

SITES: tuple[Literal["mlp", "block"], ...] = ("mlp", "block")


SELECTORS = ("saliency", "gradient", "magnitude", "random")


def eac(**changes: Any) -> Eac:
    values: dict[str, Any] = {
        "variant": "paper",
        "gamma": 80.0,
        "l1": 5e-7,
        "l2": 0.5,
        "l2_unit": "relative",
        "epsilon": 1e-6,
    }
    values |= {
        "steps_search": 10,
        "steps_retrain": 10,
        "selector": "saliency",
        "saliency": True,
        "elastic_net": True,
        "seed": 0,
    }
    return Eac(**values | changes)


class Bowl:
    """A `Forward` of known form, -sum_i curvature_i (delta_i - goal_i)^2 / 2, with an unmoved
    distribution; counts its passes.
    """

    def __init__(self, size: int = 20, dtype: torch.dtype = torch.float64) -> None:
        draws = torch.Generator().manual_seed(3)
        self.goal_O = 3 * torch.randn(size, generator=draws, dtype=dtype)
        self.curvature_O = torch.rand(size, generator=draws, dtype=dtype) ** 4
        self.calls = self.backwards = 0

    def __call__(self, delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        log_p_C = -(self.curvature_O * (delta_O - self.goal_O).square()).sum()[None] / 2
        if log_p_C.requires_grad:
            log_p_C.register_hook(self._note_backward)
        return log_p_C, torch.zeros(1, dtype=delta_O.dtype)

    def _note_backward(self, gradient_C: torch.Tensor) -> None:
        self.backwards += 1

    def gradient(self, delta_O: torch.Tensor) -> torch.Tensor:
        return self.curvature_O * (delta_O - self.goal_O)


def numbers(**changes: Any) -> TargetSettings:
    """With these the loss is the bowl's alone, and no clamp is met."""
    return settings(
        **{"weight_decay": 0.0, "kl_factor": 0.0, "clamp": 100.0, "stop_loss": 0.0, "steps": 21}
        | changes
    )


def problem(bowl: Bowl, forward: Any = None, **changes: Any) -> TargetProblem:
    initial_O = torch.linspace(1, 3, len(bowl.goal_O), dtype=bowl.goal_O.dtype)
    return TargetProblem(
        forward=Alone(forward or bowl), initial_NO=initial_O[None], settings=numbers(**changes)
    )


def search(
    restraint: Eac,
    bowl: Bowl,
    forward: Any = None,
    *,
    site: Literal["mlp", "block"] = "mlp",
    request_id: str = "test/0",
    **changes: Any,
) -> Target:
    whole = problem(bowl, forward, **changes)
    [found] = targets_of(whole, restraint.search(whole, request_ids=[request_id], site=site))
    return found


def walk(bowl: Bowl, updates: int, start_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam with its published defaults, lr 0.5, written out: where it ends, and the gradients on
    its way.
    """
    delta_O, first_O, second_O, gradients = (
        start_O.clone(),
        torch.zeros_like(start_O),
        torch.zeros_like(start_O),
        [],
    )
    for step in range(1, updates + 1):
        gradients.append(bowl.gradient(delta_O))
        first_O = 0.9 * first_O + 0.1 * gradients[-1]
        second_O = 0.999 * second_O + 0.001 * gradients[-1] ** 2
        delta_O = delta_O - 0.5 * (first_O / (1 - 0.9**step)) / (
            (second_O / (1 - 0.999**step)).sqrt() + 1e-8
        )
    return delta_O, torch.stack(gradients)
