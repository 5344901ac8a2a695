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

Statistics are exact: unbiased, in float64, independent of how tokens come in batches, and part of
the run's state. Differs from the published code, whose variance of a batch is n / (n - 1) times too
large, and not a number for a single target token, for good. Here fewer than two tokens have no
deviation, and are not normalised.

A mini-batch is averaged over its target tokens, as published: `mini_batch` scales the gradients.

Shape letters: O d_out, I d_in, Z = I + O, T target tokens of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.errors import ConfigError, OptionError, message
from editkit.hypernet.factors import questions
from editkit.hypernet.features import joined, target_features
from editkit.hypernet.network import Factors, Shape, name_of
from editkit.hypernet.normaliser import Normal, Normaliser
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.linalg.recursive import Memory, ridge
from editkit.model.tokens import encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments

Matrix = Literal["gate", "up", "down"]
ORDER: tuple[Matrix, ...] = ("gate", "up", "down")  # of a forward pass
TARGET_TOKENS = 3  # of a request, typically


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

    def __post_init__(self) -> None:
        problems = [
            message(name, "must be positive and finite", got=getattr(self, name))
            for name in ("step_size", "ridge", "mini_batch")
            if not 0 < getattr(self, name) < math.inf
        ]
        if not self.matrices or len(set(self.matrices)) < len(self.matrices):
            got, expected = list(self.matrices), "some of gate, up and down, each once"
            problems.append(message("matrices", "unusable choice", got=got, expected=expected))
        if unused := sorted(set(self.layers_of) - set(self.matrices)):
            expected = f"some of the edited matrices: {', '.join(self.matrices)}"
            problems.append(
                message("layers_of", "names other matrices", got=unused, expected=expected)
            )
        named = {"layers": self.layers} | {
            f"layers_of.{matrix}": layers for matrix, layers in self.layers_of.items()
        }
        problems += [
            message(key, "unusable layers", got=list(layers), expected="layers, each once")
            for key, layers in named.items()
            if not layers or len(set(layers)) < len(layers)
        ]
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """From below, within a layer in the order of a forward pass.

        Raises:
            ConfigError: a layer is out of range, the MLP has no such matrix, or the model is an
                expert of a mixture, which sees only some of the tokens.
        """
        if model.family.expert is not None:
            problem = "an expert of a mixture sees some target tokens only"
            got = f"expert {model.family.expert}"
            raise ConfigError(message("editor.layers", problem, got=got))
        chosen = {matrix: self.layers_of.get(matrix, self.layers) for matrix in self.matrices}
        layers = sorted(set(itertools.chain.from_iterable(chosen.values())))
        names = {layer: model.mlp_matrices([layer]) for layer in layers}
        if "gate" in chosen and any(len(of_layer) < len(ORDER) for of_layer in names.values()):
            problem = f"the MLP of {model.name} has no separate gate"
            expected = "up, down"
            raise ConfigError(
                message("editor.matrices", problem, got=list(self.matrices), expected=expected)
            )
        return tuple(
            names[layer][ORDER.index(matrix) - len(ORDER)]
            for layer in layers
            for matrix in ORDER
            if layer in chosen.get(matrix, ())
        )

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
        features, log_p_B = self._features(step.model, step.requests)
        shapes = _shapes(step.model, features)
        state, maps = dict(step.state), {}
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

    def _features(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Factors], torch.Tensor]:
        """By matrix, the features of all target tokens; and log p of each request's target."""
        modules, found, log_p = self.modules(model), list[dict[str, Factors]](), []
        for start in range(0, len(requests), self.mini_batch):
            probes = [each.probe() for each in requests[start : start + self.mini_batch]]
            texts = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
            features, log_p_B = target_features(model, modules, texts)
            found.append(features)
            log_p.append(log_p_B)
        by_module = {module: joined(part[module] for part in found) for module in modules}
        return by_module, torch.cat(log_p)

    def _update(self, features: Factors, of_inputs: Normal, of_gradients: Normal) -> LowRank:
        """D with one column a token, float32."""
        sizes_T1 = of_inputs(features.inputs_NI).square().sum(dim=1, keepdim=True)
        values_TO = -self.step_size * sizes_T1 * of_gradients(features.gradients_NO)
        keys_IT = features.inputs_NI.T
        return Memory().solve(keys_IT, values_TO.T, ridge(self.ridge)).to(dtype=torch.float32)


def _shapes(model: EditableModel, modules: Iterable[str]) -> dict[str, Shape]:
    """(O, I) by matrix."""
    return {name: (model.weight(name).shape[0], model.weight(name).shape[1]) for name in modules}
