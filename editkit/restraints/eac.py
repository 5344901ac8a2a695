"""EAC: a target vector that differs from the model's own in few coordinates only, the editing
anchors.

Xu et al. 2025, "Constraining Sequential Model Editing with Editing Anchor Compression" (arXiv
2503.00035, Findings of NAACL 2025). Two descents over the loss of every search
(`editkit.targets.search`):

    search     all of delta is free; from the gradients g_t on the way, each coordinate's saliency s = |mean_t(g_t) * delta|
    anchors    the coordinates whose score is at or above its `gamma`-th percentile
    retrain    delta is free at the anchors and zero elsewhere; a scored elastic net is added to the loss:
               l1 * sum_i |delta_i| / (s_i + epsilon) + l2 * |delta|^2                      lambda and mu in the paper

`l2_unit: relative` writes l2 * |delta|^2 / |v|^2 for the last term. Differs from the paper, as its
formula stands: its values of mu are those of `v_weight_decay` in the editors' files, which stands
over |v|^2 in published code; without that, 0.5 * |delta|^2 outweighs the rest of the loss a
hundredfold where |delta| is a few times ten, and takes the edit back.

So ROME's update differs from that of delta = 0 in the anchors' rows of the matrix alone, and
MEMIT's first layer writes no others. Steps are counted as in a plain search, by how often the loss
is taken: 10 + 10 steps are 20 passes forward and 19 back, 10 of them in the first descent, as
`target.steps` of 20 are. The editor's own `target.steps` has no say.

`variant: published_code` is what the authors' code does instead. It fixes the numbers, has no l2,
and its two programs differ:

    ROME     20 % of the coordinates; retraining goes on from delta at the anchors; the l1 term is computed and shown, but not added
    MEMIT    5 % of them; retraining starts from zero and takes 15 updates; the l1 term is added

It moves after every loss, so 10 + 10 and 10 + 15 times; here one more pass forward tells where that
ends.

Shape letters: N requests, K those of them that still go on, O width of the target vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from editkit.errors import OptionError
from editkit.lazy import torch
from editkit.restraints.base import AbstractObjectiveRestraint

if TYPE_CHECKING:
    from editkit.targets.descent import Descent, Penalty, TargetProblem

Variant = Literal["paper", "published_code"]
Unit = Literal["absolute", "relative"]
Selector = Literal["saliency", "gradient", "magnitude", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a search for a target vector of some size is made of."""

    updates_search: int
    num_anchors: int
    updates_retrain: int
    from_zero: bool  # retraining starts there, else from delta at the anchors
    l1: float
    l2: float


@dataclass(frozen=True, kw_only=True)
class Eac(AbstractObjectiveRestraint):
    """Restrains the target vector to its anchors; its options are those of
    `conf/restraint/eac.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    variant: Variant
    gamma: float  # percentile
    l1: float
    l2: float
    l2_unit: Unit
    epsilon: float
    steps_search: int  # how often the loss is taken, each time followed by an update
    steps_retrain: int  # how often the loss is taken; updates lie between, so one fewer
    selector: Selector
    saliency: bool
    elastic_net: bool
    seed: int

    def __post_init__(self) -> None:
        problems = []
        for name, kinds in {"variant": Variant, "l2_unit": Unit, "selector": Selector}.items():
            if getattr(self, name) not in get_args(kinds):
                problems.append(
                    f"{name}: there is no such - given {getattr(self, name)!r} - allowed: {', '.join(get_args(kinds))}"
                )
        if not 0 <= self.gamma < 100:
            problems.append(
                f"gamma: must be a percentile - given {self.gamma} - allowed: 0 to below 100; 80 keeps the top 20 %"
            )
        for name in ("l1", "l2"):
            if not 0 <= getattr(self, name) < math.inf:
                problems.append(
                    f"{name}: must be a weight - given {getattr(self, name)} - allowed: 0 or more"
                )
        if not 0 < self.epsilon < math.inf:
            problems.append(
                f"epsilon: must be positive, a saliency of 0 is divided by it - given {self.epsilon} - published: 1e-6"
            )
        for name, fewest in {"steps_search": 1, "steps_retrain": 2}.items():
            if getattr(self, name) < fewest:
                problems.append(
                    f"{name}: too few, delta would not move - given {getattr(self, name)} - allowed: {fewest} or more"
                )
        if not self.saliency and self.selector != "saliency":
            problems.append(
                f"selector: has no effect where saliency=false frees every coordinate - given {self.selector!r}"
            )
        if problems:
            raise OptionError(problems)

    def search(
        self, problem: TargetProblem, *, request_ids: Sequence[str], site: Literal["mlp", "block"]
    ) -> Descent:
        """Both descents; for a request that never moved in the first, or met a number that is not
        finite, the first alone.
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

    def numbers(self, size: int, site: Literal["mlp", "block"]) -> Numbers:
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
