"""EAC: the target vector differs from the model's own value in a few coordinates only, the editing
anchors.

Xu et al. 2025, "Constraining Sequential Model Editing with Editing Anchor Compression" (arXiv
2503.00035, Findings of NAACL 2025). Two descents over the loss of each search
(`editkit.targets.search`):

    search     all of delta is free. From the gradients g_t, the saliency of each coordinate is
               s = |mean_t(g_t) * delta|
    anchors    the coordinates whose score is at or above the `gamma`-th percentile (Eq. 2)
    retrain    delta is free at the anchors and zero elsewhere. A scored elastic net is added to the
               loss: l1 * sum_i |delta_i| / (s_i + epsilon) + l2 * |delta|^2
               (Eqs. 4 to 6; lambda and mu in the paper)

Differs from the paper's formulas, as the authors' code does:

    Eq. 1      the score there is v* times the gradient. Here it is delta, v* = v + delta: what the
               search has added, not what the model's own value v was before.
    Eq. 1      the gradient there has no step. Here it is the mean over the steps of the search.
    Eq. 3      a coordinate that is no anchor is 0 there. Here its delta is 0: it keeps the model's
               own value, and the update leaves its row alone.
    Eq. 4      the elastic net there is of z, the whole vector. Here it is of delta.

The paper chooses gamma for every editor, model and dataset so that single edits survive
(appendix A). conf/restraint_recipe/eac holds its values (Table 2, and mu from appendix C.5) and
those of the bundled models. Without `source`, which a recipe sets, a run warns.

`l2_unit: relative` makes the last term l2 * |delta|^2 / |v|^2. Differs from the paper as its
formula stands: its values of mu are those of `v_weight_decay` in the editors' files, which is
divided by |v|^2 in published code. Without that, 0.5 * |delta|^2 outweighs the rest of the loss a
hundredfold where |delta| is a few tens, and the edit is lost.

ROME's update therefore differs from that of delta = 0 in the anchors' rows of the matrix alone, and
MEMIT's first layer writes no other rows. Steps count evaluations of the loss, as in a plain search:
10 + 10 steps are 20 forward and 19 backward passes, 10 of them in the first descent, the same as
`target.steps` = 20. The editor's own `target.steps` is not used.

`variant: published_code` follows the authors' code. It fixes the numbers and has no l2. Its two
programs differ:

    ROME     20 % of the coordinates; retraining starts from delta at the anchors; the l1 term is
             computed and displayed, but not added
    MEMIT    5 % of the coordinates; retraining starts from zero and takes 15 updates; the l1 term
             is added

It updates after every loss, so 10 + 10 and 10 + 15 times. Here one more forward pass measures the
loss at the end.

Shape letters: N requests, K the requests that are still optimised, O width of the target vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.restraints.base import AbstractObjectiveRestraint

if TYPE_CHECKING:
    from editkit.targets.descent import Descent, Penalty, TargetProblem
    from editkit.targets.objective import Site

Variant = Literal["paper", "published_code"]
Unit = Literal["absolute", "relative"]
Selector = Literal["saliency", "gradient", "magnitude", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The numbers of a search for a target vector of some size."""

    updates_search: int
    num_anchors: int
    updates_retrain: int
    from_zero: bool  # retraining starts there, else from delta at the anchors
    l1: float
    l2: float


@dataclass(frozen=True, kw_only=True)
class Eac(AbstractObjectiveRestraint):
    """Restrains the target vector to its anchors. `conf/restraint/eac.yaml` documents the options.

    Raises:
        OptionError: an option is out of range.
    """

    variant: Variant
    gamma: float  # percentile
    l1: float
    l2: float
    l2_unit: Unit
    epsilon: float
    steps_search: int  # evaluations of the loss, each followed by an update
    steps_retrain: int  # evaluations of the loss; one update fewer
    selector: Selector
    saliency: bool
    elastic_net: bool
    seed: int
    source: str | None = None  # where gamma comes from; None: no recipe has set it

    def __post_init__(self) -> None:
        problems = []
        for name, kinds in {"variant": Variant, "l2_unit": Unit, "selector": Selector}.items():
            if getattr(self, name) not in get_args(kinds):
                allowed = ", ".join(get_args(kinds))
                problems.append(
                    message(name, "unknown choice", got=getattr(self, name), expected=allowed)
                )
        if not 0 <= self.gamma < 100:
            expected = "a percentile, 0 to below 100; 80 keeps the top 20 %"
            problems.append(message("gamma", "out of range", got=self.gamma, expected=expected))
        for name in ("l1", "l2"):
            if not 0 <= getattr(self, name) < math.inf:
                got = getattr(self, name)
                problems.append(message(name, "out of range", got=got, expected="0 or more"))
        if not 0 < self.epsilon < math.inf:
            expected = "a positive number, as a saliency may be 0; published: 1e-6"
            problems.append(message("epsilon", "out of range", got=self.epsilon, expected=expected))
        for name, fewest in {"steps_search": 1, "steps_retrain": 2}.items():
            if getattr(self, name) < fewest:
                got, expected = getattr(self, name), f"{fewest} or more, so that delta moves"
                problems.append(message(name, "out of range", got=got, expected=expected))
        if not self.saliency and self.selector != "saliency":
            problem = "has no effect with saliency=false, which frees every coordinate"
            problems.append(message("selector", problem, got=self.selector))
        if problems:
            raise OptionError(problems)

    def warnings(self) -> list[str]:
        if self.source is not None or self.variant != "paper" or not self.saliency:
            return []
        return [
            f"EAC has no recipe for this editor, model and dataset: gamma {self.gamma:g} may cost "
            "single edits. Measure them (setting=single), then set restraint.eac.gamma, and "
            "restraint.eac.source to where it comes from."
        ]

    def search(self, problem: TargetProblem, *, request_ids: Sequence[str], site: Site) -> Descent:
        """Both descents. A request whose delta never moved in the first descent, or whose loss was
        not finite there, keeps the first one's result.
        """
        numbers = self.numbers(problem.initial_NO.shape[1], site)
        first = problem.descend(updates=numbers.updates_search, final_loss=False)
        anchors_NO = top(self.scores(first, request_ids), numbers.num_anchors)
        return problem.descend(
            updates=numbers.updates_retrain,
            after=first,
            among_N=first.is_finite_N & (first.updates_N > 0),
            start_NO=torch.zeros_like(first.delta_NO)
            if numbers.from_zero
            else first.delta_NO.masked_fill(~anchors_NO, 0.0),
            free_NO=anchors_NO,
            penalty=self.penalty(first, numbers, problem.initial_NO) if self.elastic_net else None,
        )

    def numbers(self, size: int, site: Site) -> Numbers:
        """For a target vector of that size; the authors' ROME searches at an MLP, their MEMIT at a
        block.
        """
        num_anchors = {
            "paper": size - math.floor(size * self.gamma / 100),
            "published_code": size // (5 if site == "mlp" else 20),
        }
        is_paper = self.variant == "paper"
        restarts = site == "block" and not is_paper
        return Numbers(
            updates_search=self.steps_search if is_paper else 10,
            num_anchors=max(num_anchors[self.variant], 1) if self.saliency else size,
            updates_retrain=self.steps_retrain - 1 if is_paper else (15 if restarts else 10),
            from_zero=restarts,
            l1=self.l1 if is_paper or restarts else 0.0,
            l2=self.l2 if is_paper else 0.0,
        )

    def scores(self, first: Descent, request_ids: Sequence[str]) -> torch.Tensor:
        """What the anchors are chosen by, (N, O)."""
        if self.selector == "random":
            rows = []
            for request_id in request_ids:
                digest = hashlib.sha256(f"{self.seed}/{request_id}".encode()).digest()
                generator = torch.Generator().manual_seed(
                    int.from_bytes(digest[:4], "big")
                )  # of its own: nothing global is drawn from
                rows.append(torch.rand(first.delta_NO.shape[1], generator=generator))
            return torch.stack(rows).to(first.delta_NO.device)
        chosen = {
            "saliency": saliency(first),
            "gradient": first.mean_gradient_NO.abs(),
            "magnitude": first.delta_NO.abs(),
        }
        return chosen[self.selector]

    def penalty(self, first: Descent, numbers: Numbers, initial_NO: torch.Tensor) -> Penalty:
        """The scored elastic net, of the deltas of some requests. Its weights are the saliency's
        whatever chose the anchors, and 1 with saliency=false.
        """
        weights_NO = (
            1 / (saliency(first) + self.epsilon)
            if self.saliency
            else torch.ones_like(first.delta_NO)
        )
        unit_N = (
            initial_NO.square().sum(dim=1)
            if self.l2_unit == "relative"
            else torch.ones_like(first.loss_N)
        )

        def net(delta_KO: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
            l1_K = (weights_NO[ids_K] * delta_KO.abs()).sum(dim=1)
            return numbers.l1 * l1_K + numbers.l2 * delta_KO.square().sum(dim=1) / unit_N[ids_K]

        return net


def saliency(first: Descent) -> torch.Tensor:
    """|mean gradient * delta|, (N, O): how much of the loss a coordinate has to do with, to first
    order.
    """
    return (first.mean_gradient_NO * first.delta_NO).abs()


def top(scores_NO: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest scores of each row; among equals, at the first."""
    order_NO = scores_NO.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores_NO, dtype=torch.bool).scatter(-1, order_NO[..., :count], True)
