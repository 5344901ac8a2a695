"""Requests that are searched together get the results of separate searches up to rounding, and end
at the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from editkit.model import shared_prefixes as prefixes
from editkit.model.editable import EditableModel
from editkit.targets.search import Target, _batches, search_target, search_targets
from editkit.targets.sequences import prepare
from editkit.types import EditRequest
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.searches import CONTEXTS, settings

# Relative, of delta. GPT-J's attention computes in float32 even with float64 weights.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "gptj": 1e-6}


def edits() -> list[EditRequest]:
    """Requests of different lengths, with targets of one and several tokens, and subjects at the
    start and at the end.
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
    """The results of one joint search and of separate searches."""
    options: Any = {
        "site": site,
        "contexts": CONTEXTS,
        "settings": settings(**{"steps": 8} | changes),
    }
    return search_targets(model, edits(), **options), [
        search_target(model, edit, **options) for edit in edits()
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
def test_a_batch_equals_separate_searches(kind: Kind, dtype: str, exact: bool) -> None:
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
def test_shared_context_prefixes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 1)
    model = tiny_model(kind, dtype="float64")
    together, alone = searches(model, model.family.block(0))
    assert_same(together, alone, TOLERANCES["gptj"] if kind == "gptj" else 1e-9)


def test_smaller_batches_give_the_same_results_within_the_bound() -> None:
    model = tiny_model("llama", dtype="float64")
    sequences = [prepare(model, edit, CONTEXTS, kl_position="subject_last") for edit in edits()]
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
