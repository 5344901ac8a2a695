"""LoRA and AdaLoRA: an adapter of low rank, trained on the edit requests.

    W x + (alpha / r) up down x          LoRA, Hu et al. 2021, arXiv 2106.09685, eq. 3
    W x + (alpha / r) up diag(e) down x  AdaLoRA, Zhang et al. 2023, arXiv 2303.10512, eq. 3

The loss is -log p(target token | prompt, target so far), mean over the target's tokens and the
batch. One adapter is trained on from batch to batch, as in the published comparisons. Adam and
AdaLoRA's schedule begin anew with each batch: the state is the adapter alone.

peft makes the adapter and allocates AdaLoRA's ranks: from `initial_rank` down to a mean of `rank`
within the steps of each batch. A rank that was taken away has a singular value of zero and competes
again in the next batch. EasyEdit's AdaLoRA (arXiv 2308.07269) never calls the allocation, so its
ranks stay at the initial one whatever `r` is, and leaves the penalty on orthogonality out:
`allocation.every=0` and `allocation.orthogonality=0`. peft divides by the initial rank, where the
paper has no such factor.

`Lora` stands beside the weights. It is not routed: every prompt goes through it. `MergedLora`
writes the change of the product as an update, so that restraints on updates and totals apply;
without them it is the same method, to rounding.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.editors.adapter import Adapter, Allocation, Shape, lacks_peft
from editkit.editors.base import (
    AbstractAnyEditor,
    AbstractEditor,
    AbstractSideEditor,
    Plan,
    Step,
)
from editkit.editors.ft import log_probabilities
from editkit.editors.low_rank_side import LowRankSide
from editkit.errors import ConfigError, OptionError, message, not_positive
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.families import require_layers
from editkit.model.standing import standing
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments

COPIES = 4  # of a parameter in training: itself, its gradient, Adam's two moments


@dataclass(frozen=True, kw_only=True)
class LoraPlan(Plan):
    """The adapter after the batch."""

    sides: tuple[LowRankSide, ...]


@dataclass(frozen=True, kw_only=True)
class AbstractLora(AbstractAnyEditor[LoraPlan]):
    """What the two have in common. The options are documented in `conf/editor/lora.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    name: str
    layers: tuple[int, ...] | None  # None: all
    targets: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float
    steps: int
    lr: float
    stop_loss: float
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        problems = not_positive(self, "rank", "alpha", "steps", "lr")
        if not 0 <= self.dropout < 1:
            expected = "at least 0 and less than 1"
            problems.append(message("dropout", "out of range", got=self.dropout, expected=expected))
        if not 0 <= self.stop_loss < math.inf:
            got, expected = self.stop_loss, "0 for none"
            problems.append(
                message("stop_loss", "must not be negative", got=got, expected=expected)
            )
        for name, values in (("layers", self.layers), ("targets", self.targets)):
            if values is not None and (not values or len(set(values)) < len(values)):
                expected = "at least one, each once"
                problems.append(message(name, "unusable", got=list(values), expected=expected))
        allocation = self.allocation
        if allocation is not None and allocation.initial_rank <= self.rank:
            problem, got = "AdaLoRA begins above its final rank", allocation.initial_rank
            expected = f"more than rank={self.rank}"
            problems.append(message("allocation.initial_rank", problem, got=got, expected=expected))
        if allocation is not None and (left := self.steps - allocation.last_steps(self.steps)) < 2:
            problem, expected = "too few before the last allocation", "at least 2"
            problems.append(message("steps", problem, got=left, expected=expected))
        if problems:
            raise OptionError(problems)

    def lacks(self) -> list[str]:
        return lacks_peft()

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The targets of the layers.

        Raises:
            ConfigError: a layer is out of range, or the model is an expert of a mixture.
        """
        if model.family.expert is not None:
            problem, got = "adapters do not fit one expert of a mixture", model.family.expert
            raise ConfigError(message("model.expert", problem, got=got, expected="null"))
        layers = range(model.num_layers) if self.layers is None else self.layers
        require_layers(layers, name=model.name, num_layers=model.num_layers)
        return tuple(
            f"{model.family.block(layer)}.{target}" for layer in layers for target in self.targets
        )

    def memory(self, work: Workload) -> EditorMemory:
        rank = self.rank if self.allocation is None else self.allocation.initial_rank
        adapter = 4 * rank * sum(rows + columns for rows, columns in work.shapes)
        tokens = REQUEST * work.batch_size
        gradient = work.kept(tokens, work.blocks_with_gradient) + work.logits(tokens)
        return EditorMemory(
            working=COPIES * adapter + gradient,
            columns_per_edit=2 * rank,
            beside=adapter if isinstance(self, AbstractSideEditor) else None,
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        adapter = Adapter(model, self.modules(model), self._shape)
        return _state(adapter.sides())

    def plan(self, step: Step) -> LoraPlan:
        """Trains the adapter on the batch. The weights are only read."""
        model, start = step.model, self._sides(step.model, step.state)
        with torch.random.fork_rng(devices=[]):  # what it draws is replaced
            adapter = Adapter(model, self.modules(model), self._shape)
        adapter.load(start)
        log_probability = log_probabilities(model, step.requests, "target")

        def forward(*, is_training: bool) -> torch.Tensor:
            sides = adapter.sides(is_training=is_training)
            with standing(model, [*step.others, *sides]):
                return log_probability()

        adam, steps = torch.optim.Adam(adapter.parameters, lr=self.lr), 0
        with self._without(model, start):
            with torch.no_grad():
                before_B = forward(is_training=False)
            while steps < self.steps:
                with torch.enable_grad():
                    loss = -forward(is_training=True).mean()
                    value = loss.item()
                    if not math.isfinite(value) or value < self.stop_loss:
                        break
                    adam.zero_grad()
                    (loss + adapter.penalty()).backward()
                adam.step()
                steps += 1
                adapter.after_step(steps)
            with torch.no_grad():
                after_B = forward(is_training=False)
        value = -float(after_B.mean())
        summary = {
            "probability_before": float(before_B.exp().mean()),
            "probability_after": float(after_B.exp().mean()),
            "steps": float(steps),
            "loss": value,
        }
        return LoraPlan(
            summary=summary,
            nonfinite=None if math.isfinite(value) else "loss",
            sides=_detached(adapter.sides()),
        )

    @abc.abstractmethod
    def _without(
        self, model: EditableModel, sides: Sequence[LowRankSide]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are without the adapter that these sides are."""

    @property
    def _shape(self) -> Shape:
        return Shape(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            steps=self.steps,
            allocation=self.allocation,
        )

    def _sides(self, model: EditableModel, state: TensorState) -> tuple[LowRankSide, ...]:
        """The adapter in a state, on the device of its matrices."""
        return tuple(
            LowRankSide(
                module=module,
                down_RI=state[f"{module}.down"],
                up_OR=state[f"{module}.up"],
                scales_R=state[f"{module}.scales"],
            ).to(model.weight(module).device)
            for module in self.modules(model)
        )


@dataclass(frozen=True, kw_only=True)
class Lora(AbstractLora, AbstractSideEditor[LoraPlan]):
    """The adapter beside the weights."""

    def propose(self, step: Step, plan: LoraPlan) -> TensorState:
        return _state(plan.sides)

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        """Matrices to which the adapter adds nothing have no side."""
        sides = [side.trimmed() for side in self._sides(model, state)]
        return tuple(side for side in sides if len(side.scales_R))

    def _without(
        self, model: EditableModel, sides: Sequence[LowRankSide]
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # each pass has its own sides


@dataclass(frozen=True, kw_only=True)
class MergedLora(AbstractLora, AbstractEditor[LoraPlan]):
    """The adapter in the weights: an update is the product after the batch less the one before."""

    def propose(self, step: Step, module: str, plan: LoraPlan) -> LowRank:
        before, after = (
            side.trimmed().product()
            for sides in (self._sides(step.model, step.state), plan.sides)
            for side in sides
            if side.module == module
        )
        return after + -before

    def observe(self, step: Step, plan: LoraPlan) -> TensorState:
        return _state(plan.sides)

    def _without(
        self, model: EditableModel, sides: Sequence[LowRankSide]
    ) -> contextlib.AbstractContextManager[None]:
        products = {side.module: side.trimmed().product() for side in sides}
        return model.temporarily({name: -each for name, each in products.items() if each.rank})


def _detached(sides: Sequence[LowRankSide]) -> tuple[LowRankSide, ...]:
    return tuple(
        side.restored(
            side.options(),
            {name: tensor.detach().clone() for name, tensor in side.state().items()},
        )
        for side in sides
    )


def _state(sides: Sequence[LowRankSide]) -> TensorState:
    return {
        f"{side.module}.{name}": tensor.detach()
        for side in sides
        for name, tensor in side.state().items()
    }
