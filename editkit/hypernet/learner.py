"""Training a hypernetwork: one generator that yields what it saw, and the states from which it can
go on bit for bit.

A step is `accumulate` edits, each made on its own (or at the end of its own chain of earlier
edits), and one step of Adam. The model is only read. Neither logs nor writes: `editkit.training`
does.
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

PROTOCOL, TIMING, VIEW = (
    "argmax",
    "rollback",
    "unrestrained",
)  # how validation edits are judged: each alone, then taken back


@dataclass(frozen=True, kw_only=True)
class LearningState:
    """All that the next step depends on, besides the base model, the data and the options. Its
    tensors lie on the CPU, and are its own.
    """

    step: int
    network: TensorState
    adam: TensorState  # "<tensor>/exp_avg" and so on
    chains: TensorState  # what the chains' models got so far: "<module>/left" and "/right"
    best: TensorState  # the network with the best validation loss; none before the first validation
    best_step: int
    best_loss: float | None

    def best_of(self, network: Hypernetwork) -> Hypernetwork:
        """The network that this training would give now."""
        return network.with_tensors(self.best or self.network)

    def outcome(self) -> LearningState:
        """What a training comes to, without the tensors that only a further step needs: three
        copies of the network.
        """
        return replace(self, network={}, adam={}, chains={})


class Diverged(Exception):
    """A loss or a gradient was not finite; the last thing yielded before is the last sound state,
    with the step's record behind it.
    """

    def __init__(self, record: StepRecord) -> None:
        super().__init__(
            f"step {record.step}: {record.nonfinite} is not finite (edits "
            f"{', '.join(record.requests[:3])}...); "
            "lower editor.train.lr or editor.network.step_size"
        )
        self.record = record


Event = StepRecord | EvalRecord | LearningState


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What is trained, on what."""

    model: EditableModel
    network: Hypernetwork  # untrained: gives the shapes, and the beginning
    split: Split
    options: TrainingOptions
    seed: int
    checkpoint_every: int = 100
    should_stop: Callable[[], bool] = lambda: False

    def run(self, state: LearningState | None = None) -> Iterator[Event]:
        """Trains from the beginning, or on from `state`, to the last step or until nothing gets
        better.

        Raises Diverged. Ends early, its state yielded, where `should_stop` says so.
        """
        learner, is_new = _Learner(self, state), state is None
        del state  # the learner has copies
        if is_new:
            yield StepRecord(step=0)
            yield from learner.validate()
            yield learner.state()
        while learner.step < self.options.steps and not learner.is_stuck:
            record = learner.take_step()
            if record.nonfinite:
                yield learner.state()  # as it was before
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
    """The parts that change."""

    def __init__(self, job: Learning, state: LearningState | None) -> None:
        self.job, self.model, self.options = job, job.model, job.options
        network = job.network.to(job.model.device).detached()
        self.step, self.best, self.best_step, self.best_loss = 0, {}, 0, None  # type: int, TensorState, int, float | None
        self.chains: RowUpdates | None = None
        if state is not None:
            moved = {
                name: tensor.to(job.model.device).clone() for name, tensor in state.network.items()
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
                    state.chains[f"{name}/left"].to(job.model.device),
                    state.chains[f"{name}/right"].to(job.model.device),
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
            {"params": list(learned.values()), "lr": job.options.lr},
            {"params": [step_sizes], "lr": job.options.lr_step_sizes},
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
            f"{module}/{side}": copied(each)
            for module, both in (self.chains or {}).items()
            for side, each in zip(("left", "right"), both, strict=True)
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
            self.job.split.train,
            seed=self.job.seed,
            step=step,
            count=options.accumulate,
            locality=options.locality_texts,
        )

    def take_step(self) -> StepRecord:
        """Gradients of all examples, then Adam. What is not finite stops it before Adam, with
        everything as it was before.
        """
        started, options, step = time.perf_counter(), self.options, self.step + 1
        before = (
            self.network,
            self.chains,
        )  # until Adam's step only the running statistics move, and those into new tensors
        chosen = self.drawn(step)
        place = (step - 1) % options.sequence  # in the chains
        if place == 0:
            self.chains = None
        # In a chain the row's model must also remember one of the edits before, which one goes
        # round.
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
            asked = edits(self.model, part)
            factors, log_p_B = gradient_factors(
                self.model, self.network.modules, asked, earlier=chain
            )
            self.network = self.network.observed(factors)
            with torch.enable_grad():
                updates = row_updates(self.network, factors)
                also = (
                    [
                        (row - start, earlier[row].paraphrase, earlier[row].request.target)
                        for row in rows
                    ]
                    if earlier
                    else []
                )
                found = losses(self.model, joined(chain, updates), part, also=also)
                loss = (
                    options.edit_weight * found.edit_B.sum()
                    + options.locality_weight * found.locality_B.sum()
                )
            (loss / len(chosen)).backward()
            sums["edit_loss"] += float(found.edit_B.detach().sum())
            sums["locality_loss"] += float(found.locality_B.detach().sum())
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
        """Measures the validation edits, and keeps the network if it is the best so far."""
        count = self.options.validation // self.options.sequence * self.options.sequence
        chosen = examples(
            self.job.split.validation,
            seed=self.job.seed,
            step=1,
            count=count,
            locality=self.options.locality_texts,
        )
        found = measure(self.model, self.network, chosen, sequence=self.options.sequence)
        loss = (
            self.options.edit_weight * found["edit_loss"]
            + self.options.locality_weight * found["locality_loss"]
        )
        for metric in ("efficacy", "generalization", "locality"):
            measurement = Measurement(
                kind="editing",
                metric=metric,
                value=found[metric],
                stderr=None,
                n=count,
                protocol=PROTOCOL,
                timing=TIMING,
                nonfinite=None,
            )
            yield EvalRecord(step=self.step, view=VIEW, measurement=measurement)
        for metric, value in {
            "loss": loss,
            "edit_loss": found["edit_loss"],
            "locality_loss": found["locality_loss"],
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
    """A copy on the CPU that nothing learns: a GPU has room for what is computed with."""
    return tensor.detach().to("cpu", copy=True)


def stacked(parts: Sequence[RowUpdates]) -> RowUpdates:
    """The rows of several batches below each other; factors are filled up with zeros, which add
    nothing.
    """
    width = max(left_BRO.shape[1] for part in parts for left_BRO, _ in part.values())

    def filled(each_BRX: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(each_BRX, (0, 0, 0, width - each_BRX.shape[1]))

    return {
        name: (
            torch.cat([filled(part[name][0]) for part in parts]),
            torch.cat([filled(part[name][1]) for part in parts]),
        )
        for name in parts[0]
    }
