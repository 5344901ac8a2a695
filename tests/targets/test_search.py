"""The search for a target vector: its loss is the published one, its steps are counted as
published, and it reads the model only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.capture import add_to_output, capture
from editkit.model.editable import EditableModel
from editkit.model.logits import divergence
from editkit.model.tokens import pad
from editkit.targets.descent import Seen, TargetProblem
from editkit.targets.forwards import continued_layer, plain_forward, site_outputs
from editkit.targets.search import Target, search_target, search_targets, targets_of
from editkit.targets.sequences import prepare
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model

CONTEXTS = ("{}", "The capital. {}", "She was born in Bordeaux, and the guitar is in Rome. {}")


def settings(**changes: Any) -> TargetSettings:
    values: dict[str, Any] = {
        "steps": 20,
        "lr": 0.5,
        "lr_unit": "absolute",
        "weight_decay": 0.5,
        "clamp": 4.0,
        "kl_factor": 0.0625,
        "kl_position": "subject_last",
        "stop_loss": 0.05,
        "exact": False,
    }
    return TargetSettings(**values | changes)


class Alone:
    """A `Forward` of one request, from a function of its delta alone."""

    def __init__(
        self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.forward = forward

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> Seen:
        log_p_C, log_p_V = self.forward(delta_NO[0])
        before_NV = log_p_V.detach()[None] if before_NV is None else before_NV
        return Seen(log_p_C[None], divergence(log_p_V[None], before_NV), log_p_V[None])

    def only(self, kept: Sequence[int]) -> Alone:
        assert list(kept) == [0]
        return self


def optimise(forward: Any, initial_O: torch.Tensor, chosen: TargetSettings) -> Target:
    """The search of one request in one descent, over a function of its delta."""
    problem = TargetProblem(forward=Alone(forward), initial_NO=initial_O[None], settings=chosen)
    [found] = targets_of(problem, problem.descend(updates=chosen.steps - 1))
    return found


class Toy:
    """A function of delta of known form: log-probability -|delta - goal|^2 / 2, an unmoved
    distribution; remembers the deltas.
    """

    def __init__(self, *goal: float) -> None:
        self.goal_O = torch.tensor(goal)
        self.deltas: list[torch.Tensor] = []

    def __call__(self, delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.deltas.append(delta_O.detach().clone())
        log_p = -(delta_O - self.goal_O).square().sum() / 2
        return torch.stack([log_p, 3 * log_p]), torch.log_softmax(torch.zeros(5), dim=0)


# The minimisation


@pytest.mark.parametrize("steps", [1, 2, 20, 25])
def test_adam_moves_once_less_than_there_are_steps(steps: int) -> None:
    toy = Toy(50.0, 0.0)
    found = optimise(toy, torch.tensor([100.0, 0.0]), settings(steps=steps))
    assert found.updates == steps - 1
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


def test_the_loss_at_the_answer_is_the_one_that_is_told() -> None:
    toy, initial_O = Toy(3.0, 4.0), torch.tensor([0.0, 2.0])
    found = optimise(toy, initial_O, settings(steps=5))
    distance_squared = float((found.delta_O - toy.goal_O).square().sum())
    # Two contexts, the second three times as hard; |delta| / |v|^2 with the first not squared; the
    # toy's KL is 0.
    assert found.loss == pytest.approx(
        distance_squared + 0.5 * float(found.delta_O.norm()) / 4.0, rel=1e-6
    )
    assert found.probability_before == pytest.approx(math.exp(-25 / 2), rel=1e-5)
    assert found.probability_after == pytest.approx(math.exp(-distance_squared / 2), rel=1e-5)
    torch.testing.assert_close(found.delta_O, toy.deltas[-1])


def test_the_search_stops_below_the_stop_loss_without_another_step() -> None:
    toy = Toy(1.0)
    found = optimise(toy, torch.tensor([100.0]), settings(steps=200, weight_decay=0.0))
    assert found.loss < 0.05
    assert found.updates == len(toy.deltas) - 1 < 199
    assert float((toy.deltas[-2] - 1.0).square()) >= 0.05


def test_no_step_leaves_the_clamp() -> None:
    toy = Toy(50.0, 20.0)
    found = optimise(toy, torch.tensor([3.0, 4.0]), settings(lr=2.0, clamp=0.75))
    assert all(float(delta.norm()) <= 0.75 * 5.0 * (1 + 1e-6) for delta in toy.deltas)
    assert float(found.delta_O.norm()) == pytest.approx(0.75 * 5.0, rel=1e-5)


def test_the_divergence_is_of_the_moved_distribution_from_the_first() -> None:
    logits_V = torch.tensor([1.0, 0.0, -1.0])

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (delta_O[0] - delta_O[1])[None] * 0.1 - 1.0, torch.log_softmax(
            logits_V + delta_O, dim=0
        )

    found = optimise(
        forward, torch.tensor([9.0, 0.0, 0.0]), settings(steps=3, kl_factor=2.0, weight_decay=0.0)
    )
    first_V, moved_V = logits_V.softmax(dim=0), (logits_V + found.delta_O).softmax(dim=0)
    kl = float((moved_V * (moved_V / first_V).log()).sum())
    assert kl > 0
    assert found.loss == pytest.approx(
        1.0 - 0.1 * float(found.delta_O[0] - found.delta_O[1]) + 2.0 * kl, rel=1e-5
    )


def test_a_loss_that_is_not_finite_is_told_and_ends_the_search() -> None:
    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = -1.0 + delta_O.sum() if not delta_O.any() else delta_O.sum() * math.nan
        return log_p[None], torch.zeros(1)

    found = optimise(forward, torch.ones(2), settings())
    assert found.nonfinite
    assert math.isnan(found.loss)
    assert found.updates == 1
    assert bool(found.delta_O.isfinite().all())


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"lr": 0.0}, {"clamp": -1.0}, {"weight_decay": -0.5}, {"kl_factor": math.nan}],
)
def test_numbers_that_make_no_search_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(bad))}"):
        settings(**bad)


# The network's part


def decode(model: EditableModel, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(list(ids), skip_special_tokens=True))


def subject_at_the_end() -> EditRequest:
    """And a target of one token: in a network with random weights, nothing further off listens to
    the subject.
    """
    return dataclasses.replace(request(), prompt="The mother tongue of {}", target="Paris")


def textbook_loss(
    model: Any,
    asked: Any,
    site: str,
    delta_O: torch.Tensor,
    initial_O: torch.Tensor,
    chosen: TargetSettings,
) -> float:
    """The loss from the logits of all positions, one unpadded sequence after another."""

    def log_p(ids: tuple[int, ...], position: int, delta_O: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), add_to_output(model, site, torch.tensor([position]), delta_O):
            return model.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)

    sequences = prepare(model, asked, CONTEXTS, kl_position=chosen.kl_position)
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
    for asked in requests():
        site = model.family.mlp(1)
        found = search_target(model, asked, site=site, contexts=CONTEXTS, settings=chosen)
        assert found.loss == pytest.approx(
            textbook_loss(model, asked, site, found.delta_O, found.initial_O, chosen), rel=2e-5
        )


def test_the_divergence_is_taken_where_it_was_asked_for() -> None:
    model, asked = tiny_model("gpt2"), request()
    text = f"{asked.subject} is a"
    pieces = [decode(model, [token]) for token in model.tokenizer(text)["input_ids"]]
    at_subject = prepare(model, asked, CONTEXTS, kl_position="subject_last")
    at_end = prepare(model, asked, CONTEXTS, kl_position="prompt_end")
    assert "".join(pieces[: at_subject.kl_position + 1]) == asked.subject
    assert at_subject.kl_position == at_subject.sites[-1]
    assert at_end.kl_position == len(pieces) - 1 == len(at_end.ids[-1]) - 1
    assert at_end.sites == at_subject.sites  # delta stays at the subject either way


def test_the_divergence_at_the_subject_and_at_the_end_give_different_targets() -> None:
    model = tiny_model("gpt2")
    found = [
        search_target(
            model,
            request(),
            site=model.family.mlp(1),
            contexts=CONTEXTS,
            settings=settings(kl_position=position, kl_factor=5.0, steps=6),
        )
        for position in ("subject_last", "prompt_end")
    ]
    assert not torch.equal(found[0].delta_O, found[1].delta_O)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_end_before_the_last_target_token_and_delta_sits_on_the_subject(
    kind: Kind, bos: bool
) -> None:
    model = tiny_model(kind, bos=bos)
    for asked in requests():
        sequences = prepare(model, asked, CONTEXTS, kl_position="subject_last")
        for row, context in enumerate(CONTEXTS):
            text = context.replace("{}", asked.full_prompt)
            ids, target = sequences.ids[row], sequences.targets[row]
            assert (ids[0] == model.tokenizer.bos_token_id) == bos
            assert model.tokenizer.bos_token_id not in target
            assert decode(model, [*ids, target[-1]]).strip() == f"{text} {asked.target}"
            assert list(sequences.predicting[row]) == list(range(len(ids) - len(target), len(ids)))
            before, upto = (
                decode(model, ids[: sequences.sites[row] + extra]).strip() for extra in (0, 1)
            )
            wanted = text[: text.index(asked.subject) + len(asked.subject)]
            assert upto.startswith(
                wanted
            )  # a token may hold what follows the subject as well: "Apple's"
            assert not before.startswith(wanted)


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
    found = search_target(
        model,
        subject_at_the_end(),
        site=model.family.mlp(1),
        contexts=CONTEXTS,
        settings=settings(clamp=20.0),
    )
    assert (
        found.probability_after > 20 * found.probability_before
    )  # the norm before the head leaves random weights no more than 0.2
    assert not found.nonfinite
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_initial_output_is_that_of_the_clean_prompt(kind: Kind) -> None:
    model, asked = tiny_model(kind), request()
    sequences = prepare(model, asked, CONTEXTS, kl_position="subject_last")
    site = model.family.mlp(2)
    batch = pad([model.tokenizer(asked.full_prompt)["input_ids"]])
    with torch.no_grad(), capture(model, outputs=[site]) as captured:
        model.final_hidden(batch)
    wanted_O = captured.outputs[site][0, sequences.sites[0]]
    torch.testing.assert_close(
        site_outputs(model, site, [sequences])[0], wanted_O, rtol=1e-6, atol=1e-6
    )
    found = search_target(model, asked, site=site, contexts=CONTEXTS, settings=settings(steps=1))
    torch.testing.assert_close(found.initial_O, wanted_O, rtol=1e-5, atol=1e-5)


def test_any_module_can_be_the_site() -> None:
    model = tiny_model("llama")
    found = search_target(
        model,
        request(),
        site=model.family.block(1),
        contexts=CONTEXTS,
        settings=settings(lr=0.2, lr_unit="relative", weight_decay=1e-3),
    )
    assert found.probability_after > found.probability_before


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
    found = search_target(
        model, request(), site=model.family.mlp(1), contexts=CONTEXTS, settings=settings(steps=5)
    )
    assert found.delta_O.dtype == found.initial_O.dtype == torch.float32
    assert math.isfinite(found.loss)


def test_a_broken_network_gives_a_result_and_no_exception() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[2].mlp.c_proj.weight.fill_(math.nan)
    found = search_target(
        model, request(), site=model.family.mlp(1), contexts=CONTEXTS, settings=settings()
    )
    assert found.nonfinite
    assert found.updates == 0


def test_a_broken_site_gives_a_result_and_no_exception() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[0].mlp.c_proj.weight.fill_(math.inf)
    found: Target = search_target(
        model,
        request(),
        site=model.family.mlp(1),
        contexts=CONTEXTS,
        settings=settings(lr_unit="relative"),
    )
    assert found.nonfinite


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
def test_the_continued_search_is_the_plain_one_to_rounding(kind: Kind, place: str) -> None:
    for dtype, in_loss, in_delta in (
        ("float32", 1e-5, 1e-4),
        ("float64", 1e-9, 1e-7 if kind == "gptj" else 1e-9),
    ):
        model = tiny_model(kind, dtype=dtype)
        site = getattr(model.family, place)(1)
        found = [
            search_target(
                model,
                request(0),
                site=site,
                contexts=("{}", "So it is. {}"),
                settings=settings(exact=exact, steps=12),
            )
            for exact in (True, False)
        ]
        plain, continued = found
        assert plain.updates == continued.updates == 11
        assert continued.loss == pytest.approx(plain.loss, rel=in_loss)
        assert torch.linalg.norm(continued.delta_O - plain.delta_O) <= in_delta * torch.linalg.norm(
            plain.delta_O
        )


def test_a_site_that_is_not_added_to_the_residual_stream_is_searched_the_plain_way() -> None:
    model = tiny_model("llama")
    sequences = prepare(model, request(0), ("{}",), kl_position="prompt_end")
    assert continued_layer(model, model.family.mlp(2), sequences) == 2
    assert continued_layer(model, model.family.down_projection(2), sequences) is None
    model.family = dataclasses.replace(
        model.family, adds_mlp_output=False
    )  # as in Gemma 2, which has a norm in between
    assert continued_layer(model, model.family.mlp(2), sequences) is None
    assert continued_layer(model, model.family.block(2), sequences) == 2
