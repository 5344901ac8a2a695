"""A shortcut that is wrong for a network is found at the beginning and is not taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import editkit
from editkit.editors.memit import Memit
from editkit.editors.rome import Rome
from editkit.errors import ConfigError
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from editkit.model.generate import generate
from editkit.model.shortcuts import Comparison, Shortcuts, difference
from editkit.runner.checkpoint import load_state, save_state
from editkit.runner.loop import run_edits
from editkit.runner.self_check import check_editing, check_reading
from editkit.targets.search import search_target
from editkit.types import Probe
from tests.support.fakes import trajectory
from tests.support.families import family_model
from tests.support.helpers import request, requests, tiny_model
from tests.support.searches import CONTEXTS, settings

TEXT = "The mother tongue of Danielle Darrieux is French, and she was born in Bordeaux."


def rome(**target: Any) -> Rome:
    return Rome(
        name="rome",
        layers=(1,),
        context_lengths=(),
        target=settings(**target),
        keys="original",
        covariance=None,
    )


def memit(layers: tuple[int, ...] = (0, 1, 2)) -> Memit:
    return Memit(
        name="memit",
        layers=layers,
        context_lengths=((3, 1),),
        target=settings(),
        covariance_weight=1.0,
        spread="recomputed",
    )


def wrongly_mapped() -> EditableModel:
    """A network with a norm after its MLPs, whose names claim that there is none."""
    wrong = replace(family_of("gemma2"), adds_mlp_output=True)
    return family_model("gemma2", family=wrong)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_right_shortcuts_are_taken_and_nothing_is_said(kind: Any) -> None:
    model = tiny_model(kind)
    assert check_reading(model, TEXT) == []
    assert check_editing(model, memit(), request()) == []
    report = model.shortcuts.report()
    assert sorted(report) == ["generation", "keys", "scoring", "search"]
    for found in report.values():
        assert found["taken"]
        assert all(value < 1e-5 for value in found["differences"].values())


def test_a_wrong_mapping_is_searched_with_the_whole_network_and_said_once() -> None:
    model, right = wrongly_mapped(), family_model("gemma2")
    [warning] = check_editing(model, rome(), request())
    assert warning.startswith(
        "tiny-gemma2 (gemma2): target searches run the whole network in every step, because the "
        "shortcut gives other numbers (relative difference "
    )
    assert check_editing(model, rome(), request()) == []
    site = model.family.mlp(1)
    options: Any = {"site": site, "contexts": CONTEXTS}
    found = search_target(model, request(), settings=settings(steps=5), **options)
    exact = search_target(model, request(), settings=settings(steps=5, exact=True), **options)
    assert torch.equal(found.delta_O, exact.delta_O) and found.loss == exact.loss
    without = search_target(wrongly_mapped(), request(), settings=settings(steps=5), **options)
    assert difference(without.delta_O, exact.delta_O) > 1e-2, "the shortcut is really wrong"
    mapped = search_target(right, request(), settings=settings(steps=5), **options)
    assert difference(mapped.delta_O, exact.delta_O) < 1e-4


def adding_in_place(model: EditableModel) -> None:
    """Lets each block add its attention to the output of its MLP in place, as Falcon does."""
    for block in model.network.model.layers:
        attention = block.self_attn

        def keep(_module: Any, _args: Any, output: Any, block: Any = block) -> None:
            block.kept = output[0]

        def add(_module: Any, _args: Any, output: torch.Tensor, block: Any = block) -> None:
            output += block.kept

        attention.register_forward_hook(keep)
        block.mlp.register_forward_hook(add)  # runs before hooks that read the output


def test_a_block_that_adds_attention_to_the_mlps_output_in_place_gives_no_wrong_number() -> None:
    model = family_model("llama")
    adding_in_place(model)
    with pytest.raises(ConfigError, match="mlp_in_block: the output of this module"):
        check_editing(model, rome(), request())
    falcon = family_model("falcon")
    assert check_editing(falcon, rome(), request()) == []
    options: Any = {"site": falcon.family.mlp(1), "contexts": CONTEXTS}
    found, exact = (
        search_target(falcon, request(), settings=settings(steps=8, exact=each), **options)
        for each in (False, True)
    )
    assert found.loss == pytest.approx(exact.loss, rel=1e-4)
    assert difference(found.initial_O, exact.initial_O) < 1e-5


def test_wrong_names_of_the_base_network_are_one_message() -> None:
    model = family_model("llama")
    model.network.model.norm.register_forward_hook(lambda _module, _args, output: output)
    model.network.lm_head.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    model.head_is_matrix = True  # as if it had been found so
    original = model.final_hidden
    model.final_hidden = lambda batch: 0.5 * original(batch)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"model.family: the head of tiny-llama does not read"):
        check_reading(model, TEXT)


def without_masks(model: EditableModel) -> None:
    """Lets the base network ignore explicit attention masks."""
    base = model.module(model.family.base)
    former = base.forward

    def forward(**arguments: Any) -> Any:
        mask = arguments.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            arguments["attention_mask"] = None
        return former(**arguments)

    base.forward = forward


def test_a_network_that_ignores_explicit_masks_scores_every_text_alone() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    without_masks(model)
    [warning] = check_reading(model, TEXT)
    assert "every text is scored in a row of its own" in warning
    probes = [Probe(prompt=TEXT, answer=answer) for answer in ("French food", "Rome is", "Paris")]
    ours, expected = (score(each, probes, tokens_per_batch=512) for each in (model, plain))
    for probe in probes:
        assert ours[probe].log_probs == pytest.approx(expected[probe].log_probs, abs=1e-5)


def without_cache(model: EditableModel) -> None:
    """Lets the base network forget what it has read."""
    base = model.module(model.family.base)
    former = base.forward

    def forward(**arguments: Any) -> Any:
        arguments.pop("past_key_values", None)
        if arguments["attention_mask"].shape[1] > arguments["input_ids"].shape[1]:
            arguments["attention_mask"] = None
        return former(**arguments)

    base.forward = forward


def test_a_network_without_a_working_cache_generates_from_the_whole_text() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    without_cache(model)
    [warning] = check_reading(model, TEXT)
    assert "every generated token runs the whole text again" in warning
    prompts = [tuple(model.tokenizer(text)["input_ids"]) for text in (TEXT, TEXT[:20], "Paris")]
    for options in ({}, {"ends": (), "generator": True}):
        ours, expected = (
            generate(
                each,
                prompts,
                max_new_tokens=6,
                **(options | {"generator": torch.Generator().manual_seed(1)} if options else {}),
            )
            for each in (model, plain)
        )
        assert ours == expected


def test_keys_are_read_from_the_first_layer_on_if_kept_states_are_wrong() -> None:
    model = tiny_model("llama")
    norm, calls = model.network.model.layers[2].input_layernorm, []

    def drift(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)  # another result in every pass that does not begin at the first layer
        return output * (1.0 if model.network.model.layers[0] is first else 1.5)

    first = model.network.model.layers[0]
    norm.register_forward_hook(drift)
    warnings = check_editing(model, memit((1, 2)), request())
    assert calls and any("keys of every layer are computed from the first" in w for w in warnings)
    assert not model.shortcuts.allows("keys")
    found = memit((1, 2)).self_check(model, request())
    assert all(each.agrees for each in found), "the plain path is compared with itself"


def test_a_resumed_run_keeps_the_decision_and_its_bits(tmp_path: Path) -> None:
    def finish(state: Any, model: EditableModel) -> list[torch.Tensor]:
        job = trajectory(model, requests(4), editor=rome(steps=4), milestones=(), batch_size=1)
        list(run_edits(job, state))
        return [model.weight(name) for name in model.edited_modules]

    model = wrongly_mapped()
    check_editing(model, rome(), request())
    job = trajectory(model, requests(4), editor=rome(steps=4), milestones=(), batch_size=1)
    states = [event for event in run_edits(job) if hasattr(event, "totals")]
    whole = [model.weight(name).clone() for name in model.edited_modules]
    half = next(state for state in states if state.step == 2)
    save_state(half, tmp_path, {})
    resumed = wrongly_mapped()
    assert resumed.shortcuts == Shortcuts()
    for one, other in zip(finish(load_state(tmp_path), resumed), whole, strict=True):
        assert torch.equal(one, other)
    assert not resumed.shortcuts.allows("search")
    assert json.loads(json.dumps(resumed.shortcuts.report()))["search"]["taken"] is False


def test_a_session_checks_before_its_first_edit(caplog: pytest.LogCaptureFixture) -> None:
    model = wrongly_mapped()
    session = editkit.Session(model, rome(steps=3))
    assert sorted(model.shortcuts.report()) == ["generation", "scoring"]
    for _ in range(2):
        session.edit(request())
    assert not model.shortcuts.allows("search")
    said = [record.message for record in caplog.records if "whole network" in record.message]
    assert len(said) == 1 and said[0].startswith("tiny-gemma2 (gemma2): target searches")


def test_a_comparison_knows_rounding_from_a_difference() -> None:
    ones = torch.ones(4)
    assert difference(ones, ones) == 0.0
    assert difference(1.01 * ones, ones) == pytest.approx(0.01)
    broken = torch.tensor([1.0, torch.nan, 1.0, 1.0])
    assert difference(broken, broken) == 0.0, "nothing can be said of two broken results"
    assert difference(broken, ones) == difference(ones, broken) == torch.inf
    assert difference(ones, torch.zeros(4)) == torch.inf
    wrong = Comparison(shortcut="keys", differences={"output": torch.inf}, tolerance=1e-3)
    right = Comparison(shortcut="keys", differences={"output": 1e-7}, tolerance=1e-3)
    kept = Shortcuts().with_comparisons([right, wrong]).with_comparisons([right])
    assert not kept.allows("keys") and kept.allows("search")
    assert Shortcuts.from_report(json.loads(json.dumps(kept.report()))) == kept
    assert "fails in this network" in kept.warnings("a model", "a family")[0]
