"""MEND: one backward pass, and a trained hypernetwork turns the factors of the gradient into an
update (Mitchell et al. 2022, arXiv 2110.11309).

    -log p(target | prompt), mean over the target's tokens    one pass on the current weights
    x_t, d_t of every token t                                 the inputs of a matrix, and the
                                                              gradients of its outputs
    W - alpha * sum_t d~_t x~_t^T                             Eq. 4; `editkit.hypernet.network`
                                                              computes the pairs

The update is a `LowRank` with one column for each token whose gradient is not zero. No gradient is
formed as a matrix. The update of a batch is the sum of the updates of its requests, each computed
alone, as in the paper (section 3.1). `network` explains the sign of alpha.

A hypernetwork belongs to one model (by its fingerprint), to its matrices, and to requests that it
was not trained on.

Shape letters: O d_out, I d_in, B requests, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import Plan, Step
from editkit.editors.hypernetwork import AbstractHypernetEditor
from editkit.errors import OptionError, message
from editkit.hypernet.abstract import Shape
from editkit.hypernet.factors import gradient_factors, questions
from editkit.hypernet.learner import MendLearning
from editkit.hypernet.memory import gradient_bytes, network_bytes, training_bytes
from editkit.hypernet.network import Hypernetwork, NetworkOptions, new_hypernetwork
from editkit.hypernet.store import HYPERNETWORK, Header, Kind, resolve
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.tokens import encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, TrainingMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.hypernet.examples import Split
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class MendPlan(Plan):
    """The updates by module, all from one pass."""

    updates: Mapping[str, LowRank]


@dataclass(frozen=True, kw_only=True)
class Mend(AbstractHypernetEditor[MendPlan, Hypernetwork]):
    """A trained editor. The options are documented in `conf/editor/mend.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    kind: ClassVar[Kind] = HYPERNETWORK
    needs_network: ClassVar[bool] = True

    step_scale: float
    network: NetworkOptions

    def __post_init__(self) -> None:
        problems = []
        if not self.layers or len(set(self.layers)) < len(self.layers):
            expected = "at least one layer, each once"
            problems.append(
                message("layers", "unusable layers", got=list(self.layers), expected=expected)
            )
        if not 0 < self.step_scale < math.inf:
            problems.append(message("step_scale", "must be positive", got=self.step_scale))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """In the order of `layers`; within a layer in the order in which a pass reaches them."""
        return model.mlp_matrices(self.layers)

    def memory(self, work: Workload) -> EditorMemory:
        file = None if self.hypernetwork is None else resolve(self.hypernetwork)
        return EditorMemory(
            working=gradient_bytes(work, self.network, work.batch_size),
            columns_per_edit=REQUEST,  # one a token
            kept=float(file.stat().st_size)
            if file is not None and file.is_file()
            else network_bytes(work, self.network),
        )

    def new_network(self, shapes: Mapping[str, Shape], *, seed: int) -> Hypernetwork:
        return new_hypernetwork(shapes, self.network, seed=seed)

    def stored_network(self, header: Header, tensors: Mapping[str, torch.Tensor]) -> Hypernetwork:
        options = NetworkOptions(**header.network)
        return Hypernetwork(shapes=header.modules, options=options, tensors=tensors)

    def learning(
        self,
        model: EditableModel,
        split: Split,
        *,
        seed: int,
        checkpoint_every: int,
        should_stop: Callable[[], bool],
    ) -> MendLearning:
        return MendLearning(
            model=model,
            network=self.new_network(self.shapes(model), seed=seed),
            split=split,
            options=self.train,
            seed=seed,
            checkpoint_every=checkpoint_every,
            should_stop=should_stop,
        )

    def training_memory(self, work: Workload, *, is_gpu: bool, reading: float) -> TrainingMemory:
        return training_bytes(work, self.network, self.train, is_gpu=is_gpu, reading=reading)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The digest of the hypernetwork: a run must resume with the same one.

        Raises:
            OptionError: the hypernetwork belongs to another model or to other matrices.
        """
        self.trained_network(model, self.network_digest())
        return self.digest_state()

    def plan(self, step: Step) -> MendPlan:
        """Finds the updates; the weights are only read.

        Raises:
            OptionError: the run began with another hypernetwork.
        """
        model = step.model
        network = self.trained_network(model, self.digest_of(step.state))
        probes = [request.probe() for request in step.requests]
        texts = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
        factors, log_p_B = gradient_factors(model, network.modules, texts)
        updates = {}
        with torch.no_grad():
            for module, pairs in factors.items():
                counts_BT = pairs.counts_N
                left_BTO, right_BTI = network.transform(module, pairs)
                updates[module] = LowRank(
                    (self.step_scale * left_BTO[counts_BT]).T.contiguous(),
                    right_BTI[counts_BT].T.contiguous(),
                )
        loss = float(-log_p_B.mean())
        summary = {"probability_before": float(log_p_B.exp().mean()), "loss": loss, "steps": 1.0}
        return MendPlan(
            summary=summary, nonfinite=None if math.isfinite(loss) else "loss", updates=updates
        )

    def propose(self, step: Step, module: str, plan: MendPlan) -> LowRank:
        return plan.updates[module]
