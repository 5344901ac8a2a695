"""Requests that are searched together find what each would find alone: same bits in its own
coordinates but for rounding, same end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from editkit.model import shared_prefixes as prefixes
from editkit.model.editable import EditableModel
from editkit.targets.descent import Seen, TargetProblem
from editkit.targets.search import Target, _batches, search_target, search_targets
from editkit.targets.sequences import prepare
from editkit.types import EditRequest
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.targets.test_search import CONTEXTS, settings

# delta, relative; GPT-J's attention computes in float32 whatever its weights are
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "gptj": 1e-6}


def asked() -> list[EditRequest]:
    """Of different lengths, with targets of one to several tokens, subjects at the end and in
    front.
    """
    at_the_end = dataclasses.replace(
        request(), id="test/end", prompt="The mother tongue of {}", target="Paris"
    )
    return [
        *requests(),
        at_the_end,
        dataclasses.replace(
            request(1), id="test/long", target="Los Angeles, where the iPhone was made"
        ),
    ]


def searches(
    model: EditableModel, site: str, **changes: Any
) -> tuple[Sequence[Target], Sequence[Target]]:
    """Together, and one by one."""
    options: Any = {
        "site": site,
        "contexts": CONTEXTS,
        "settings": settings(**{"steps": 8} | changes),
    }
    return search_targets(model, asked(), **options), [
        search_target(model, each, **options) for each in asked()
    ]


def assert_same(together: Sequence[Target], alone: Sequence[Target], tolerance: float) -> None:
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert one.updates == other.updates
        assert torch.linalg.norm(one.initial_O - other.initial_O) <= tolerance * torch.linalg.norm(
            other.initial_O
        )
        assert torch.linalg.norm(one.delta_O - other.delta_O) <= tolerance * torch.linalg.norm(
            other.delta_O
        )
        for name in ("loss", "probability_before", "probability_after"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=10 * tolerance)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_finds_what_one_request_after_another_finds(
    kind: Kind, dtype: str, exact: bool
) -> None:
    model = tiny_model(kind, dtype=dtype)
    for site in (model.family.mlp(1), model.family.block(1)):
        together, alone = searches(model, site, exact=exact)
        tolerance = (
            TOLERANCES["gptj"] if (kind, dtype) == ("gptj", "float64") else TOLERANCES[dtype]
        )
        assert_same(together, alone, tolerance)
        assert {target.updates for target in together} == {7}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_request_stops_where_it_would_stop_alone(kind: Kind, exact: bool) -> None:
    model = tiny_model(kind, dtype="float64")
    probe = searches(model, model.family.mlp(1), steps=20, clamp=20.0)[1]
    stop = sorted(target.loss for target in probe)[2] * 1.02  # some get there, others do not
    together, alone = searches(
        model, model.family.mlp(1), steps=20, clamp=20.0, stop_loss=stop, exact=exact
    )
    assert (
        len({target.updates for target in together}) >= 2
        and min(target.updates for target in together) < 19
    )
    assert_same(together, alone, 1e-5 if kind == "gptj" else 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_sharing_the_contexts_beginnings_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 1)
    model = tiny_model(kind, dtype="float64")
    together, alone = searches(model, model.family.block(0))
    assert_same(together, alone, TOLERANCES["gptj"] if kind == "gptj" else 1e-9)


def test_divided_into_smaller_batches_it_is_the_same_and_the_bound_is_kept() -> None:
    model = tiny_model("llama", dtype="float64")
    sequences = [prepare(model, each, CONTEXTS, kl_position="subject_last") for each in asked()]
    for bound in (1, 400, 100_000):
        batches = list(_batches(sequences, range(len(sequences)), bound))
        assert [place for batch in batches for place in batch] == list(range(len(sequences)))
        for batch in batches:
            rows = [ids for place in batch for ids in sequences[place].ids]
            assert len(batch) == 1 or len(rows) * max(map(len, rows)) <= bound
        assert len(batches) == {1: len(sequences), 100_000: 1}.get(bound, len(batches))
    assert 1 < len(list(_batches(sequences, range(len(sequences)), 400))) < len(sequences)
    whole, parts = (
        searches(model, model.family.mlp(1), tokens_at_once=bound)[0] for bound in (100_000, 400)
    )
    assert_same(parts, whole, 1e-9)


# On functions of known form


class Bowls:
    """Several requests, each drawn to its own goal: log-probability -|delta - goal|^2 / 2; one of
    them may break at some loss.
    """

    def __init__(
        self,
        goals_NO: torch.Tensor,
        *,
        breaks: int | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        self.goals_NO, self.breaks = goals_NO, breaks
        self.names = list(range(len(goals_NO))) if names is None else list(names)
        self.asked: list[
            list[int]
        ] = []  # who was asked for, by call, of this one and those made from it

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> Seen:
        self.asked.append(self.names)
        log_p_N = -(delta_NO - self.goals_NO).square().sum(dim=1) / 2
        is_broken_N = torch.tensor(
            [name == self.breaks and len(self.asked) > 3 for name in self.names]
        )
        return Seen(
            torch.where(is_broken_N, math.nan, log_p_N)[:, None],
            torch.zeros_like(log_p_N),
            torch.zeros_like(log_p_N)[:, None],
        )

    def only(self, kept: Sequence[int]) -> Bowls:
        some = Bowls(
            self.goals_NO[list(kept)],
            breaks=self.breaks,
            names=[self.names[place] for place in kept],
        )
        some.asked = self.asked
        return some


def bowls(**options: Any) -> Bowls:
    goals_NO = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Bowls(goals_NO * torch.tensor([0.1, 1.0, 0.3, 2.0, 0.6])[:, None], **options)


def problem(forward: Bowls, *, is_late: bool = False, **changes: Any) -> TargetProblem:
    chosen = settings(
        **{"weight_decay": 0.0, "kl_factor": 0.0, "clamp": 100.0, "lr": 0.2} | changes
    )
    return TargetProblem(
        forward=forward,
        initial_NO=torch.ones_like(forward.goals_NO),
        settings=chosen,
        is_late=is_late,
    )


def test_who_has_ended_is_not_run_again() -> None:
    forward = bowls()
    found = problem(forward).descend(updates=60)
    for name, updates in enumerate(found.updates_N.tolist()):
        assert sum(name in names for names in forward.asked) == updates + 1, (
            "one loss more than updates"
        )
    assert len(set(found.updates_N.tolist())) == 5
    assert found.is_finite_N.all() and (found.loss_N < 0.05).all()


def test_asking_a_step_late_changes_no_bit_of_the_result() -> None:
    for breaks in (None, 3):
        at_once, late = bowls(breaks=breaks), bowls(breaks=breaks)
        found = [
            problem(forward, is_late=is_late).descend(updates=60)
            for forward, is_late in ((at_once, False), (late, True))
        ]
        for field in dataclasses.fields(found[0]):
            one, other = (getattr(each, field.name) for each in found)
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(
                torch.equal(first.nan_to_num(-1.0), second.nan_to_num(-1.0))
                for first, second in pairs
            ), field.name
        for name in range(5):
            counts = [sum(name in names for names in forward.asked) for forward in (at_once, late)]
            assert counts[1] - counts[0] in (0, 1), "a step is computed in vain at most"


def test_a_late_answer_costs_nothing_where_nobody_ends_early() -> None:
    at_once, late = bowls(), bowls()
    for forward, is_late in ((at_once, False), (late, True)):
        problem(forward, is_late=is_late, stop_loss=0.0).descend(updates=6)
    assert at_once.asked == late.asked


def test_a_request_whose_loss_is_no_number_ends_and_touches_no_other() -> None:
    sound, broken = (
        problem(bowls()).descend(updates=60),
        problem(bowls(breaks=3)).descend(updates=60),
    )
    assert broken.is_finite_N.tolist() == [True, True, True, False, True]
    assert broken.updates_N[3] == 3 and broken.delta_NO[3].isfinite().all()
    others = [0, 1, 2, 4]
    assert torch.equal(sound.delta_NO[others], broken.delta_NO[others])
    assert torch.equal(sound.updates_N[others], broken.updates_N[others])


def test_a_second_descent_leaves_those_alone_that_are_not_among_it() -> None:
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


def test_a_step_is_the_step_of_torchs_adam() -> None:
    forward = bowls()
    found = problem(forward, stop_loss=0.0).descend(updates=12)
    for goal_O, delta_O in zip(forward.goals_NO, found.delta_NO, strict=True):
        moved_O = torch.zeros_like(goal_O).requires_grad_()
        adam = torch.optim.Adam([moved_O], lr=0.2)
        for _ in range(12):
            adam.zero_grad()
            ((moved_O - goal_O).square().sum() / 2).backward()
            adam.step()
        torch.testing.assert_close(delta_O, moved_O.detach(), rtol=1e-12, atol=1e-13)
