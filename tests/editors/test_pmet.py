"""PMET's targets equal a search by the whole network with torch's Adam; its updates equal the plain
formula.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from editkit.editors.pmet import Pmet
from editkit.errors import ConfigError
from editkit.model.capture import add_to_output
from editkit.model.editable import EditableModel
from editkit.targets.forwards import site_outputs
from editkit.targets.keys import keys_and_outputs
from editkit.targets.search import search_target
from editkit.targets.sequences import prepare
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest
from tests.support.helpers import KINDS, request, requests, tiny_model
from tests.support.methods import model_moments, step
from tests.support.searches import settings, subject_at_the_end

CONTEXTS = ("{}", "So it is. {}")
LAYER = 2


def pmet(**changes: Any) -> Pmet:
    target = settings(**{"easing": 0.1, "stop_kl": 0.01, "steps": 4} | changes.pop("target", {}))
    options: dict[str, Any] = {
        "name": "pmet",
        "layers": (0, 1, 2),
        "covariance_weight": 0.5,
        "deltas": "both",
        "spread": "square_root",
        "context_lengths": ((4, 1),),
        "target": target,
    }
    return Pmet(**options | changes)


def eased(**changes: Any) -> TargetSettings:
    return settings(**{"steps": 12, "clamp": 20.0, "easing": 0.1, "stop_kl": 0.0} | changes)


@dataclass
class Plain:
    """A search, step by step."""

    deltas: list[torch.Tensor]
    weights: list[float]  # of -log p in each loss
    loss: float


def plain_search(
    model: EditableModel, asked: EditRequest, sites: tuple[str, ...], chosen: TargetSettings
) -> Plain:
    """One unpadded sequence after another through the whole network, with torch's Adam."""
    sequences = prepare(model, asked, CONTEXTS, kl_position=chosen.kl_position)
    values = [site_outputs(model, name, [sequences])[0].double() for name in sites]
    deltas = [torch.zeros_like(value, requires_grad=True) for value in values]
    weight, before_V = 1.0, None
    unit = 1.0 if chosen.lr_unit == "absolute" else 1 / math.sqrt(len(values[0]))
    adam = torch.optim.Adam(
        {"params": [delta], "lr": chosen.lr * (unit if unit == 1 else unit * float(value.norm()))}
        for delta, value in zip(deltas, values, strict=True)
    )
    weights: list[float] = []

    def log_p_TV(row: int) -> torch.Tensor:
        with ExitStack() as added:
            for name, delta in zip(sites, deltas, strict=True):
                place = torch.tensor([sequences.sites[row]])
                added.enter_context(add_to_output(model, name, place, delta))
            ids = torch.tensor([sequences.ids[row]])
            return model.network(input_ids=ids).logits[0].log_softmax(dim=-1)

    for index in range(chosen.steps):
        losses, is_top = [], True
        for row, (places, target) in enumerate(
            zip(sequences.predicting, sequences.targets, strict=True)
        ):
            own = log_p_TV(row)[list(places)]
            losses.append(-own[range(len(target)), list(target)].mean())
            is_top &= own.argmax(dim=1).tolist() == list(target)
        now_V = log_p_TV(len(CONTEXTS))[sequences.kl_position]
        before_V = now_V.detach() if before_V is None else before_V
        divergence = chosen.kl_factor * (now_V.exp() * (now_V - before_V)).sum()
        decay = sum(
            delta.norm() / value.norm() ** 2 for delta, value in zip(deltas, values, strict=True)
        )
        loss = weight * torch.stack(losses).mean() + divergence + chosen.weight_decay * decay
        weights.append(weight)
        weight = chosen.easing if is_top else 1.0
        spent = divergence.item()
        is_done = is_top and chosen.stop_kl is not None and spent <= chosen.stop_kl
        if loss.item() < chosen.stop_loss or is_done or index == chosen.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for delta, value in zip(deltas, values, strict=True):
                delta *= min(1.0, float(chosen.clamp * value.norm() / delta.norm()))
    return Plain([delta.detach() for delta in deltas], weights, loss.item())


def sites_of(model: EditableModel, layer: int = LAYER) -> tuple[str, str]:
    return model.family.attention(layer), model.family.mlp(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_both_targets_are_those_of_the_plain_search(kind: Any) -> None:
    model, asked = tiny_model(kind, dtype="float64"), subject_at_the_end()
    sites, searches = sites_of(model), []
    for chosen in (
        eased(exact=True),
        eased(steps=30),
        eased(clamp=1.5, weight_decay=2.0, lr=0.2, lr_unit="relative"),
        eased(stop_kl=0.05, kl_factor=0.01),
    ):
        plain = plain_search(model, asked, sites, chosen)
        found = search_target(model, asked, site=sites, contexts=CONTEXTS, settings=chosen)
        assert found.updates == len(plain.weights) - 1
        # GPT-J's attention computes in float32 even with float64 weights.
        torch.testing.assert_close(
            found.delta_O, torch.cat(plain.deltas), rtol=0, atol=1e-4 if kind == "gptj" else 1e-8
        )
        assert found.loss == pytest.approx(plain.loss, rel=1e-5)
        searches.append(plain)
    assert {0.1, 1.0} == set(searches[1].weights)
    assert len(searches[3].weights) < len(searches[0].weights), "it stops at a small divergence"


def test_the_search_of_the_mlp_alone_is_the_usual_one_at_that_site() -> None:
    model, both = tiny_model("llama"), pmet()
    alone = replace(both, deltas="mlp")
    assert both.site(model) == sites_of(model)
    assert alone.site(model) == model.family.mlp(LAYER)
    plan = alone.plan(step(model, [request()], CONTEXTS))
    usual = search_target(
        model,
        request(),
        site=model.family.mlp(LAYER),
        contexts=CONTEXTS,
        settings=alone.target,
    )
    assert torch.equal(plan.targets_ON[:, 0], usual.vector_O)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mlps_target_alone_is_written_and_the_attentions_is_dropped(kind: Any) -> None:
    model, editor = tiny_model(kind), pmet()
    plan = editor.plan(step(model, requests(), CONTEXTS))
    for column, asked in enumerate(requests()):
        _, mlp = sites_of(model)
        whole = search_target(
            model, asked, site=sites_of(model), contexts=CONTEXTS, settings=editor.target
        )
        sequences = prepare(model, asked, CONTEXTS, kl_position="subject_last")
        value_O = site_outputs(model, mlp, [sequences])[0]
        torch.testing.assert_close(whole.initial_O[len(value_O) :], value_O, rtol=1e-4, atol=1e-5)
        assert float(whole.delta_O[: len(value_O)].norm()) > 0
        residual_O, target_O = plan.residuals_ON[:, column], plan.targets_ON[:, column]
        torch.testing.assert_close(target_O - residual_O, value_O, rtol=1e-4, atol=1e-5)
    assert editor.modules(model) == model.down_projections([0, 1, 2])


@pytest.mark.parametrize(
    ("spread", "shares"), [("square_root", (3**-0.5, 2**-0.5, 1)), ("even", (1 / 3, 1 / 2, 1))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_writes_its_share_of_what_the_mlp_lacks_by_the_plain_formula(
    kind: Any, spread: Any, shares: tuple[float, ...]
) -> None:
    model, editor = tiny_model(kind), pmet(spread=spread)
    modules = editor.modules(model)
    moments = model_moments(model, modules)
    here = step(model, requests(), CONTEXTS, moments=moments)
    plan = editor.plan(here)
    model.edit(modules)
    for module, share in zip(modules, shares, strict=True):
        now_ON, keys_IN = [], []
        for asked in requests():
            mlp = model.family.mlp(LAYER)
            now_ON.append(keys_and_outputs(model, asked, module=mlp, contexts=("{}",))[1][0])
            keys_CI, _ = keys_and_outputs(model, asked, module=module, contexts=CONTEXTS)
            keys_IN.append(keys_CI.mean(dim=0))
        missing_ON = plan.targets_ON.double() - torch.stack(now_ON, dim=1)
        k_IN = torch.stack(keys_IN, dim=1)
        weighted_II = 0.5 * moments.by_module[module].matrix_II + k_IN @ k_IN.T
        plain = share * missing_ON @ k_IN.T @ torch.linalg.inv(weighted_II)
        update = editor.propose(here, module, plan)
        assert float((update.dense() - plain).norm() / plain.norm()) < 1e-3  # type: ignore[union-attr]
        model.apply(module, update)


def test_an_mlp_that_is_not_its_down_projection_is_refused() -> None:
    model = tiny_model("gpt2")
    model.family = replace(model.family, mlp_in_block="attn")
    with pytest.raises(ConfigError, match="mlp_in_block: the output of this module"):
        pmet().self_check(model, request())


def test_a_family_without_the_name_of_its_attention_is_refused_with_the_nearest_names() -> None:
    model = tiny_model("gpt2")
    model.family = replace(model.family, attention_in_block="attn.out_proj")
    with pytest.raises(ConfigError, match=r"attn\.out_proj.*no such module.*attn\.c_proj"):
        pmet().plan(step(model, [request()], CONTEXTS))


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"easing:(.|\n)*stop_kl:"):
        pmet(target={"easing": -1.0, "stop_kl": -0.1})
