"""Editing metrics: known scores give known numbers under every protocol of teacher forcing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from editkit.evaluation.editing import probes_of
from editkit.evaluation.protocols.argmax import Argmax
from editkit.evaluation.protocols.base import AbstractProtocol, Answers, Questions
from editkit.evaluation.protocols.probability import Probability
from editkit.evaluation.protocols.token import Token
from editkit.evaluation.scoring.teacher_forcing import Score
from editkit.evaluation.statistics.subsets import everything
from editkit.evaluation.statistics.tally import Estimate, Statistics
from editkit.records.means import harmonic_mean, mean_and_stderr
from editkit.types import EditRequest, Probe
from tests.support.measurements import request


def scored(*log_probs: float, greedy: bool = False) -> Score:
    tokens = tuple(range(len(log_probs)))
    return Score(tokens, log_probs, tokens if greedy else tuple(token + 1 for token in tokens))


Scores = Mapping[Probe, Score]


def assessed(
    protocol: AbstractProtocol,
    requests: Sequence[EditRequest],
    scores: Scores,
    frozen: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Estimate]:
    """The protocol's estimates by metric; `frozen` holds the unedited model's greedy tokens at the
    neighbours, by request.
    """
    baselines = [
        {"greedy": torch.tensor((frozen or {}).get(each.id, ()), dtype=torch.int32)}
        for each in requests
    ]
    verdicts = protocol.assess(
        [Questions(each, with_attributes=True) for each in requests], Answers(scores, {}), baselines
    )
    found = list(everything(verdicts.judged, Statistics()))
    assert all(each.metric.protocol == protocol.name for each in found)
    return {each.metric.name: each.estimate for each in found if each.metric.task is None}


def measure_probability(requests: Sequence[EditRequest], scores: Scores) -> dict[str, Estimate]:
    return assessed(Probability(), requests, scores)


def measure_argmax(
    requests: Sequence[EditRequest], scores: Scores, frozen: Mapping[str, Sequence[int]]
) -> dict[str, Estimate]:
    return assessed(Argmax(), requests, scores, frozen)


def scores_of(
    requests: Sequence[EditRequest], default: Score, changes: dict[tuple[str, str], Score]
) -> Scores:
    """The default for all that is asked of the requests, but for the given (prompt, answer)
    pairs.
    """
    asked = [probe for each in requests for probe in probes_of(each, ("probability", "argmax"))]
    unknown = changes.keys() - {(probe.prompt, probe.answer) for probe in asked}
    assert not unknown, "not asked"
    return {probe: changes.get((probe.prompt, probe.answer), default) for probe in asked}


def test_probability_compares_length_normalised_probabilities() -> None:
    requests = [request("A"), request("B")]
    new, old = (
        scored(-1.0, -1.0, -1.0),
        scored(-1.5),
    )  # longer, so less probable as a whole, but more probable a token
    found = measure_probability(
        requests,
        scores_of(
            requests,
            scored(-4.0),  # ties are no success
            {
                ("A Ada is", "new"): new,
                ("A Ada is", "old"): old,
                ("A one", "new"): new,
                ("A near 0", "true"): new,
                ("B near 0", "true"): new,
                ("B near 1", "true"): new,
                ("B near 1", "new"): old,
            },
        ),
    )
    assert found["efficacy"].value == 0.5 and found["efficacy"].n == 2
    assert found["generalization"].value == 0.25  # one of two paraphrases of one of two requests
    assert found["locality"].value == 0.75
    assert found["score"].value == pytest.approx(3 / (1 / 0.5 + 1 / 0.25 + 1 / 0.75))
    assert found["efficacy_magnitude"].value == pytest.approx((math.exp(-1.0) - math.exp(-1.5)) / 2)
    assert found["locality"].stderr == pytest.approx(0.25)  # of the request means 0.5 and 1
    assert not any(estimate.nonfinite for estimate in found.values())


def test_argmax_wants_every_token_of_the_target() -> None:
    requests = [request("A"), request("B")]
    right, almost = scored(-1.0, -2.0, greedy=True), Score((1, 2, 3), (-0.1, -0.1, -0.1), (1, 2, 9))
    scores = scores_of(
        requests,
        almost,
        {
            ("A Ada is", "new"): right,
            ("A one", "new"): right,
            ("A two", "new"): right,
            ("B hop", "far"): right,
        },
    )
    frozen = {each.id: [1, 2, 9, 1, 2, 9] for each in requests}
    found = measure_argmax(requests, scores, frozen)
    assert {metric: measured.value for metric, measured in found.items()} == {
        "efficacy": 0.5,
        "generalization": 0.5,
        "locality": 1.0,
        "portability": 0.25,
    }


def test_argmax_locality_is_agreement_with_the_frozen_answer_and_not_correctness() -> None:
    requests = [request("A"), request("B", neighbours=3)]
    same, other = (
        Score((7, 8), (-1.0, -1.0), (1, 2)),
        Score((7, 8), (-1.0, -1.0), (7, 8)),
    )  # the second is even right
    changes = {("A near 0", "true"): other, ("B near 2", "true"): Score((7,), (-1.0,), (5,))}
    scores = scores_of(requests, same, changes)
    frozen = {"test/A": [1, 2, 1, 2], "test/B": [1, 2, 1, 2, 5]}
    assert measure_argmax(requests, scores, frozen)["locality"].value == pytest.approx(
        (0.5 + 1.0) / 2
    )
    with pytest.raises(AssertionError, match="other prompts"):
        measure_argmax(requests, scores, frozen | {"test/B": [1, 2, 1, 2, 5, 5]})


def test_what_is_not_finite_fails_and_is_counted_and_nothing_is_dropped() -> None:
    requests = [request("A"), request("B"), request("C")]
    bad, good = scored(math.nan, -1.0, greedy=True), scored(-0.5, greedy=True)
    changes = {
        ("A Ada is", "new"): bad,
        ("B one", "old"): bad,
        ("C near 0", "true"): bad,
        ("C near 1", "new"): bad,
    }
    changes |= {(f"{name} Ada is", "old"): scored(-9.0) for name in "ABC"}
    scores = scores_of(requests, good, changes)
    found = measure_probability(requests, scores)
    assert (found["efficacy"].value, found["efficacy"].n, found["efficacy"].nonfinite) == (
        pytest.approx(2 / 3),
        3,
        1,
    )
    assert (found["generalization"].value, found["generalization"].nonfinite) == (0.0, 1)
    assert (found["locality"].value, found["locality"].nonfinite) == (
        0.0,
        1,
    )  # both of C's neighbours, counted once
    assert (found["score"].value, found["score"].nonfinite) == (0.0, 1)
    assert (
        found["efficacy_magnitude"].value,
        found["efficacy_magnitude"].stderr,
        found["efficacy_magnitude"].n,
    ) == (None, None, 3)
    greedy = measure_argmax(
        requests,
        scores,
        {each.id: [0, 0] if each.id != "test/C" else [0, 1, 0] for each in requests},
    )
    assert (greedy["efficacy"].value, greedy["efficacy"].nonfinite) == (pytest.approx(2 / 3), 1)
    assert (greedy["locality"].value, greedy["locality"].nonfinite) == (pytest.approx(2.5 / 3), 1)


def test_requests_without_a_kind_of_prompt_do_not_count_for_its_metric() -> None:
    bare = request("A", target_old=None, paraphrases=(), neighbours=0, portability={})
    requests = [bare, request("B", paraphrases=("B one",), portability={"hop": ()})]
    scores = scores_of(requests, scored(-1.0, greedy=True), {})
    probability = measure_probability(requests, scores)
    assert {
        metric: measured.n for metric, measured in probability.items() if metric != "score"
    } == {
        "efficacy": 1,
        "generalization": 1,
        "locality": 1,
        "efficacy_magnitude": 1,
        "generalization_magnitude": 1,
        "locality_magnitude": 1,
    }
    argmax = measure_argmax(requests, scores, {"test/A": [], "test/B": [0, 0]})
    assert {metric: measured.n for metric, measured in argmax.items()} == {
        "efficacy": 2,
        "generalization": 1,
        "locality": 1,
    }
    assert measure_probability([bare], scores) == {} and measure_probability([], {}) == {}


def test_a_neighbour_whose_true_answer_is_the_target_is_not_compared_with_itself() -> None:
    each = request("A", neighbours=0)
    each = dataclasses.replace(
        each, neighbours=(Probe(prompt="x", answer="new"), Probe(prompt="y", answer="true"))
    )
    scores = scores_of([each], scored(-1.0), {("y", "true"): scored(-0.5)})
    assert measure_probability([each], scores)["locality"].value == 1.0


def test_means_errors_and_harmonic_means_are_the_textbooks() -> None:
    assert mean_and_stderr([0.0, 1.0, 1.0, 0.0]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    assert mean_and_stderr([0.25]) == (0.25, None)
    assert mean_and_stderr([0.25, math.nan]) == (None, None)
    assert harmonic_mean([0.5, 0.25]) == pytest.approx(1 / 3)
    assert harmonic_mean([0.5, 0.0]) == 0.0


def test_token_gives_each_token_its_share_where_argmax_wants_them_all() -> None:
    requests = [request("A", paraphrases=("A one",))]
    half = Score((1, 2, 3, 4), (-1.0,) * 4, (1, 9, 3, 9))
    scores = scores_of(
        requests,
        scored(-1.0, -1.0),
        {("A Ada is", "new"): half, ("A one", "new"): scored(-1.0, math.nan, greedy=True)},
    )
    frozen = {"test/A": [1, 2, 0, 2]}  # the neighbours' greedy tokens now are 1, 2 and 1, 2
    found = assessed(Token(), requests, scores, frozen)
    assert found["efficacy"].value == 0.5
    assert (found["generalization"].value, found["generalization"].nonfinite) == (0.0, 1)
    assert found["locality"].value == pytest.approx((1.0 + 0.5) / 2)
    assert measure_argmax(requests, scores, frozen)["efficacy"].value == 0.0
    assert measure_argmax(requests, scores, frozen)["locality"].value == 0.5


def test_attribute_prompts_and_hops_are_judged_apart() -> None:
    attribute, hop = (
        Probe(prompt="Bea is", answer="new"),
        Probe(prompt="the one of old is", answer="far"),
    )
    requests = [request("A", attribute_prompts=(attribute,), hops=(hop,), portability={})]
    old = Probe(prompt="Bea is", answer="old")
    scores = {
        **scores_of(requests, scored(-1.0), {}),
        attribute: scored(-0.5),
        old: scored(-3.0),
        hop: scored(-1.0, greedy=True),
    }
    assert measure_probability(requests, scores)["attribute"].value == 1.0
    found = measure_argmax(requests, scores, {"test/A": [1, 1]})
    assert (found["attribute"].value, found["hop"].value, "portability" in found) == (
        0.0,
        1.0,
        False,
    )
    assert attribute not in set(probes_of(requests[0], ("probability", "argmax"))), (
        "asked only if told to: they double the prompts"
    )


def test_kinds_of_prompts_are_told_apart_and_out_of_distribution_is_never_in_locality() -> None:
    near, far = Probe(prompt="B near", answer="true"), Probe(prompt="who sang x", answer="Ann")
    locality = {"forgetfulness": (near,), "out_of_distribution": (far,)}
    requests = [request("A", neighbours=1, locality=locality)]
    scores = scores_of(requests, scored(-1.0), {})
    questions = Questions(requests[0], with_attributes=False)
    assert questions.unchanged_probes == (*requests[0].neighbours, near, far)
    found = list(
        everything(
            Argmax()
            .assess([questions], Answers(scores, {}), [{"greedy": torch.tensor([1, 0, 0])}])
            .judged,
            Statistics(),
        )
    )
    values = {(each.metric.name, each.metric.task): each.estimate.value for each in found}
    assert values["locality", None] == 0.5
    assert (values["locality", "neighbours"], values["locality", "forgetfulness"]) == (1.0, 0.0)
    assert values["locality_out_of_distribution", None] == 0.0
    assert (values["portability", "alias"], values["portability", "hop"]) == (0.0, 0.0)
    assert ("efficacy", None) in values and ("locality", "out_of_distribution") not in values


def test_specificity_is_whether_the_true_answer_is_right_and_locality_whether_it_stayed() -> None:
    """An unedited model that does not know the answers: locality 1, specificity 0."""
    far = Probe(prompt="who sang x", answer="Ann")
    requests = [request("A", neighbours=1, locality={"out_of_distribution": (far,)})]
    scores = scores_of(requests, scored(-1.0), {})
    asked = Questions(requests[0], with_attributes=False, with_specificity=True)
    greedy = [token for probe in asked.unchanged_probes for token in scores[probe].greedy]
    frozen = {"greedy": torch.tensor(greedy)}
    for protocol in (Argmax(), Token()):
        judged = protocol.assess([asked], Answers(scores, {}), [frozen]).judged
        values = {metric.name: tallies[0].mean for metric, tallies in judged.items()}
        assert (values["locality"], values["specificity"]) == (1.0, 0.0)
        assert values["locality_out_of_distribution"] == 1.0
        assert values["specificity_out_of_distribution"] == 0.0
    knowing = scores | {far: scored(-0.1, greedy=True)}
    judged = Argmax().assess([asked], Answers(knowing, {}), [frozen]).judged
    values = {metric.name: tallies[0].mean for metric, tallies in judged.items()}
    assert values["specificity_out_of_distribution"] == 1.0
    plain = Questions(requests[0], with_attributes=False)
    assert not any("specificity" in metric for metric, _ in plain.expected)
