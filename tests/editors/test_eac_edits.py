"""EAC in the editors: what its anchors leave alone in an update, and that the edits still take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.editors.memit import Memit
from editkit.editors.rome import Rome, RomePlan
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from editkit.restraints.eac import Eac
from editkit.stats.least_squares import least_squares
from editkit.targets.search import search_target
from tests.editors.test_rome import rome
from tests.restraints.test_eac import eac
from tests.support.helpers import KINDS, Kind, request, tiny_model
from tests.support.methods import memit, model_moments, step
from tests.support.searches import CONTEXTS, settings, subject_at_the_end


def rome_edit(kind: Kind, keys: Any, restraint: Eac | None) -> tuple[RomePlan, LowRank]:
    model, editor = (
        tiny_model(kind),
        rome(keys=keys, target=settings(steps=1) if restraint is None else settings()),
    )
    [module] = editor.modules(model)
    plan = editor.plan(step(model, [request()], CONTEXTS, objective=restraint))
    return plan, editor.propose(
        step(model, [request()], CONTEXTS, moments=model_moments(model, [module])), module, plan
    )


@pytest.mark.parametrize("keys", ["averaged", "original", "clean"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_romes_update_the_anchors_rows_alone_differ_from_those_of_no_delta(
    kind: Kind, keys: Any
) -> None:
    plan, update = rome_edit(kind, keys, eac())
    unmoved = rome_edit(kind, keys, None)[
        1
    ]  # a single step takes the loss at delta = 0 and moves nothing
    anchors_O = plan.target.delta_O != 0
    assert 0 < int(anchors_O.sum()) == 7
    differs_O = (update.dense() != unmoved.dense()).any(dim=1)
    assert torch.equal(differs_O, anchors_O)
    if keys != "averaged":  # W k_0 is then what is there already, to rounding
        assert float(update.dense()[~anchors_O].abs().max()) <= 1e-5 * float(
            update.dense().abs().max()
        )


@pytest.mark.parametrize("variant", ["paper", "published_code"])
@pytest.mark.parametrize("kind", KINDS)
def test_memits_first_layer_writes_the_anchors_rows_alone(kind: Kind, variant: str) -> None:
    model, editor = tiny_model(kind), memit()
    modules = editor.modules(model)
    moments = model_moments(model, modules)
    asked = [request(0), request(1)]
    plan = editor.plan(step(model, asked, CONTEXTS, objective=eac(variant=variant)))
    anchors_ON = plan.residuals_ON != 0
    assert anchors_ON.sum(dim=0).tolist() == [7, 7] if variant == "paper" else [1, 1]
    update = editor.propose(
        step(
            model,
            asked,
            CONTEXTS,
            moments=moments,
            solver=lambda each: least_squares(each, moments),
        ),
        modules[0],
        plan,
    )
    assert isinstance(update, LowRank)
    assert torch.equal(update.dense().any(dim=1), anchors_ON.any(dim=1))


@pytest.mark.parametrize("editor", [rome(), memit()], ids=["rome", "memit"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_with_it_makes_the_target_more_probable_in_the_model_itself(
    kind: Kind, editor: Rome | Memit
) -> None:
    def probability(model: EditableModel) -> float:
        name = model.family.mlp(1)
        once = settings(steps=1)
        return search_target(
            model, subject_at_the_end(), site=name, contexts=("{}",), settings=once
        ).probability_before

    chosen: Any = settings(clamp=20.0)
    model = tiny_model(kind)
    editor = (
        rome(target=chosen)
        if isinstance(editor, Rome)
        else memit(target={"lr": 0.5, "lr_unit": "absolute", "clamp": 20.0})
    )
    modules, asked = editor.modules(model), [subject_at_the_end()]
    moments = model_moments(model, modules)
    before = probability(model)
    plan = editor.plan(step(model, asked, CONTEXTS, objective=eac(l2=0.0)))
    assert torch.equal(model.weight(modules[0]), tiny_model(kind).weight(modules[0])), (
        "planning reads"
    )
    model.edit(modules)
    for module in modules:
        model.apply(
            module,
            editor.propose(
                step(
                    model,
                    asked,
                    CONTEXTS,
                    moments=moments,
                    solver=lambda each: least_squares(each, moments),
                ),
                module,
                plan,
            ),
        )
    assert probability(model) > 1.2 * before
