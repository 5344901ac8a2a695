"""The training of a hypernetwork: a generator of records, and of states from which training resumes
bit for bit.

A step consists of `accumulate` edits and one step of Adam. Each edit starts from the unedited
model, or from its own chain of earlier edits. The model does not change. This file neither logs nor
writes files; `editkit.training` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editkit.hypernet.examples import Example, Split, examples
from editkit.hypernet.factors import RowUpdates, gradient_factors, joined, row_updates
from editkit.hypernet.losses import losses
from editkit.hypernet.measure import edits, measure
from editkit.hypernet.network import STEP_SIZES, Hypernetwork
from editkit.hypernet.options import TrainingOptions
from editkit.lazy import torch
from editkit.types import EvalRecord, Measurement, StepRecord, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# Validation edits are measured one by one, and rolled back after the measurement.
PROTOCOL, TIMING, VIEW = "argmax", "rollback", "unrestrained"


@dataclass(frozen=True, kw_only=True)
class LearningState:
    """Everything that the next step depends on, except the base model, the data and the options.

    Its tensors are copies on the CPU.
    """

    step: int
    network: TensorState
    adam: TensorState  # "<tensor>/exp_avg" and so on
    chains: TensorState  # the updates of the current chains: "<module>/left" and "/right"
    best: TensorState  # the network with the best validation loss; empty before a validation
    best_step: int
    best_loss: float | None

    def best_of(self, network: Hypernetwork) -> Hypernetwork:
        """The result of the training so far."""
        return network.with_tensors(self.best or self.network)

    def outcome(self) -> LearningState:
        """The state without the tensors that only a further step needs (three copies of the
        network).
        """
        return replace(self, network={}, adam={}, chains={})


class Diverged(Exception):
    """A loss or a gradient is not finite. The training has yielded the state before the step, and
    then the step's record.
    """

    def __init__(self, record: StepRecord) -> None:
        super().__init__(
            f"step {record.step}: {record.nonfinite} is not finite (edits "
            f"{', '.join(record.requests[:3])}...). "
            "Fix: lower editor.train.lr or editor.network.step_size."
        )
        self.record = record


Event = StepRecord | EvalRecord | LearningState


@dataclass(frozen=True, kw_only=True)
class Learning:
    """A training: the model, the untrained network, the data and the options."""

    model: EditableModel
    network: Hypernetwork  # untrained: shapes and initial values
    split: Split
    options: TrainingOptions
    seed: int
    checkpoint_every: int = 100
    should_stop: Callable[[], bool] = lambda: False

    def run(self, state: LearningState | None = None) -> Iterator[Event]:
        """Trains from the beginning, or resumes from `state`.

        Training ends after the last step, or after `patience` steps without an improvement. It ends
        early, after a state, once `should_stop` returns true.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        learner, is_new = _Learner(self, state), state is None
        del state  # the learner has copies of its tensors
        if is_new:
            yield StepRecord(step=0)
            yield from learner.validate()
            yield learner.state()
        while learner.step < self.options.steps and not learner.is_stuck:
            record = learner.take_step()
            if record.nonfinite:
                yield learner.state()  # the state before the step
                yield record
                raise Diverged(record)
            yield record
            due = (
                learner.step % self.options.validate_every == 0
                or learner.step == self.options.steps
            )
            if due:
                yield from learner.validate()
            stopping = self.should_stop()
            if stopping or due or learner.step % self.checkpoint_every == 0 or learner.is_stuck:
                yield learner.state()
            if stopping:
                return


class _Learner:
    """The changing parts of a training."""

    def __init__(self, learning: Learning, state: LearningState | None) -> None:
        self.learning, self.model = learning, learning.model
        self.options = learning.options
        network = learning.network.to(learning.model.device).detached()
        self.step = self.best_step = 0
        self.best: TensorState = {}
        self.best_loss: float | None = None
        self.chains: RowUpdates | None = None
        if state is not None:
            moved = {
                name: tensor.to(learning.model.device).clone()
                for name, tensor in state.network.items()
            }
            network = network.with_tensors(moved)
            self.step, self.best, self.best_step, self.best_loss = (
                state.step,
                state.best,
                state.best_step,
                state.best_loss,
            )
            names = {name.rpartition("/")[0] for name in state.chains}
            self.chains = {
                name: (
                    state.chains[f"{name}/left"].to(learning.model.device),
                    state.chains[f"{name}/right"].to(learning.model.device),
                )
                for name in network.modules
                if name in names
            } or None
        for tensor in network.learned().values():
            tensor.requires_grad_()
        self.network = network
        learned = network.learned()
        self.parameters = list(learned.values())
        step_sizes = learned.pop(STEP_SIZES)
        groups = [
            {"params": list(learned.values()), "lr": learning.options.lr},
            {"params": [step_sizes], "lr": learning.options.lr_step_sizes},
        ]
        self.adam = torch.optim.Adam(groups, foreach=False)
        if state is not None:
            for name, tensor in network.learned().items():
                kept = {
                    key.rpartition("/")[2]: value
                    for key, value in state.adam.items()
                    if key.rpartition("/")[0] == name
                }
                # Adam keeps its count on the CPU.
                moved = {
                    key: value.clone() if key == "step" else value.to(tensor.device).clone()
                    for key, value in kept.items()
                }
                if moved:
                    self.adam.state[tensor] = moved

    @property
    def is_stuck(self) -> bool:
        return self.step - self.best_step >= self.options.patience

    def state(self) -> LearningState:
        adam = {
            f"{name}/{key}": copied(value)
            for name, tensor in self.network.learned().items()
            for key, value in self.adam.state.get(tensor, {}).items()
        }
        chains = {
            f"{module}/{side}": copied(factor)
            for module, factors in (self.chains or {}).items()
            for side, factor in zip(("left", "right"), factors, strict=True)
        }
        return LearningState(
            step=self.step,
            network={name: copied(tensor) for name, tensor in self.network.tensors.items()},
            adam=adam,
            chains=chains,
            best=self.best,
            best_step=self.best_step,
            best_loss=self.best_loss,
        )

    def drawn(self, step: int) -> tuple[Example, ...]:
        """The examples of a step."""
        options = self.options
        return examples(
            self.learning.split.train,
            seed=self.learning.seed,
            step=step,
            count=options.accumulate,
            locality=options.locality_texts,
        )

    def take_step(self) -> StepRecord:
        """Computes the gradients of all examples, then makes a step of Adam. If a value is not
        finite, it restores the state before the step instead.
        """
        started, options, step = time.perf_counter(), self.options, self.step + 1
        # Before Adam's step only the running statistics change, and they are new tensors.
        before = (self.network, self.chains)
        chosen = self.drawn(step)
        place = (step - 1) % options.sequence  # position in the chains
        if place == 0:
            self.chains = None
        # In a chain, the row's model must also remember one of the earlier edits, in turn.
        earlier = self.drawn(step - 1 - (step % place)) if place else ()
        self.adam.zero_grad()
        sums = {"edit_loss": 0.0, "locality_loss": 0.0, "probability_before": 0.0}
        made: list[RowUpdates] = []
        for start in range(0, len(chosen), options.at_once):
            rows = range(start, min(start + options.at_once, len(chosen)))
            chain = (
                None
                if self.chains is None
                else {
                    name: (a[rows.start : rows.stop], b[rows.start : rows.stop])
                    for name, (a, b) in self.chains.items()
                }
            )
            part = [chosen[row] for row in rows]
            prompts = edits(self.model, part)
            factors, log_p_B = gradient_factors(
                self.model, self.network.modules, prompts, earlier=chain
            )
            self.network = self.network.observed(factors)
            with torch.enable_grad():
                updates = row_updates(self.network, factors)
                also = [(row - start, earlier[row].question) for row in rows] if earlier else []
                part_losses = losses(self.model, joined(chain, updates), part, also=also)
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
        figures = {name: value / len(chosen) for name, value in sums.items()}
        figures["loss"] = (
            options.edit_weight * figures["edit_loss"]
            + options.locality_weight * figures["locality_loss"]
        )
        gradient_norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, options.clip, foreach=False)
        )
        figures["gradient_norm"] = gradient_norm
        nonfinite = (
            "loss"
            if not math.isfinite(figures["loss"])
            else "gradient"
            if not math.isfinite(gradient_norm)
            else None
        )
        if nonfinite is None:
            self.adam.step()
            self.step = step
            self.chains = joined(self.chains, stacked(made)) if made else None
        else:
            self.network, self.chains = before
        return StepRecord(
            step=step,
            requests=tuple(example.request.id for example in chosen),
            seconds={"train": time.perf_counter() - started},
            target=figures,
            nonfinite=nonfinite,
        )

    def validate(self) -> Iterator[EvalRecord]:
        """Measures the validation edits, and stores the network if it is the best one so far."""
        count = self.options.validation // self.options.sequence * self.options.sequence
        chosen = examples(
            self.learning.split.validation,
            seed=self.learning.seed,
            step=1,
            count=count,
            locality=self.options.locality_texts,
        )
        figures = measure(self.model, self.network, chosen, sequence=self.options.sequence)
        loss = (
            self.options.edit_weight * figures["edit_loss"]
            + self.options.locality_weight * figures["locality_loss"]
        )
        for metric in ("efficacy", "generalization", "locality"):
            measurement = Measurement(
                kind="editing",
                metric=metric,
                value=figures[metric],
                stderr=None,
                n=count,
                protocol=PROTOCOL,
                timing=TIMING,
                nonfinite=None,
            )
            chat = self.model.chat.label if self.model.chat else None
            yield EvalRecord(step=self.step, view=VIEW, measurement=measurement, chat_template=chat)
        for metric, value in {
            "loss": loss,
            "edit_loss": figures["edit_loss"],
            "locality_loss": figures["locality_loss"],
        }.items():
            finite = value if math.isfinite(value) else None
            measurement = Measurement(
                kind="training", metric=metric, value=finite, stderr=None, n=count, nonfinite=None
            )
            yield EvalRecord(step=self.step, view=VIEW, measurement=measurement)
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best = {name: copied(tensor) for name, tensor in self.network.tensors.items()}
            self.best_step, self.best_loss = self.step, loss


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A detached copy on the CPU, which leaves the GPU's memory to the computation."""
    return tensor.detach().to("cpu", copy=True)


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
