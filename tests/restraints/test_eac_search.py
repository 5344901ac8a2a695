"""EAC's two searches on a problem of known form: the anchors, their cost, the scored elastic net, and
early ends."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from editkit.restraints.eac import Eac, saliency, top
from editkit.targets.search import targets_of
from tests.support.eac import SELECTORS, SITES, Bowl, eac, problem, search, walk
from tests.support.searches import optimise


def test_the_anchors_are_the_top_fraction_by_the_score_of_each_selector() -> None:
    found = {}
    for selector in SELECTORS:
        bowl = Bowl(40)
        delta_O, gradients_TO = walk(bowl, 10, torch.zeros(40, dtype=torch.float64))
        mean_O = gradients_TO.mean(dim=0)
        scores = {
            "saliency": (mean_O * delta_O).abs(),
            "gradient": mean_O.abs(),
            "magnitude": delta_O.abs(),
        }
        found[selector] = set(
            search(eac(selector=selector), bowl).delta_O.nonzero().flatten().tolist()
        )
        assert len(found[selector]) == 8
        if selector in scores:
            assert found[selector] == set(scores[selector].topk(8).indices.tolist())
    assert len({frozenset(anchors) for anchors in found.values()}) == len(SELECTORS)


@pytest.mark.parametrize(
    ("size", "gamma", "count"),
    [
        (1600, 80, 320),
        (1600, 85, 240),
        (1600, 95, 80),
        (4096, 90, 410),
        (32, 80, 7),
        (10, 0, 10),
        (3, 99.9, 1),
        (200, 97.5, 5),
    ],
)
def test_the_percentile_leaves_that_many_anchors(size: int, gamma: float, count: int) -> None:
    for site in SITES:
        found = eac(gamma=float(gamma)).numbers(size, site)
        assert found.num_anchors == count
        assert (found.updates_search, found.updates_retrain, found.from_zero) == (10, 9, False)
    scores_O = torch.randn(size, generator=torch.Generator().manual_seed(0)).abs()
    anchors_O = top(scores_O, count)
    assert int(anchors_O.sum()) == count
    assert bool(
        (scores_O[anchors_O] >= scores_O.sort().values[math.floor(size * gamma / 100)]).all()
    )


def test_among_equal_scores_the_first_coordinates_are_anchors() -> None:
    assert top(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]), 3).tolist() == [
        [True, True, False, True, False]
    ]


def test_the_coordinates_beside_the_anchors_are_exactly_zero_all_the_way() -> None:
    seen: list[torch.Tensor] = []
    bowl = Bowl()

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(delta_O.detach().clone())
        return bowl(delta_O)

    found = search(eac(), bowl, forward)
    outside_O = found.delta_O == 0
    assert int(outside_O.sum()) == 16
    assert all(bool((delta_O != 0).all()) for delta_O in seen[1:10])
    assert all(
        bool((delta_O[outside_O] == 0).all()) and bool((delta_O[~outside_O] != 0).all())
        for delta_O in seen[10:]
    )


def test_retraining_goes_on_from_delta_at_the_anchors() -> None:
    bowl = Bowl()
    first_O, _ = walk(bowl, 10, torch.zeros(20, dtype=torch.float64))
    found = search(eac(elastic_net=False), bowl)
    # The bowl's coordinates do not know of each other: each goes its own way, with a new Adam.
    retrained_O, _ = walk(bowl, 9, first_O)
    anchors_O = found.delta_O != 0
    torch.testing.assert_close(found.delta_O[anchors_O], retrained_O[anchors_O])


def test_with_every_coordinate_an_anchor_and_no_net_it_is_adam_started_anew_half_way() -> None:
    for options in ({"gamma": 0.0}, {"saliency": False}):
        found, whole = search(eac(elastic_net=False, **options), Bowl()), problem(Bowl())
        half = whole.descend(updates=10)
        [again] = targets_of(whole, whole.descend(updates=9, after=half, start_NO=half.delta_NO))
        assert torch.equal(found.delta_O, again.delta_O)
        assert found.loss == again.loss


def test_a_restart_from_zero_with_everything_free_is_the_plain_search() -> None:
    restraint = eac(variant="published_code", saliency=False, elastic_net=False)
    found, whole = search(restraint, Bowl(), site="block"), problem(Bowl())
    [plain] = targets_of(whole, whole.descend(updates=15))
    assert torch.equal(found.delta_O, plain.delta_O)
    assert (found.loss, found.updates) == (plain.loss, 10 + plain.updates)


@pytest.mark.parametrize(("search_steps", "retrain_steps"), [(10, 10), (1, 2), (15, 10)])
def test_it_runs_the_network_forward_and_back_as_often_as_a_plain_search_of_as_many_steps(
    search_steps: int, retrain_steps: int
) -> None:
    restrained, plain, steps = Bowl(), Bowl(), search_steps + retrain_steps
    found = search(eac(steps_search=search_steps, steps_retrain=retrain_steps), restrained)
    whole = problem(plain, steps=steps)
    assert (
        optimise(plain, whole.initial_NO[0], whole.settings).updates == found.updates == steps - 1
    )
    assert (
        (restrained.calls, restrained.backwards)
        == (plain.calls, plain.backwards)
        == (steps, steps - 1)
    )


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_the_gradient_of_the_net_is_its_formula(unit: Literal["absolute", "relative"]) -> None:
    restraint, whole = eac(l1=0.3, l2=0.7, epsilon=0.05, l2_unit=unit), problem(Bowl())
    first = whole.descend(updates=10, final_loss=False)
    delta_O = torch.randn(
        20, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    [value] = restraint.penalty(first, restraint.numbers(20, "mlp"), whole.initial_NO)(
        delta_O[None], torch.tensor([0])
    )
    [gradient_O] = torch.autograd.grad(value, delta_O)
    with torch.no_grad():
        end_O, gradients_TO = walk(Bowl(), 10, torch.zeros(20, dtype=torch.float64))
        scores_O = (gradients_TO.sum(dim=0) / 10 * end_O).abs()
        unit_of_l2 = float((whole.initial_NO**2).sum()) if unit == "relative" else 1.0
        wanted_O = 0.3 * delta_O.sign() / (scores_O + 0.05) + 2 * 0.7 * delta_O / unit_of_l2
        torch.testing.assert_close(gradient_O, wanted_O, rtol=1e-10, atol=1e-12)
        wanted = (
            0.3 * float((delta_O.abs() / (scores_O + 0.05)).sum())
            + 0.7 * float((delta_O**2).sum()) / unit_of_l2
        )
        assert value.item() == pytest.approx(wanted, rel=1e-12)


def test_the_loss_that_is_told_contains_the_net() -> None:
    bowl, restraint = Bowl(), eac(l1=0.2, l2=3.0)
    whole = problem(bowl)
    [found] = targets_of(whole, restraint.search(whole, request_ids=["a"], site="mlp"))
    first = problem(Bowl()).descend(updates=10, final_loss=False)
    net = float(
        (0.2 * found.delta_O.abs() / (saliency(first) + 1e-6)).sum()
        + 3.0 * found.delta_O.square().sum() / whole.initial_NO.square().sum()
    )
    assert found.loss == pytest.approx(-float(bowl(found.delta_O)[0]) + net, rel=1e-9)


def test_without_saliency_the_net_weighs_all_coordinates_alike() -> None:
    restraint, whole = eac(l1=0.3, l2=0.0, saliency=False), problem(Bowl())
    first = whole.descend(updates=10, final_loss=False)
    penalty = restraint.penalty(first, restraint.numbers(20, "mlp"), whole.initial_NO)
    assert penalty(
        torch.full((1, 20), -2.0, dtype=torch.float64), torch.tensor([0])
    ).item() == pytest.approx(0.3 * 40)


def test_long_retraining_ends_at_the_ridge_solution_at_the_anchors() -> None:
    bowl = Bowl()
    found, size_squared = (
        search(eac(l1=0.0, l2=5.0, steps_retrain=1500), bowl, lr=0.05),
        problem(bowl).initial_NO.square().sum(),
    )
    anchors_O, ridge_O = (
        found.delta_O != 0,
        bowl.curvature_O * bowl.goal_O / (bowl.curvature_O + 2 * 5.0 / size_squared),
    )
    torch.testing.assert_close(found.delta_O[anchors_O], ridge_O[anchors_O], rtol=1e-3, atol=1e-3)


def test_a_target_that_is_already_said_needs_no_anchors() -> None:
    bowl = Bowl()
    bowl.goal_O.zero_()
    found = search(eac(), bowl, stop_loss=0.05)
    assert (bowl.calls, found.updates) == (1, 0)
    assert not found.delta_O.any()


@pytest.mark.parametrize("bad_call", [1, 5, 11, 14])
def test_a_loss_that_is_not_finite_is_told_and_ends_the_search(bad_call: int) -> None:
    bowl = Bowl()

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p_C, log_p_V = bowl(delta_O)
        return log_p_C * (math.nan if bowl.calls == bad_call else 1.0), log_p_V

    found = search(eac(), bowl, forward)
    assert found.nonfinite
    assert bowl.calls == bad_call
    assert bool(found.delta_O.isfinite().all())


def test_random_anchors_depend_on_the_seed_and_the_request_alone() -> None:
    def anchors(restraint: Eac, request_id: str) -> list[int]:
        return [
            int(index)
            for index in search(restraint, Bowl(), request_id=request_id).delta_O.nonzero()
        ]

    random = eac(selector="random")
    before = torch.get_rng_state()
    wanted = anchors(random, "a")
    assert torch.equal(torch.get_rng_state(), before), "nothing global is drawn from"
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert anchors(random, "a") == wanted
    assert wanted != anchors(random, "b")
    assert wanted != anchors(eac(selector="random", seed=1), "a")
    assert wanted == [9, 12, 14, 18], "another process gives the same"
