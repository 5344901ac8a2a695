"""UltraEdit: one ridge solve on normalised gradients, without training, search or subject (Gu et
al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing", arXiv 2505.14679).

A batch passes through the model in mini-batches, forward and back. At the positions that predict
its target tokens every edited matrix has an input h_t and a gradient g_t of its output. Both are
normalised by the mean and the standard deviation of all tokens so far, this batch included, which
all matrices of a shape share. With H the inputs as they are, one row a token,

    v_t = -eta |h^_t|^2 g^_t                                     what the output should change by
    D^T = (H^T H + a I)^-1 H^T V = H^T (H H^T + a I)^-1 V

The right-hand form has the size of the batch's tokens and gives D in factors. No edit costs I^3.

`whiten: full` is StableEdit (ICML 2026): g^ = (g - mean) Sigma^-1/2. Sigma is the scatter of the
gradients over n - O - 1, once more than O + 1 tokens were seen, with eigenvalues of at least 1e-6.
Until then, and for the inputs throughout, it is the diagonal.

With `warm_up` the statistics begin with those of requests of the dataset that are not edited
(StableEdit: 20 batches of its training data, of which only statistics are kept here).

Statistics are exact: unbiased, in float64, independent of how tokens come in batches, and part of
the run's state. Differs from the published code, whose variance of a batch is n / (n - 1) times too
large, and not a number for a single target token, for good. Here fewer than two tokens have no
deviation, and are not normalised.

A mini-batch is averaged over its target tokens, as published: `mini_batch` scales the gradients.

Shape letters: O d_out, I d_in, Z = I + O, T target tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.editors.mlp_choice import Matrix, choice_problems, chosen_matrices
from editkit.errors import OptionError, message
from editkit.hypernet.abstract import Factors, Shape, name_of
from editkit.hypernet.features import joined, requests_features
from editkit.hypernet.normaliser import Normal, Normaliser
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.linalg.recursive import Memory, ridge
from editkit.resources.workload import REQUEST, TARGET_TOKENS, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class UltraEditPlan(Plan):
    """The updates by module, and the statistics with this batch."""

    updates: Mapping[str, LowRank]
    statistics: TensorState


@dataclass(frozen=True, kw_only=True)
class UltraEdit(AbstractEditor[UltraEditPlan]):
    """Ridge regression on normalised gradients. The options are documented in
    `conf/editor/ultraedit.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    layers_of: Mapping[str, tuple[int, ...]]  # of a matrix that has its own
    step_size: float  # eta
    ridge: float  # a
    mini_batch: int
    whiten: Literal["diagonal", "full"]
    warm_up: int = 0

    def __post_init__(self) -> None:
        problems = [
            message(name, "must be positive and finite", got=getattr(self, name))
            for name in ("step_size", "ridge", "mini_batch")
            if not 0 < getattr(self, name) < math.inf
        ]
        if self.warm_up < 0:
            got, expected = self.warm_up, "0 for none"
            problems.append(message("warm_up", "must not be negative", got=got, expected=expected))
        problems += choice_problems(self.layers, self.matrices, self.layers_of)
        if problems:
            raise OptionError(problems)

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Refuses a warm-up for which the dataset has too few other requests."""
        edited = {request.id for request in requests}
        others = sum(request.id not in edited for request in data.requests)
        if others >= self.warm_up:
            return []
        problem = "too few requests of the dataset are not edited"
        fix = "make fewer edits, or set editor.warm_up lower"
        got, expected = f"{others} of {len(data.requests)}", f"at least {self.warm_up}"
        return [message("warm_up", problem, got=got, expected=expected, fix=fix)]

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """As `chosen_matrices`."""
        return chosen_matrices(model, self.layers, self.matrices, self.layers_of)

    def memory(self, work: Workload) -> EditorMemory:
        tokens = TARGET_TOKENS * work.batch_size
        rows = REQUEST * min(self.mini_batch, work.batch_size)
        kept = sum(
            8 * (2 * (rows_ + columns) + (rows_**2 if self.whiten == "full" else 0))
            for rows_, columns in set(work.shapes)
        )
        eigen = max(24 * rows_**2 for rows_, _ in work.shapes) if self.whiten == "full" else 0
        gradient = work.kept(rows, work.blocks_with_gradient) + work.logits(rows)
        features = 4 * tokens * work.both * work.num_matrices + 8 * (tokens**2 + tokens * work.both)
        return EditorMemory(
            working=gradient + features + eigen + kept,  # the statistics before and after
            columns_per_edit=TARGET_TOKENS,
            kept=float(kept),
            saving="a lower editor.mini_batch or batch_size",
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """Statistics without any token."""
        whitens = self.whiten == "full"
        state: dict[str, torch.Tensor] = {}
        for shape in dict.fromkeys(_shapes(model, self.modules(model)).values()):
            state |= Normaliser.empty(shape, whitens=whitens).state(name_of(shape))
        return state

    def plan(self, step: Step) -> UltraEditPlan:
        """Observes the batch and finds the updates of all matrices. The weights are only read."""
        before = self._warmed_up(step)
        features, log_p_B = requests_features(
            step.model, self.modules(step.model), step.requests, self.mini_batch
        )
        shapes = _shapes(step.model, features)
        state, maps = dict(before), {}
        for shape in dict.fromkeys(shapes.values()):
            name, own = name_of(shape), [features[key] for key in shapes if shapes[key] == shape]
            normaliser = Normaliser.from_state(name, state).plus(joined(own))
            state |= normaliser.state(name)
            maps[shape] = normaliser.maps()
        loss = float(-log_p_B.mean())
        return UltraEditPlan(
            summary={"probability_before": float(log_p_B.exp().mean()), "loss": loss, "steps": 1.0},
            nonfinite=None if math.isfinite(loss) else "loss",
            updates={
                module: self._update(own, *maps[shapes[module]]) for module, own in features.items()
            },
            statistics=state,
        )

    def propose(self, step: Step, module: str, plan: UltraEditPlan) -> LowRank:
        return plan.updates[module]

    def observe(self, step: Step, plan: UltraEditPlan) -> TensorState:
        return plan.statistics

    def _warmed_up(self, step: Step) -> TensorState:
        """The state; before the first edit with the statistics of the warm-up."""
        modules, state = self.modules(step.model), dict(step.state)
        shapes = _shapes(step.model, modules)
        names = dict.fromkeys(map(name_of, shapes.values()))
        if any(float(state[f"{name}.inputs.count"]) for name in names):
            return state
        asked = step.pool[: self.warm_up]
        for start in range(0, len(asked), self.mini_batch):
            part = asked[start : start + self.mini_batch]
            features, _ = requests_features(step.model, modules, part, self.mini_batch)
            for name in names:
                own = [features[key] for key in modules if name_of(shapes[key]) == name]
                state |= Normaliser.from_state(name, state).plus(joined(own)).state(name)
        return state

    def _update(self, features: Factors, of_inputs: Normal, of_gradients: Normal) -> LowRank:
        """D with one column a token, float32."""
        sizes_T1 = of_inputs(features.inputs_NI).square().sum(dim=1, keepdim=True)
        values_TO = -self.step_size * sizes_T1 * of_gradients(features.gradients_NO)
        keys_IT = features.inputs_NI.T
        return Memory().solve(keys_IT, values_TO.T, ridge(self.ridge)).to(dtype=torch.float32)


def _shapes(model: EditableModel, modules: Iterable[str]) -> dict[str, Shape]:
    """(O, I) by matrix."""
    return {name: (model.weight(name).shape[0], model.weight(name).shape[1]) for name in modules}
