"""The training of MALMEN's hypernetwork (arXiv 2311.04661), and over sequences RLEdit's (Li et al.
2025, "Reinforced Lifelong Editing for Language Models", arXiv 2502.05759, ICML 2025; its code).

A step of MALMEN makes a batch of `accumulate` edits on the unedited model, and a step of Adam on

    L = c_edit * -log p_edited(target | paraphrase) + c_loc * KL(p_before || p_edited)

A step of RLEdit makes a trajectory of `sequence` batches, each on what the earlier ones left, and a
step of Adam on the mean over the batches t of what is, with its sign changed, a reward:

    L_t + discount L_{t-1} + discount^2 L_{t-2} + ... + penalty |D_t|^2         `memory` losses

L_i is the loss of the edits of batch i after update D_t, and p_before the model before D_t. The
gradient reaches the network through D_t alone: that later features depend on earlier updates is not
differentiated, as in the published code.

Differs from the published code: its penalty is formed without a graph and has no gradient; it sums
losses where means are taken here; it clips the gradient after every batch while it accumulates, and
here it is clipped once, before Adam's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.hypernet.abstract import Factors
from editkit.hypernet.examples import Example
from editkit.hypernet.features import requests_features
from editkit.hypernet.learning import AbstractLearner, AbstractLearning, Learned, LearningState
from editkit.hypernet.losses import Edited, losses
from editkit.hypernet.measure import measured
from editkit.hypernet.ridge_network import RidgeNetwork, Shifts
from editkit.lazy import torch
from editkit.model.capture import add_to_matrix

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Totals = Mapping[str, "torch.Tensor"]  # by module, (O, I): the sum of earlier updates


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """RLEdit's reward: `editor.trajectory` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    discount: float  # of the loss of an earlier batch, for each batch in between
    memory: int  # batches whose losses count, the present one included
    penalty: float  # weight of |D_t|^2

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.discount <= 1:
            expected = "above 0, at most 1"
            problems.append(
                message("discount", "out of range", got=self.discount, expected=expected)
            )
        if self.memory < 1:
            problems.append(
                message("memory", "out of range", got=self.memory, expected="at least 1")
            )
        if not 0 <= self.penalty < math.inf:
            problem, got = "must not be negative", self.penalty
            problems.append(message("penalty", problem, got=got, expected="0 for none"))
        if problems:
            raise OptionError(problems)


ALONE = Trajectory(discount=1.0, memory=1, penalty=0.0)  # MALMEN's: the present batch alone


@dataclass(frozen=True, kw_only=True)
class RidgeLearning(AbstractLearning[RidgeNetwork]):
    """A training of MALMEN or RLEdit."""

    trajectory: Trajectory
    mini_batch: int  # requests whose features share a pass, as in the editor

    def begin(self, state: LearningState | None) -> RidgeLearner:
        return RidgeLearner(self, state)


class RidgeLearner(AbstractLearner[RidgeNetwork]):
    """The changing parts. Nothing is carried from step to step."""

    def __init__(self, learning: RidgeLearning, state: LearningState | None) -> None:
        super().__init__(learning, state)
        self.trajectory, self.mini_batch = learning.trajectory, learning.mini_batch

    @property
    def num_validated(self) -> int:
        return self.options.validation

    def drawn(self, step: int) -> tuple[Example, ...]:
        """The examples of a step."""
        count = self.options.accumulate * self.options.sequence
        return self.examples(self.split.train, step=step, count=count)

    def learn(self, step: int) -> Learned[RidgeNetwork]:
        network, chosen = self.network, self.drawn(step)
        batches, totals = self._batches(chosen), dict[str, torch.Tensor]()
        sums = {"edit_loss": 0.0, "locality_loss": 0.0, "probability_before": 0.0}
        for number, batch in enumerate(batches):
            factors, log_p = self._features(batch, totals)
            network = network.observed(factors)
            shifts = Shifts.of(network, factors)
            remembered = batches[max(0, number + 1 - self.trajectory.memory) : number + 1]
            for age, earlier in enumerate(reversed(remembered)):
                weight = self.trajectory.discount**age / len(batches)
                found = self._add_losses(earlier, shifts, totals, weight)
                if age == 0:
                    sums["edit_loss"] += found[0] / len(batches)
                    sums["locality_loss"] += found[1] / len(batches)
            if self.trajectory.penalty:
                with torch.enable_grad():
                    (self.trajectory.penalty / len(batches) * shifts.penalty()).backward()
            shifts.backward()
            sums["probability_before"] += float(log_p.exp().mean()) / len(batches)
            totals = _sum(totals, shifts.updates())
        return Learned(examples=chosen, figures=sums, network=network)

    def measured(self, chosen: Sequence[Example]) -> Mapping[str, float]:
        """Without a sequence, every batch alone on the unedited model; else a trajectory is
        measured after its last batch.
        """
        batches, sums = self._batches(chosen), dict[str, float]()
        for start in range(0, len(batches), self.options.sequence):
            network, totals = self.network, dict[str, torch.Tensor]()
            trajectory = batches[start : start + self.options.sequence]
            for batch in trajectory:
                factors, _ = self._features(batch, totals)
                network = network.observed(factors)
                totals = _sum(totals, Shifts.of(network, factors).updates())
            for batch in trajectory:
                for part in self._parts(batch):
                    figures = measured(self.model, _all(self.model, totals), part)
                    for name, value in figures.items():
                        sums[name] = sums.get(name, 0.0) + value
        return {name: value / len(chosen) for name, value in sums.items()}

    def _batches(self, chosen: Sequence[Example]) -> list[Sequence[Example]]:
        size = self.options.accumulate
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]

    def _parts(self, batch: Sequence[Example]) -> list[Sequence[Example]]:
        size = self.options.at_once
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def _features(
        self, batch: Sequence[Example], totals: Totals
    ) -> tuple[dict[str, Factors], torch.Tensor]:
        """The features of all target tokens by matrix, and log p of each target."""
        requests = [example.request for example in batch]
        with _applied(self.model, totals):
            return requests_features(self.model, self.network.modules, requests, self.mini_batch)

    def _add_losses(
        self, batch: Sequence[Example], shifts: Shifts, totals: Totals, weight: float
    ) -> tuple[float, float]:
        """Adds the weighted gradients of a batch's losses to the shifts. Returns both means."""

        @contextmanager
        def edited(rows: Sequence[int]) -> Iterator[None]:
            with _applied(self.model, totals), shifts.applied(self.model):
                yield

        edit_loss = locality_loss = 0.0
        for part in self._parts(batch):
            with torch.enable_grad():
                found = losses(self.model, edited, part, base=lambda: _applied(self.model, totals))
                loss = (
                    self.options.edit_weight * found.edit_B.sum()
                    + self.options.locality_weight * found.locality_B.sum()
                )
                (weight / len(batch) * loss).backward()
            edit_loss += float(found.edit_B.detach().sum()) / len(batch)
            locality_loss += float(found.locality_B.detach().sum()) / len(batch)
        return edit_loss, locality_loss


@contextmanager
def _applied(model: EditableModel, totals: Totals) -> Iterator[None]:
    """Inside, all rows pass the model with these updates."""
    with ExitStack() as hooks:
        for module, total_OI in totals.items():
            hooks.enter_context(add_to_matrix(model, module, total_OI))
        yield


def _all(model: EditableModel, totals: Totals) -> Edited:
    return lambda rows: _applied(model, totals)


def _sum(totals: Totals, updates: Totals) -> dict[str, torch.Tensor]:
    return {
        module: totals[module] + update_OI if module in totals else update_OI
        for module, update_OI in updates.items()
    }
