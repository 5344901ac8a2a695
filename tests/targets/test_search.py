"""The search for a target vector in a network: the published loss, the positions that it reads, and
a model that stays unchanged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.capture import add_to_output, capture
from editkit.model.editable import EditableModel
from editkit.model.tokens import pad
from editkit.targets.forwards import plain_forward, site_outputs, suffix_layer
from editkit.targets.search import Target, search_target, search_targets
from editkit.targets.sequences import prepare
from editkit.targets.settings import TargetSettings
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.searches import CONTEXTS, settings, subject_at_the_end


def decode(model: EditableModel, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))


def textbook_loss(
    model: Any,
    edit: Any,
    site: str,
    delta_O: torch.Tensor,
    initial_O: torch.Tensor,
    chosen: TargetSettings,
) -> float:
    """The loss from the logits of all positions, one unpadded sequence after another."""

    def log_p(ids: tuple[int, ...], position: int, delta_O: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), add_to_output(model, site, torch.tensor([position]), delta_O):
            return model.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)

    sequences = prepare(model, edit, CONTEXTS, kl_position=chosen.kl_position)
    losses = []
    for ids, position, target in zip(
        sequences.ids[:-1], sequences.sites[:-1], sequences.targets, strict=True
    ):
        log_p_TV = log_p(ids, position, delta_O)
        losses.append(
            -sum(float(log_p_TV[step - len(target), token]) for step, token in enumerate(target))
            / len(target)
        )
    moved_V = log_p(sequences.ids[-1], sequences.sites[-1], delta_O)[sequences.kl_position]
    first_V = log_p(sequences.ids[-1], sequences.sites[-1], torch.zeros_like(delta_O))[
        sequences.kl_position
    ]
    kl = float((moved_V.exp() * (moved_V - first_V)).sum())
    decay = float(delta_O.norm()) / float(initial_O.norm()) ** 2
    return sum(losses) / len(losses) + chosen.kl_factor * kl + chosen.weight_decay * decay


@pytest.mark.parametrize("kl_position", ["subject_last", "prompt_end"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_full_logits_without_padding(kind: Kind, kl_position: str) -> None:
    model, chosen = tiny_model(kind), settings(steps=4, kl_position=kl_position, kl_factor=3.0)
    for edit in requests():
        site = model.family.mlp(1)
        target = search_target(model, edit, site=site, contexts=CONTEXTS, settings=chosen)
        assert target.loss == pytest.approx(
            textbook_loss(model, edit, site, target.delta_O, target.initial_O, chosen), rel=2e-5
        )


def test_the_divergence_is_measured_at_the_requested_position() -> None:
    model, edit = tiny_model("gpt2"), request()
    text = f"{edit.subject} is a"
    pieces = [decode(model, [token]) for token in model.tokenizer(text)["input_ids"]]
    at_subject = prepare(model, edit, CONTEXTS, kl_position="subject_last")
    at_end = prepare(model, edit, CONTEXTS, kl_position="prompt_end")
    assert "".join(pieces[: at_subject.kl_position + 1]) == edit.subject
    assert at_subject.kl_position == at_subject.sites[-1]
    assert at_end.kl_position == len(pieces) - 1 == len(at_end.ids[-1]) - 1
    assert at_end.sites == at_subject.sites  # delta stays at the subject either way


def test_the_divergence_at_the_subject_and_at_the_end_give_different_targets() -> None:
    model = tiny_model("gpt2")
    target = [
        search_target(
            model,
            request(),
            site=model.family.mlp(1),
            contexts=CONTEXTS,
            settings=settings(kl_position=position, kl_factor=5.0, steps=6),
        )
        for position in ("subject_last", "prompt_end")
    ]
    assert not torch.equal(target[0].delta_O, target[1].delta_O)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_end_before_the_last_target_token_and_delta_is_at_the_subject(
    kind: Kind, bos: bool
) -> None:
    model = tiny_model(kind, bos=bos)
    for edit in requests():
        sequences = prepare(model, edit, CONTEXTS, kl_position="subject_last")
        for row, context in enumerate(CONTEXTS):
            text = context.replace("{}", edit.full_prompt)
            ids, target = sequences.ids[row], sequences.targets[row]
            assert (ids[0] == model.tokenizer.bos_token_id) == bos
            assert model.tokenizer.bos_token_id not in target
            assert decode(model, [*ids, target[-1]]).strip() == f"{text} {edit.target}"
            assert list(sequences.predicting[row]) == list(range(len(ids) - len(target), len(ids)))
            before, upto = (
                decode(model, ids[: sequences.sites[row] + extra]).strip() for extra in (0, 1)
            )
            beginning = text[: text.index(edit.subject) + len(edit.subject)]
            # A token may contain characters after the subject as well, as in "Apple's".
            assert upto.startswith(beginning)
            assert not before.startswith(beginning)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_either_side_gives_the_same_loss(kind: Kind, side: Any) -> None:
    model = tiny_model(kind)
    site, sequences = (
        model.family.mlp(1),
        prepare(model, request(), CONTEXTS, kl_position="subject_last"),
    )
    delta_O = torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = plain_forward(model, site, [sequences], side=side)(delta_O[None], None)
        alone = plain_forward(model, site, [sequences])(delta_O[None], None)
    torch.testing.assert_close(ours.log_p_NC, alone.log_p_NC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.log_p_NV, alone.log_p_NV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_becomes_probable_and_the_network_keeps_its_bits(kind: Kind, bos: bool) -> None:
    model = tiny_model(kind, bos=bos)
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    target = search_target(
        model,
        subject_at_the_end(),
        site=model.family.mlp(1),
        contexts=CONTEXTS,
        settings=settings(clamp=20.0),
    )
    # The norm before the head limits the probability with random weights to about 0.2.
    assert target.probability_after > 20 * target.probability_before
    assert not target.nonfinite
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_output_is_that_of_the_clean_prompt(kind: Kind) -> None:
    model, edit = tiny_model(kind), request()
    sequences = prepare(model, edit, CONTEXTS, kl_position="subject_last")
    site = model.family.mlp(2)
    batch = pad([model.tokenizer(edit.full_prompt)["input_ids"]])
    with torch.no_grad(), capture(model, outputs=[site]) as captured:
        model.final_hidden(batch)
    expected_O = captured.outputs[site][0, sequences.sites[0]]
    torch.testing.assert_close(
        site_outputs(model, site, [sequences])[0], expected_O, rtol=1e-6, atol=1e-6
    )
    target = search_target(model, edit, site=site, contexts=CONTEXTS, settings=settings(steps=1))
    torch.testing.assert_close(target.initial_O, expected_O, rtol=1e-5, atol=1e-5)


def test_any_module_can_be_the_site() -> None:
    model = tiny_model("llama")
    target = search_target(
        model,
        request(),
        site=model.family.block(1),
        contexts=CONTEXTS,
        settings=settings(lr=0.2, lr_unit="relative", weight_decay=1e-3),
    )
    assert target.probability_after > target.probability_before


def test_the_same_search_gives_the_same_bits() -> None:
    model = tiny_model("gpt2")
    options: Any = {
        "site": model.family.mlp(0),
        "contexts": CONTEXTS,
        "settings": settings(steps=5),
    }
    for one, other in zip(
        search_targets(model, requests(2), **options),
        search_targets(model, requests(2), **options),
        strict=True,
    ):
        assert torch.equal(one.delta_O, other.delta_O)
        assert one.loss == other.loss


def test_half_precision_is_searched_in_float32() -> None:
    model = tiny_model("llama", dtype="bfloat16")
    target = search_target(
        model, request(), site=model.family.mlp(1), contexts=CONTEXTS, settings=settings(steps=5)
    )
    assert target.delta_O.dtype == target.initial_O.dtype == torch.float32
    assert math.isfinite(target.loss)


def test_a_broken_network_gives_a_result_and_no_exception() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[2].mlp.c_proj.weight.fill_(math.nan)
    target = search_target(
        model, request(), site=model.family.mlp(1), contexts=CONTEXTS, settings=settings()
    )
    assert target.nonfinite
    assert target.updates == 0


def test_a_broken_site_gives_a_result_and_no_exception() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[0].mlp.c_proj.weight.fill_(math.inf)
    target: Target = search_target(
        model,
        request(),
        site=model.family.mlp(1),
        contexts=CONTEXTS,
        settings=settings(lr_unit="relative"),
    )
    assert target.nonfinite


def test_a_request_without_target_is_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match="target"):
        search_target(
            model,
            dataclasses.replace(request(), target=" "),
            site=model.family.mlp(1),
            contexts=CONTEXTS,
            settings=settings(),
        )


@pytest.mark.parametrize("place", ["mlp", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_with_a_cached_suffix_equals_the_plain_one_up_to_rounding(
    kind: Kind, place: str
) -> None:
    for dtype, in_loss, in_delta in (
        ("float32", 1e-5, 1e-4),
        ("float64", 1e-9, 1e-7 if kind == "gptj" else 1e-9),
    ):
        model = tiny_model(kind, dtype=dtype)
        site = getattr(model.family, place)(1)
        target = [
            search_target(
                model,
                request(0),
                site=site,
                contexts=("{}", "So it is. {}"),
                settings=settings(exact=exact, steps=12),
            )
            for exact in (True, False)
        ]
        plain, cached = target
        assert plain.updates == cached.updates == 11
        assert cached.loss == pytest.approx(plain.loss, rel=in_loss)
        assert torch.linalg.norm(cached.delta_O - plain.delta_O) <= in_delta * torch.linalg.norm(
            plain.delta_O
        )


def test_a_site_behind_a_norm_is_searched_from_the_block_before_it() -> None:
    model = tiny_model("llama")
    sequences = prepare(model, request(0), ("{}",), kl_position="prompt_end")
    assert suffix_layer(model, model.family.mlp(2), sequences) == 2
    assert suffix_layer(model, model.family.down_projection(2), sequences) == 1
    assert suffix_layer(model, model.network.base_model_prefix, sequences) is None
    # As in Gemma 2, which has a norm in between.
    model.family = dataclasses.replace(model.family, adds_mlp_output=False)
    assert suffix_layer(model, model.family.mlp(2), sequences) == 1
    assert suffix_layer(model, model.family.mlp(0), sequences) is None
    assert suffix_layer(model, model.family.block(2), sequences) == 2
