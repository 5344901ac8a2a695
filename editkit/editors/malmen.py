"""MALMEN and RLEdit: a trained network transforms the features of tokens, and one ridge solve turns
them into an update.

    MALMEN   Tan, Zhang & Fu 2024, arXiv 2311.04661: trained on batches, on the unedited model
    RLEdit   Li et al. 2025, arXiv 2502.05759: the same network, trained over sequences of batches

`editkit.hypernet.ridge_network` has the formulas. Both are one editor here; `trajectory` makes the
training RLEdit's. Features are UltraEdit's: one pass forward and back a mini-batch, normalised by
the mean and the standard deviation of all tokens so far. These statistics are part of the run's
state, and begin with those of the training.

Without a hypernetwork the network is the identity. With `network.coefficient: normalised` this is
UltraEdit.

Shape letters: O d_out, I d_in, T target tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import Plan, Step
from editkit.editors.hypernetwork import AbstractHypernetEditor
from editkit.editors.mlp_choice import Matrix, choice_problems, chosen_matrices
from editkit.errors import OptionError, message
from editkit.hypernet.abstract import STATISTICS, Shape
from editkit.hypernet.features import requests_features
from editkit.hypernet.memory import ridge_network_bytes, ridge_training_bytes
from editkit.hypernet.ridge_learner import ALONE, RidgeLearning, Trajectory
from editkit.hypernet.ridge_network import RidgeNetwork, RidgeOptions, new_ridge_network
from editkit.hypernet.store import RIDGE, Header, Kind, resolve
from editkit.lazy import torch
from editkit.resources.workload import (
    REQUEST,
    TARGET_TOKENS,
    EditorMemory,
    TrainingMemory,
    Workload,
)
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.hypernet.examples import Split
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class MalmenPlan(Plan):
    """The updates by module, and the statistics with this batch."""

    updates: Mapping[str, LowRank]
    statistics: TensorState


@dataclass(frozen=True, kw_only=True)
class Malmen(AbstractHypernetEditor[MalmenPlan, RidgeNetwork]):
    """Ridge regression on transformed gradients. The options are documented in
    `conf/editor/malmen.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    kind: ClassVar[Kind] = RIDGE
    needs_network: ClassVar[bool] = False

    matrices: tuple[Matrix, ...]
    layers_of: Mapping[str, tuple[int, ...]]  # of a matrix that has its own
    mini_batch: int
    network: RidgeOptions
    trajectory: Trajectory | None = None  # of the training; None: MALMEN's

    def __post_init__(self) -> None:
        problems = choice_problems(self.layers, self.matrices, self.layers_of)
        if self.mini_batch < 1:
            problems.append(message("mini_batch", "must be positive", got=self.mini_batch))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """As `chosen_matrices`."""
        return chosen_matrices(model, self.layers, self.matrices, self.layers_of)

    def new_network(self, shapes: Mapping[str, Shape], *, seed: int) -> RidgeNetwork:
        return new_ridge_network(shapes, self.network, seed=seed)

    def stored_network(self, header: Header, tensors: Mapping[str, torch.Tensor]) -> RidgeNetwork:
        options = RidgeOptions(**header.network)
        return RidgeNetwork(shapes=header.modules, options=options, tensors=tensors)

    def learning(
        self,
        model: EditableModel,
        split: Split,
        *,
        seed: int,
        checkpoint_every: int,
        should_stop: Callable[[], bool],
    ) -> RidgeLearning:
        return RidgeLearning(
            model=model,
            network=self.new_network(self.shapes(model), seed=seed),
            split=split,
            options=self.train,
            seed=seed,
            checkpoint_every=checkpoint_every,
            should_stop=should_stop,
            trajectory=self.trajectory or ALONE,
            mini_batch=self.mini_batch,
        )

    def memory(self, work: Workload) -> EditorMemory:
        tokens = TARGET_TOKENS * work.batch_size
        rows = REQUEST * min(self.mini_batch, work.batch_size)
        gradient = work.kept(rows, work.blocks_with_gradient) + work.logits(rows)
        features = 4 * tokens * work.both * work.num_matrices + 8 * (tokens**2 + tokens * work.both)
        file = None if self.hypernetwork is None else resolve(self.hypernetwork)
        return EditorMemory(
            working=gradient + features,
            columns_per_edit=TARGET_TOKENS,
            kept=float(file.stat().st_size)
            if file is not None and file.is_file()
            else ridge_network_bytes(work, self.network),
            saving="a lower editor.mini_batch or batch_size",
        )

    def training_memory(self, work: Workload, *, is_gpu: bool, reading: float) -> TrainingMemory:
        return ridge_training_bytes(
            work,
            self.network,
            self.train,
            mini_batch=self.mini_batch,
            is_gpu=is_gpu,
            reading=reading,
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The statistics of the training, and the digest of the hypernetwork; without one,
        statistics without any token.

        Raises:
            OptionError: the hypernetwork belongs to another model or to other matrices.
        """
        if self.hypernetwork is None:
            return _statistics(self.new_network(self.shapes(model), seed=0))
        network = self.trained_network(model, self.network_digest())
        return _statistics(network) | dict(self.digest_state())

    def plan(self, step: Step) -> MalmenPlan:
        """Observes the batch and finds the updates of all matrices. The weights are only read.

        Raises:
            OptionError: the run began with another hypernetwork.
        """
        model, state = step.model, step.state
        if self.hypernetwork is None:
            network = self.new_network(self.shapes(model), seed=0).to(model.device)
        else:
            network = self.trained_network(model, self.digest_of(state))
        statistics = {name: state[name].to(model.device) for name in _statistics(network)}
        factors, log_p_B = requests_features(model, network.modules, step.requests, self.mini_batch)
        network = network.with_tensors(statistics).observed(factors)
        loss = float(-log_p_B.mean())
        with torch.no_grad():
            updates = {module: network.update(module, own) for module, own in factors.items()}
        return MalmenPlan(
            summary={"probability_before": float(log_p_B.exp().mean()), "loss": loss, "steps": 1.0},
            nonfinite=None if math.isfinite(loss) else "loss",
            updates=updates,
            statistics={**state, **_statistics(network)},
        )

    def propose(self, step: Step, module: str, plan: MalmenPlan) -> LowRank:
        return plan.updates[module]

    def observe(self, step: Step, plan: MalmenPlan) -> TensorState:
        return plan.statistics


def _statistics(network: RidgeNetwork) -> dict[str, torch.Tensor]:
    """The running statistics among a network's tensors."""
    return {
        name: tensor
        for name, tensor in network.tensors.items()
        if name.rpartition(".")[2] in STATISTICS
    }
