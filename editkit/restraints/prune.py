"""PRUNE: the singular values of the total are reduced where they exceed the largest singular value
of the unedited matrix.

Ma et al. 2024, "Perturbation-Restrained Sequential Model Editing" (arXiv 2405.16821). With
D = W_N - W_0 = U S V^T and s = sigma_max(W_0), every S_i >= s becomes F(S_i). The evaluated model
has W_0 + U F(S) V^T:

    log      F(S) = log_alpha(S) + s - log_alpha(s)
    linear   F(S) = S / 2 + s / 2

Both are continuous at s. The authors' code offers both, and alpha in {e, 2, 1.5, 1.2}. Only
triplets above s change: the correction sum_i (F(S_i) - S_i) u_i v_i^T has their number as its rank
and is computed from the factors of D. The authors compute four full singular value decompositions
a matrix.

Differs from the authors' code (edit_load.py): F has slope 1 / (s ln alpha) at s, so for
s < 1 / ln alpha it enlarges singular values. Their code does so silently; here it is an error
unless `allow_amplify`. And D keeps the singular values that their code drops as numerically zero.

Shape letters: O d_out, I d_in, K number of singular triplets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total
from editkit.restraints.base import AbstractTotalRestraint

Function = Literal["log", "linear"]
ApplyAt = Literal["evaluation", "end", "every"]


@dataclass(frozen=True, kw_only=True)
class Prune(AbstractTotalRestraint):
    """Restrains the total of each matrix. `alpha` is the base of the logarithm; `linear` has none.

    Raises:
        OptionError: an option is out of range.
    """

    function: Function
    alpha: float
    apply_at: ApplyAt
    every: int | None  # steps, with apply_at=every
    allow_amplify: bool

    def __post_init__(self) -> None:
        problems = []
        for name, kinds in {"function": Function, "apply_at": ApplyAt}.items():
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(get_args(kinds))
                problems.append(
                    message(name, "unknown choice", got=getattr(self, name), expected=allowed)
                )
        if not (math.isfinite(self.alpha) and self.alpha > 1):
            expected = "above 1, as a base of the logarithm; the paper's: 1.2, 1.5, 2, e"
            problems.append(message("alpha", "out of range", got=self.alpha, expected=expected))
        if self.apply_at == "every" and (self.every is None or self.every < 1):
            expected = "a number of steps, at least 1, with apply_at=every"
            problems.append(message("every", "out of range", got=self.every, expected=expected))
        if self.apply_at != "every" and self.every is not None:
            problem = f"has no effect with apply_at={self.apply_at}"
            fix = "set every=null or apply_at=every"
            problems.append(message("every", problem, got=self.every, fix=fix))
        if problems:
            raise OptionError(problems)

    def check(self, base_sigma_max: Mapping[str, float]) -> list[str]:
        """The matrices on which F would enlarge singular values or has no value."""
        found = (self._problem(module, sigma) for module, sigma in base_sigma_max.items())
        return [problem for problem in found if problem is not None]

    def correction(self, total: Total, base_sigma_max: float) -> LowRank | None:
        """The low-rank correction that turns the total D into F(D), in float64; None if no singular
        value exceeds sigma_max(W_0).

        A total that is not finite has no singular values and stays as it is.
        """
        if total.is_zero or not total.is_finite():
            return None
        u_OK, s_K, v_IK = total.svd()
        exceeding = int(
            (s_K > base_sigma_max).sum()
        )  # descending; F(s) = s, so equality needs no correction
        if exceeding == 0:
            return None
        values_K = s_K[:exceeding]
        return LowRank(
            u_OK[:, :exceeding] * (self.restrained(values_K, base_sigma_max) - values_K),
            v_IK[:, :exceeding].contiguous(),
        )

    def restrained(self, values_K: torch.Tensor, base_sigma_max: float) -> torch.Tensor:
        """F of singular values that are at least sigma_max(W_0)."""
        if self.function == "linear":
            return (values_K + base_sigma_max) / 2
        return torch.log(values_K / base_sigma_max) / math.log(self.alpha) + base_sigma_max

    def _problem(self, module: str, sigma: float) -> str | None:
        if self.function == "linear":
            return None
        if not sigma > 0:
            problem = f"the logarithm needs sigma_max(W_0) > 0, and {module} has {sigma}"
            return message("function", problem, fix="use function=linear")
        limit = 1 / math.log(self.alpha)
        if sigma >= limit or self.allow_amplify:
            return None
        return message(
            "alpha",
            f"F would enlarge singular values of {module}, as sigma_max(W_0) = {sigma:.4g} is "
            f"below 1/ln(alpha) = {limit:.4g}",
            got=self.alpha,
            expected=f"at least {math.exp(1 / sigma):.4g}",
            fix="raise alpha, or set function=linear or allow_amplify=true",
        )
