"""The minimisation of a target search, on functions of known form: the published loss and number of
steps, independent requests, delayed stop checks, and the updates of torch's Adam.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.targets.descent import ForwardResult, TargetProblem
from tests.support.searches import optimise, settings


class Toy:
    """A function of known form: the log-probability -|delta - goal|^2 / 2 and a constant
    distribution.

    It records the deltas.
    """

    def __init__(self, *goal: float) -> None:
        self.goal_O = torch.tensor(goal)
        self.deltas: list[torch.Tensor] = []

    def __call__(self, delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.deltas.append(delta_O.detach().clone())
        log_p = -(delta_O - self.goal_O).square().sum() / 2
        return torch.stack([log_p, 3 * log_p]), torch.log_softmax(torch.zeros(5), dim=0)


@pytest.mark.parametrize("steps", [1, 2, 20, 25])
def test_the_number_of_adam_updates_is_one_below_the_number_of_steps(steps: int) -> None:
    toy = Toy(50.0, 0.0)
    target = optimise(toy, torch.tensor([100.0, 0.0]), settings(steps=steps))
    assert target.updates == steps - 1
    assert len(toy.deltas) == steps
    assert len({tuple(delta.tolist()) for delta in toy.deltas}) == steps


def test_the_search_starts_from_zero_and_its_first_step_is_the_learning_rate() -> None:
    toy = Toy(50.0, -50.0)
    optimise(toy, torch.tensor([100.0, 0.0]), settings(steps=2, weight_decay=0.0))
    assert toy.deltas[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(toy.deltas[1], torch.tensor([0.5, -0.5]))


def test_a_relative_learning_rate_is_a_share_of_the_activation() -> None:
    toy = Toy(50.0, -50.0, 50.0, 50.0)
    optimise(
        toy,
        torch.tensor([30.0, 40.0, 0.0, 0.0]),
        settings(steps=2, lr=0.1, lr_unit="relative", weight_decay=0.0),
    )
    assert float(torch.linalg.vector_norm(toy.deltas[1])) == pytest.approx(0.1 * 50.0, rel=1e-5)


def test_the_reported_loss_is_that_at_the_result() -> None:
    toy, initial_O = Toy(3.0, 4.0), torch.tensor([0.0, 2.0])
    target = optimise(toy, initial_O, settings(steps=5))
    distance_squared = float((target.delta_O - toy.goal_O).square().sum())
    # Two contexts, the second with three times the loss; |delta| / |v|^2, where the first norm is
    # not squared; the KL of the toy is 0.
    assert target.loss == pytest.approx(
        distance_squared + 0.5 * float(target.delta_O.norm()) / 4.0, rel=1e-6
    )
    assert target.probability_before == pytest.approx(math.exp(-25 / 2), rel=1e-5)
    assert target.probability_after == pytest.approx(math.exp(-distance_squared / 2), rel=1e-5)
    torch.testing.assert_close(target.delta_O, toy.deltas[-1])


def test_the_search_stops_below_the_stop_loss_without_another_step() -> None:
    toy = Toy(1.0)
    target = optimise(toy, torch.tensor([100.0]), settings(steps=200, weight_decay=0.0))
    assert target.loss < 0.05
    assert target.updates == len(toy.deltas) - 1 < 199
    assert float((toy.deltas[-2] - 1.0).square()) >= 0.05


def test_every_step_stays_within_the_clamp() -> None:
    toy = Toy(50.0, 20.0)
    target = optimise(toy, torch.tensor([3.0, 4.0]), settings(lr=2.0, clamp=0.75))
    assert all(float(delta.norm()) <= 0.75 * 5.0 * (1 + 1e-6) for delta in toy.deltas)
    assert float(target.delta_O.norm()) == pytest.approx(0.75 * 5.0, rel=1e-5)


def test_the_divergence_of_the_current_distribution_is_measured_from_the_first() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0])

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (delta_O[0] - delta_O[1])[None] * 0.1 - 1.0, torch.log_softmax(
            logits_V + delta_O, dim=0
        )

    target = optimise(
        forward, torch.tensor([9.0, 0.0, 0.0]), settings(steps=3, kl_factor=2.0, weight_decay=0.0)
    )
    first_V, moved_V = logits_V.softmax(dim=0), (logits_V + target.delta_O).softmax(dim=0)
    kl = float((moved_V * (moved_V / first_V).log()).sum())
    assert kl > 0
    assert target.loss == pytest.approx(
        1.0 - 0.1 * float(target.delta_O[0] - target.delta_O[1]) + 2.0 * kl, rel=1e-5
    )


def test_a_loss_that_is_not_finite_is_reported_and_ends_the_search() -> None:
    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = -1.0 + delta_O.sum() if not delta_O.any() else delta_O.sum() * math.nan
        return log_p[None], torch.zeros(1)

    target = optimise(forward, torch.ones(2), settings())
    assert target.nonfinite
    assert math.isnan(target.loss)
    assert target.updates == 1
    assert bool(target.delta_O.isfinite().all())


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"lr": 0.0}, {"clamp": -1.0}, {"weight_decay": -0.5}, {"kl_factor": math.nan}],
)
def test_invalid_settings_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(bad))}"):
        settings(**bad)


# Several requests


class Bowls:
    """Several requests with a goal each: the log-probability is -|delta - goal|^2 / 2. The request
    `breaks` has a loss that is not a number from the fourth call on.
    """

    def __init__(
        self,
        goals_NO: torch.Tensor,
        *,
        breaks: int | None = None,
        requests: Sequence[int] | None = None,
    ) -> None:
        self.goals_NO, self.breaks = goals_NO, breaks
        self.requests = list(range(len(goals_NO))) if requests is None else list(requests)
        # the requests of each call, also of the forwards made by `only`
        self.calls: list[list[int]] = []

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        self.calls.append(self.requests)
        log_p_N = -(delta_NO - self.goals_NO).square().sum(dim=1) / 2
        is_broken_N = torch.tensor(
            [name == self.breaks and len(self.calls) > 3 for name in self.requests]
        )
        return ForwardResult(
            torch.where(is_broken_N, math.nan, log_p_N)[:, None],
            torch.zeros_like(log_p_N),
            torch.zeros_like(log_p_N)[:, None],
        )

    def only(self, kept: Sequence[int]) -> Bowls:
        some = Bowls(
            self.goals_NO[list(kept)],
            breaks=self.breaks,
            requests=[self.requests[place] for place in kept],
        )
        some.calls = self.calls
        return some


def bowls(**options: Any) -> Bowls:
    goals_NO = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Bowls(goals_NO * torch.tensor([0.1, 1.0, 0.3, 2.0, 0.6])[:, None], **options)


def problem(forward: Bowls, *, is_delayed: bool = False, **changes: Any) -> TargetProblem:
    chosen = settings(
        **{"weight_decay": 0.0, "kl_factor": 0.0, "clamp": 100.0, "lr": 0.2} | changes
    )
    return TargetProblem(
        forward=forward,
        initial_NO=torch.ones_like(forward.goals_NO),
        settings=chosen,
        is_stop_check_delayed=is_delayed,
    )


def test_finished_requests_are_not_run_again() -> None:
    forward = bowls()
    target = problem(forward).descend(updates=60)
    for name, updates in enumerate(target.updates_N.tolist()):
        assert sum(name in requests for requests in forward.calls) == updates + 1, (
            "one loss more than updates"
        )
    assert len(set(target.updates_N.tolist())) == 5
    assert target.is_finite_N.all() and (target.loss_N < 0.05).all()


def test_a_delayed_stop_check_changes_no_bit_of_the_result() -> None:
    for breaks in (None, 3):
        immediate, delayed = bowls(breaks=breaks), bowls(breaks=breaks)
        target = [
            problem(forward, is_delayed=is_delayed).descend(updates=60)
            for forward, is_delayed in ((immediate, False), (delayed, True))
        ]
        for field in dataclasses.fields(target[0]):
            one, other = (getattr(each, field.name) for each in target)
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(
                torch.equal(first.nan_to_num(-1.0), second.nan_to_num(-1.0))
                for first, second in pairs
            ), field.name
        for name in range(5):
            counts = [
                sum(name in requests for requests in forward.calls)
                for forward in (immediate, delayed)
            ]
            assert counts[1] - counts[0] in (0, 1), "a step is computed in vain at most"


def test_a_delayed_stop_check_costs_nothing_if_no_request_ends_early() -> None:
    immediate, delayed = bowls(), bowls()
    for forward, is_delayed in ((immediate, False), (delayed, True)):
        problem(forward, is_delayed=is_delayed, stop_loss=0.0).descend(updates=6)
    assert immediate.calls == delayed.calls


def test_a_request_with_a_nan_loss_ends_without_affecting_others() -> None:
    intact, broken = (
        problem(bowls()).descend(updates=60),
        problem(bowls(breaks=3)).descend(updates=60),
    )
    assert broken.is_finite_N.tolist() == [True, True, True, False, True]
    assert broken.updates_N[3] == 3 and broken.delta_NO[3].isfinite().all()
    others = [0, 1, 2, 4]
    assert torch.equal(intact.delta_NO[others], broken.delta_NO[others])
    assert torch.equal(intact.updates_N[others], broken.updates_N[others])


def test_a_second_descent_changes_only_its_own_requests() -> None:
    whole = problem(bowls(), stop_loss=0.0)
    first = whole.descend(updates=4, final_loss=False)
    among_N = torch.tensor([True, False, True, True, False])
    second = whole.descend(
        updates=3, after=first, among_N=among_N, start_NO=torch.zeros_like(first.delta_NO)
    )
    assert torch.equal(second.delta_NO[~among_N], first.delta_NO[~among_N])
    assert torch.equal(second.loss_N[~among_N], first.loss_N[~among_N])
    assert second.updates_N.tolist() == [7, 4, 7, 7, 4]
    again = whole.descend(updates=3)
    assert torch.equal(second.delta_NO[among_N], again.delta_NO[among_N])


def test_updates_equal_those_of_torchs_adam() -> None:
    forward = bowls()
    target = problem(forward, stop_loss=0.0).descend(updates=12)
    for goal_O, delta_O in zip(forward.goals_NO, target.delta_NO, strict=True):
        moved_O = torch.zeros_like(goal_O).requires_grad_()
        adam = torch.optim.Adam([moved_O], lr=0.2)
        for _ in range(12):
            adam.zero_grad()
            ((moved_O - goal_O).square().sum() / 2).backward()
            adam.step()
        torch.testing.assert_close(delta_O, moved_O.detach(), rtol=1e-12, atol=1e-13)
