"""The protocol `distribution`: the change of next-token distributions at answers that must stay.

Every position of an answer that must stay (teacher forcing) is compared with the unedited model's
distribution, frozen at step 0:

    locality_probability   min(1, P_edited / P_base) of the unedited model's most probable token
    locality_top<k>        the share of the unedited model's k most probable tokens that are still
                           among the k most probable ones
    locality_kl_nats       KL(base || edited) over the `kept` most probable tokens of the unedited
                           model, with all others as one more outcome

The last is a lower bound of the full divergence. They are equal if `kept` is the vocabulary's
size. Its records say so in `variant` ("top64+rest"). Freezing whole distributions would take 1.5 GB
for 1,000 requests of CounterFact under GPT-2, 64 tokens take 8 MB. A prompt's number is the mean
over its answer's positions. With no edit the first two are exactly 1 and the last exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from editkit.errors import OptionError, message
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Frozen,
    Kind,
    Questions,
    Verdicts,
    tallies,
)
from editkit.evaluation.scoring.teacher_forcing import DistributionRequest, NextTokens, Score
from editkit.evaluation.statistics.tally import Outcome
from editkit.lazy import torch
from editkit.types import Probe

LEAST = 1e-12  # of the probability of all other tokens, which is a difference of rounded numbers


@dataclass(frozen=True, kw_only=True)
class Distribution(AbstractProtocol):
    """Divergences from the unedited model."""

    name: ClassVar[str] = "distribution"
    frozen: ClassVar[tuple[str, ...]] = ("top", "log_probs", "sizes")

    top_k: int = 5
    kept: int = 64  # tokens whose probabilities are frozen at each position

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.kept:
            expected = f"1 to kept={self.kept}"
            raise OptionError(message("top_k", "out of range", got=self.top_k, expected=expected))

    def probes(self, questions: Questions) -> tuple[Probe, ...]:
        return questions.unchanged_probes

    def distributions(
        self, batch: Sequence[Questions], frozen: Sequence[Frozen] | None
    ) -> DistributionRequest | None:
        if frozen is None:
            probes = [probe for questions in batch for probe in questions.unchanged_probes]
            return DistributionRequest(top=self.kept, probes=dict.fromkeys(probes))
        ids: dict[Probe, torch.Tensor | None] = {}
        for questions, tensors in zip(batch, frozen, strict=True):
            parts = tensors["top"].split(tensors["sizes"].tolist())
            ids |= dict(zip(questions.unchanged_probes, parts, strict=True))
        return DistributionRequest(top=self.top_k, probes=ids)

    def freeze(self, questions: Questions, answers: Answers) -> Frozen:
        """Ids int32 and log-probabilities float32, (positions, kept), of all answers one after
        another, and the number of positions of each answer.
        """
        distributions = [
            _distribution(answers.scores[probe]) for probe in questions.unchanged_probes
        ]
        if not distributions:
            return {
                "top": torch.empty(0, 0, dtype=torch.int32),
                "log_probs": torch.empty(0, 0),
                "sizes": torch.empty(0, dtype=torch.int32),
            }
        return {
            "top": torch.cat([tokens.top_MK for tokens in distributions]),
            "log_probs": torch.cat([tokens.top_log_probs_MK for tokens in distributions]),
            "sizes": torch.tensor(
                [len(tokens.top_MK) for tokens in distributions], dtype=torch.int32
            ),
        }

    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        pairs = zip(batch, frozen, strict=True)
        return Verdicts(
            tallies(self.name, [dict(self._outcomes(*pair, answers)) for pair in pairs])
        )

    def variant(self, metric: str) -> str | None:
        """Which outcomes a divergence is taken over."""
        return f"top{self.kept}+rest" if metric.endswith("_kl_nats") else None

    def _outcomes(
        self, questions: Questions, frozen: Frozen, answers: Answers
    ) -> Iterator[tuple[Kind, list[Outcome]]]:
        sizes = frozen["sizes"].tolist()
        before = zip(frozen["top"].split(sizes), frozen["log_probs"].split(sizes), strict=True)
        compared = {
            probe: self._compare(answers.scores[probe], *tensors)
            for probe, tensors in zip(questions.unchanged_probes, before, strict=True)
        }
        for (metric, task), probes in questions.unchanged.items():
            for name in ("probability", f"top{self.top_k}", "kl_nats"):
                yield (f"{metric}_{name}", task), [compared[probe][name] for probe in probes]

    def _compare(
        self, score: Score, base_MK: torch.Tensor, base_log_probs_MK: torch.Tensor
    ) -> dict[str, Outcome]:
        now = _distribution(score)
        # The unedited model is compared with itself when it is frozen. Its most probable tokens are
        # then the frozen ones.
        requested_MK = now.requested_log_probs_MK
        log_probs_MK = (now.top_log_probs_MK if requested_MK is None else requested_MK).double()
        frozen_MK = base_log_probs_MK.double()
        is_finite = score.is_finite and bool(torch.isfinite(log_probs_MK).all())
        if not is_finite:
            failed = Outcome(0.0, is_finite=False)
            return {
                "probability": failed,
                f"top{self.top_k}": failed,
                "kl_nats": Outcome(math.nan, is_finite=False),
            }
        ratio_M = (log_probs_MK[:, 0] - frozen_MK[:, 0]).exp().clamp(max=1.0)
        k = min(self.top_k, base_MK.shape[1])
        common_M = (now.top_MK[:, :k, None] == base_MK[:, None, :k]).any(-1).double().mean(-1)
        rest_M, frozen_rest_M = (
            (1 - values.exp().sum(-1)).clamp(min=LEAST) for values in (log_probs_MK, frozen_MK)
        )
        divergence_M = (frozen_MK.exp() * (frozen_MK - log_probs_MK)).sum(-1) + frozen_rest_M * (
            frozen_rest_M / rest_M
        ).log()
        return {
            "probability": Outcome(float(ratio_M.mean())),
            f"top{self.top_k}": Outcome(float(common_M.mean())),
            "kl_nats": Outcome(max(0.0, float(divergence_M.mean()))),
        }


def _distribution(score: Score) -> NextTokens:
    assert score.next_tokens is not None, "not requested"
    return score.next_tokens
