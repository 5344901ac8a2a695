"""The training of MEND's hypernetwork.

A step consists of `accumulate` edits and one step of Adam. Each edit starts from the unedited
model, or from its own chain of earlier edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editkit.hypernet.examples import Example
from editkit.hypernet.factors import RowUpdates, gradient_factors, joined, row_updates
from editkit.hypernet.learning import AbstractLearner, AbstractLearning, Learned, LearningState
from editkit.hypernet.losses import by_row, losses
from editkit.hypernet.measure import edits, measure
from editkit.hypernet.network import Hypernetwork
from editkit.lazy import torch
from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class MendLearning(AbstractLearning[Hypernetwork]):
    """A training of MEND."""

    def begin(self, state: LearningState | None) -> MendLearner:
        return MendLearner(self, state)


class MendLearner(AbstractLearner[Hypernetwork]):
    """The changing parts. What is carried from step to step are the updates of the current chains:
    "<module>/left" and "/right".
    """

    @property
    def num_validated(self) -> int:
        return self.options.validation // self.options.sequence * self.options.sequence

    def measured(self, chosen: Sequence[Example]) -> Mapping[str, float]:
        return measure(self.model, self.network, chosen, sequence=self.options.sequence)

    def drawn(self, step: int) -> tuple[Example, ...]:
        """The examples of a step."""
        return self.examples(self.split.train, step=step, count=self.options.accumulate)

    def learn(self, step: int) -> Learned[Hypernetwork]:
        options, network, chosen = self.options, self.network, self.drawn(step)
        place = (step - 1) % options.sequence  # position in the chains
        chains = self._chains() if place else None
        # In a chain, the row's model must also remember one of the earlier edits, in turn.
        earlier = self.drawn(step - 1 - (step % place)) if place else ()
        sums = {"edit_loss": 0.0, "locality_loss": 0.0, "probability_before": 0.0}
        made: list[RowUpdates] = []
        for start in range(0, len(chosen), options.at_once):
            rows = range(start, min(start + options.at_once, len(chosen)))
            chain = (
                None
                if chains is None
                else {
                    name: (a[rows.start : rows.stop], b[rows.start : rows.stop])
                    for name, (a, b) in chains.items()
                }
            )
            part = [chosen[row] for row in rows]
            prompts = edits(self.model, part)
            factors, log_p_B = gradient_factors(self.model, network.modules, prompts, earlier=chain)
            network = network.observed(factors)
            with torch.enable_grad():
                updates = row_updates(network, factors)
                also = [(row - start, earlier[row].question) for row in rows] if earlier else []
                edited = by_row(self.model, joined(chain, updates))
                part_losses = losses(self.model, edited, part, also=also)
                loss = (
                    options.edit_weight * part_losses.edit_B.sum()
                    + options.locality_weight * part_losses.locality_B.sum()
                )
            (loss / len(chosen)).backward()
            sums["edit_loss"] += float(part_losses.edit_B.detach().sum())
            sums["locality_loss"] += float(part_losses.locality_B.detach().sum())
            sums["probability_before"] += float(log_p_B.exp().sum())
            if options.sequence > 1:
                made.append(
                    {
                        name: (left.detach(), right.detach())
                        for name, (left, right) in updates.items()
                    }
                )
        return Learned(
            examples=chosen,
            figures={name: value / len(chosen) for name, value in sums.items()},
            network=network,
            carried=_flat(joined(chains, stacked(made))) if made else {},
        )

    def _chains(self) -> RowUpdates | None:
        names = {name.rpartition("/")[0] for name in self.carried}
        return {
            name: (self.carried[f"{name}/left"], self.carried[f"{name}/right"])
            for name in self.network.modules
            if name in names
        } or None


def _flat(updates: RowUpdates) -> TensorState:
    return {
        f"{module}/{side}": factor
        for module, factors in updates.items()
        for side, factor in zip(("left", "right"), factors, strict=True)
    }


def stacked(parts: Sequence[RowUpdates]) -> RowUpdates:
    """The concatenated rows of several batches. Factors are padded with zeros, which add
    nothing.
    """
    width = max(left_BRO.shape[1] for part in parts for left_BRO, _ in part.values())

    def padded(factor_BRX: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(factor_BRX, (0, 0, 0, width - factor_BRX.shape[1]))

    return {
        name: (
            torch.cat([padded(part[name][0]) for part in parts]),
            torch.cat([padded(part[name][1]) for part in parts]),
        )
        for name in parts[0]
    }
