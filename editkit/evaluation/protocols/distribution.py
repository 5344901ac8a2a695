"""The protocol `distribution`: how far the next-token distributions have moved where nothing should
have changed.

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
    Frozen,
    Kind,
    Questions,
    Said,
    Verdicts,
    tallies,
)
from editkit.evaluation.scoring.teacher_forcing import Asks, NextTokens, Score
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

    def probes(self, asked: Questions) -> tuple[Probe, ...]:
        return asked.stays

    def closer_look(
        self, asked: Sequence[Questions], frozen: Sequence[Frozen] | None
    ) -> Asks | None:
        if frozen is None:
            return Asks(
                top=self.kept, probes={probe: None for each in asked for probe in each.stays}
            )
        ids: dict[Probe, torch.Tensor | None] = {}
        for each, baseline in zip(asked, frozen, strict=True):
            parts = baseline["top"].split(baseline["sizes"].tolist())
            ids |= dict(zip(each.stays, parts, strict=True))
        return Asks(top=self.top_k, probes=ids)

    def freeze(self, asked: Questions, said: Said) -> Frozen:
        """Ids int32 and log-probabilities float32, (positions, kept), one answer after another, and
        how many positions each has.
        """
        found = [_look(said.scores[probe]) for probe in asked.stays]
        if not found:
            return {
                "top": torch.empty(0, 0, dtype=torch.int32),
                "log_probs": torch.empty(0, 0),
                "sizes": torch.empty(0, dtype=torch.int32),
            }
        return {
            "top": torch.cat([each.top_MK for each in found]),
            "log_probs": torch.cat([each.top_log_probs_MK for each in found]),
            "sizes": torch.tensor([len(each.top_MK) for each in found], dtype=torch.int32),
        }

    def assess(self, asked: Sequence[Questions], said: Said, frozen: Sequence[Frozen]) -> Verdicts:
        return Verdicts(
            tallies(
                self.name,
                [dict(self._outcomes(*each, said)) for each in zip(asked, frozen, strict=True)],
            )
        )

    def variant(self, metric: str) -> str | None:
        """Which outcomes a divergence is taken over."""
        return f"top{self.kept}+rest" if metric.endswith("_kl_nats") else None

    def _outcomes(
        self, asked: Questions, frozen: Frozen, said: Said
    ) -> Iterator[tuple[Kind, list[Outcome]]]:
        sizes = frozen["sizes"].tolist()
        before = zip(frozen["top"].split(sizes), frozen["log_probs"].split(sizes), strict=True)
        found = {
            probe: self._compare(said.scores[probe], *each)
            for probe, each in zip(asked.stays, before, strict=True)
        }
        for (metric, task), probes in asked.kept.items():
            for name in ("probability", f"top{self.top_k}", "kl_nats"):
                yield (f"{metric}_{name}", task), [found[probe][name] for probe in probes]

    def _compare(
        self, score: Score, base_MK: torch.Tensor, base_log_probs_MK: torch.Tensor
    ) -> dict[str, Outcome]:
        now = _look(score)
        # The unedited model itself is compared with what was frozen of it: all it has is its own
        # most probable tokens.
        asked = (
            now.asked_log_probs_MK if now.asked_log_probs_MK is not None else now.top_log_probs_MK
        )
        log_probs_MK, frozen_MK = asked.double(), base_log_probs_MK.double()
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


def _look(score: Score) -> NextTokens:
    assert score.next_tokens is not None, "not asked for"
    return score.next_tokens
