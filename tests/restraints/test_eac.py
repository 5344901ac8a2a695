"""EAC with the editors on small networks, the numbers of its published code, and its options."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.identity import config_hash
from editkit.errors import ConfigError, OptionError
from editkit.restraints.eac import Eac, Numbers
from editkit.targets.search import Target, search_target, search_targets
from editkit.types import EditRequest
from tests.support.eac import SITES, Bowl, eac, search
from tests.support.helpers import KINDS, Kind, request, tiny_model
from tests.support.searches import CONTEXTS, settings, subject_at_the_end


def test_the_published_code_has_its_own_numbers_for_rome_and_for_memit() -> None:
    restraint = eac(variant="published_code", gamma=0.0, l2=9.0, steps_search=3, steps_retrain=4)
    at_mlp = Numbers(
        updates_search=10, num_anchors=320, updates_retrain=10, from_zero=False, l1=0.0, l2=0.0
    )
    at_block = Numbers(
        updates_search=10, num_anchors=80, updates_retrain=15, from_zero=True, l1=5e-7, l2=0.0
    )
    assert restraint.numbers(1600, "mlp") == at_mlp
    assert restraint.numbers(1600, "block") == at_block


def test_the_published_code_runs_the_network_21_times_for_rome_and_26_times_for_memit() -> None:
    for site, calls, anchors in (("mlp", 21, 8), ("block", 26, 2)):
        bowl = Bowl(40)
        found = search(eac(variant="published_code"), bowl, site=site)  # type: ignore[arg-type]
        assert (bowl.calls, int((found.delta_O != 0).sum())) == (calls, anchors)


def find(
    kind: Kind,
    site: Literal["mlp", "block"],
    restraint: Eac | None,
    asked: EditRequest | None = None,
    **changes: Any,
) -> Target:
    model = tiny_model(kind, dtype=changes.pop("dtype", "float32"))
    name = getattr(model.family, site)(1)
    chosen = settings(**{"steps": 21, "clamp": 20.0} | changes)
    return search_target(
        model,
        asked or subject_at_the_end(),
        site=name,
        contexts=CONTEXTS[:2],
        settings=chosen,
        objective=restraint,
    )


@pytest.mark.parametrize("variant", ["paper", "published_code"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_becomes_probable_in_few_coordinates(
    kind: Kind, site: Literal["mlp", "block"], variant: str
) -> None:
    found = find(kind, site, eac(variant=variant))
    count = 7 if variant == "paper" else 6 if site == "mlp" else 1
    assert int((found.delta_O != 0).sum()) == count
    assert found.probability_after > (1.2 if count == 1 else 1.5) * found.probability_before
    assert not found.nonfinite


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_continued_search_finds_what_the_plain_one_finds(
    kind: Kind, site: Literal["mlp", "block"]
) -> None:
    plain, continued = (
        find(kind, site, eac(), exact=exact, dtype="float64") for exact in (True, False)
    )
    assert continued.loss == pytest.approx(plain.loss, rel=1e-8)
    assert torch.equal(continued.delta_O == 0, plain.delta_O == 0)
    assert torch.linalg.norm(continued.delta_O - plain.delta_O) <= 1e-6 * torch.linalg.norm(
        plain.delta_O
    )


@pytest.mark.parametrize(
    "restraint",
    [eac(), eac(variant="published_code"), eac(selector="random")],
    ids=["paper", "code", "random"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_requests_searched_together_get_what_they_get_alone(kind: Kind, restraint: Eac) -> None:
    # The last one ends in its first descent: nothing is asked of it.
    asked = [request(0), request(1), subject_at_the_end()]
    for site in SITES:
        model = tiny_model(kind, dtype="float64")
        options: Any = {
            "site": getattr(model.family, site)(1),
            "contexts": CONTEXTS[:2],
            "settings": settings(stop_loss=7.2),
        }
        together = search_targets(model, asked, objective=restraint, **options)
        for one, other in zip(
            together,
            (search_target(model, each, objective=restraint, **options) for each in asked),
            strict=True,
        ):
            assert one.updates == other.updates
            assert torch.equal(one.delta_O == 0, other.delta_O == 0)
            assert torch.linalg.norm(one.delta_O - other.delta_O) <= 1e-6 * torch.linalg.norm(
                other.delta_O
            )
            assert one.loss == pytest.approx(other.loss, rel=1e-7)


def test_two_searches_in_one_process_give_the_same_bits() -> None:
    for selector in ("saliency", "random"):
        one, other = (find("gpt2", "block", eac(selector=selector)) for _ in range(2))
        assert torch.equal(one.delta_O, other.delta_O)
        assert one.loss == other.loss


@pytest.mark.parametrize(
    "bad",
    [
        *(
            {"variant": "mine"},
            {"selector": "best"},
            {"l2_unit": "metres"},
            {"gamma": 100.0},
            {"gamma": -1.0},
            {"gamma": math.nan},
        ),
        *(
            {"l1": -1e-9},
            {"l2": math.inf},
            {"epsilon": 0.0},
            {"steps_search": 0},
            {"steps_retrain": 1},
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=rf"^{next(iter(bad))}: "):
        eac(**bad)


def test_without_a_recipe_a_run_warns_that_gamma_may_cost_single_edits() -> None:
    def warnings(*overrides: str) -> list[str]:
        composed = compose(["suite=none", "restraint=[eac,prune]", *overrides])
        return build(composed.config, choices=composed.choices).restraints.warnings()

    pair = ("editor=memit", "model=gpt2-xl", "dataset=world", "stats=world")
    [warning] = warnings(*pair)
    assert "no recipe for this editor, model and dataset: gamma 80 may cost single edits" in warning
    assert not warnings(*pair, "restraint.eac.source=measured")
    assert not warnings(*pair, "restraint.eac.variant=published_code")  # has no gamma
    assert not warnings("editor=memit", "model=tiny-gpt2")


def test_where_gamma_comes_from_does_not_change_the_runs_folder() -> None:
    configs = [
        compose(["restraint=eac", f"restraint.eac.source={source}"]).config
        for source in ("null", "mine")
    ]
    assert config_hash(configs[0]) == config_hash(configs[1])


def test_a_selector_that_chooses_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="selector: has no effect"):
        eac(saliency=False, selector="random")


@pytest.mark.parametrize("editor", ["rome", "memit"])
def test_it_is_the_objective_of_rome_and_memit(editor: str) -> None:
    composed = compose(["restraint=[eac,prune]", f"editor={editor}"])
    found = build(composed.config, choices=composed.choices).restraints.objective
    assert isinstance(found, Eac) and found.source


def test_it_is_refused_where_no_target_vector_is_searched() -> None:
    composed = compose(["restraint=eac", "editor=ft"])
    with pytest.raises(
        ConfigError,
        match=r"restraint\.eac: editor=ft cannot be restrained at this place \(got 'objective';",
    ):
        build(composed.config, choices=composed.choices)
