"""What the trainings of all hypernetworks have in common: a generator of records, and of states
from which training resumes bit for bit.

A step consists of some edits and one step of Adam. The model does not change. This file neither
logs nor writes files; `editkit.training` does.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from editkit.hypernet.abstract import STEP_SIZES, AbstractNetwork
from editkit.hypernet.examples import Example, Split, examples
from editkit.hypernet.options import TrainingOptions
from editkit.lazy import torch
from editkit.types import EditRequest, EvalRecord, Measurement, StepRecord, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# Validation edits are rolled back after the measurement.
PROTOCOL, TIMING, VIEW = "argmax", "rollback", "unrestrained"
NetworkT = TypeVar("NetworkT", bound=AbstractNetwork)


@dataclass(frozen=True, kw_only=True)
class LearningState:
    """Everything that the next step depends on, except the base model, the data and the options.

    Its tensors are copies on the CPU.
    """

    step: int
    network: TensorState
    adam: TensorState  # "<tensor>/exp_avg" and so on
    chains: TensorState  # what a step takes over from the one before, such as chains of edits
    best: TensorState  # the network with the best validation loss; empty before a validation
    best_step: int
    best_loss: float | None

    def best_of(self, network: NetworkT) -> NetworkT:
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
class AbstractLearning(abc.ABC, Generic[NetworkT]):
    """A training: the model, the untrained network, the data and the options."""

    model: EditableModel
    network: NetworkT  # untrained: shapes and initial values
    split: Split
    options: TrainingOptions
    seed: int
    checkpoint_every: int = 100
    should_stop: Callable[[], bool] = lambda: False

    @abc.abstractmethod
    def begin(self, state: LearningState | None) -> AbstractLearner[NetworkT]:
        """The changing parts, from the beginning or from `state`."""

    def run(self, state: LearningState | None = None) -> Iterator[Event]:
        """Trains from the beginning, or resumes from `state`.

        Training ends after the last step, or after `patience` steps without an improvement. It ends
        early, after a state, once `should_stop` returns true.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        learner, is_new = self.begin(state), state is None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(Generic[NetworkT]):
    """What a step found, besides the gradients of the parameters."""

    examples: Sequence[Example]
    figures: Mapping[str, float]  # `edit_loss` and `locality_loss` among them
    network: NetworkT  # with the statistics of further tokens
    carried: TensorState = field(default_factory=dict)  # for the next step


class AbstractLearner(abc.ABC, Generic[NetworkT]):
    """The changing parts of a training."""

    def __init__(self, learning: AbstractLearning[NetworkT], state: LearningState | None) -> None:
        self.model, self.options = learning.model, learning.options
        self.split, self.seed = learning.split, learning.seed
        network = learning.network.to(learning.model.device).detached()
        self.step = self.best_step = 0
        self.best: TensorState = {}
        self.best_loss: float | None = None
        self.carried: TensorState = {}
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
            self.carried = {
                name: tensor.to(learning.model.device) for name, tensor in state.chains.items()
            }
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
    @abc.abstractmethod
    def num_validated(self) -> int:
        """The number of edits of a validation."""

    @abc.abstractmethod
    def measured(self, chosen: Sequence[Example]) -> Mapping[str, float]:
        """Means over validation edits: both losses, efficacy, generalization and locality."""

    @abc.abstractmethod
    def learn(self, step: int) -> Learned[NetworkT]:
        """Adds the gradients of a step to those of the parameters, which are zero before."""

    @property
    def is_stuck(self) -> bool:
        return self.step - self.best_step >= self.options.patience

    def state(self) -> LearningState:
        adam = {
            f"{name}/{key}": copied(value)
            for name, tensor in self.network.learned().items()
            for key, value in self.adam.state.get(tensor, {}).items()
        }
        return LearningState(
            step=self.step,
            network={name: copied(tensor) for name, tensor in self.network.tensors.items()},
            adam=adam,
            chains={name: copied(tensor) for name, tensor in self.carried.items()},
            best=self.best,
            best_step=self.best_step,
            best_loss=self.best_loss,
        )

    def examples(
        self, requests: Sequence[EditRequest], *, step: int, count: int
    ) -> tuple[Example, ...]:
        """The examples of a step."""
        return examples(
            requests, seed=self.seed, step=step, count=count, locality=self.options.locality_texts
        )

    def loss(self, figures: Mapping[str, float]) -> float:
        """The weighted sum of both losses."""
        options = self.options
        return (
            options.edit_weight * figures["edit_loss"]
            + options.locality_weight * figures["locality_loss"]
        )

    def take_step(self) -> StepRecord:
        """Computes the gradients of all examples, then makes a step of Adam. If a value is not
        finite, the state stays as it was before the step.
        """
        started, step = time.perf_counter(), self.step + 1
        self.adam.zero_grad()
        learned = self.learn(step)
        figures = {**learned.figures, "loss": self.loss(learned.figures)}
        gradient_norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip, foreach=False)
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
            self.step, self.network, self.carried = step, learned.network, learned.carried
        return StepRecord(
            step=step,
            requests=tuple(example.request.id for example in learned.examples),
            seconds={"train": time.perf_counter() - started},
            target=figures,
            nonfinite=nonfinite,
        )

    def validate(self) -> Iterator[EvalRecord]:
        """Measures the validation edits, and stores the network if it is the best one so far."""
        count = self.num_validated
        chosen = self.examples(self.split.validation, step=1, count=count)
        figures = self.measured(chosen)
        loss = self.loss(figures)
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
