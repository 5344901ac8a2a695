"""CrispEdit: fine-tuning in directions in which the curvature of the loss on common text is small
(Ikram et al. 2026, "CrispEdit: Low-Curvature Projections for Scalable Non-Destructive LLM Editing",
arXiv 2602.15823, ICML 2026, and its code).

The curvature of a matrix W is taken as A (x) B, A = E[x x^T] of its inputs and B = E[g g^T] of the
gradients of its outputs over common text (`editkit.linalg.kronecker`). The eigen-pairs with the
largest products, which hold the share `energy` of their sum, are protected: P projects onto the
others.

    order: step        Adam moves W; the whole step S is projected, P(S): W stays in the subspace
    order: gradient    the gradient is projected before Adam, as in the published code: Adam scales
                       each entry by itself, so the step leaves the subspace

A is the second moment C of the keys, as MEMIT's; B is taken over `texts` documents of the same
corpus on the unedited model. After each batch the sums over its own tokens join those of the texts,
token for token, so that later batches spare earlier edits, too. Each batch takes the eigenvectors
of A and of B anew, I^3 and O^3, as published.

The loss is FT's, the mean over requests of -log p of the target. Adam begins anew with each batch.

Differs from the published code: A and B keep their sides for every model (one of its paths swaps
them for all but two); A comes from all documents of the corpus, B from `texts`.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Step
from editkit.editors.curvature import Curvature, curvature, text_sequences
from editkit.editors.fine_tuning import Epochs, FineTuned, fine_tuned
from editkit.errors import ConfigError, OptionError, message
from editkit.linalg.kronecker import low_curvature
from editkit.model.tokens import TargetSequence, encode_with_targets
from editkit.resources.workload import EditorMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class CrispEdit(AbstractEditor[FineTuned]):
    """Projected fine-tuning. The options are documented in `conf/editor/crispedit.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    epochs: int
    mini_batch: int
    lr: float
    stop_loss: float
    energy: float
    order: Literal["step", "gradient"]
    texts: int
    text_length: int

    def __post_init__(self) -> None:
        problems = self._epochs.problems()
        if not self.layers or len(set(self.layers)) < len(self.layers):
            expected = "at least one layer, each once"
            problems.append(
                message("layers", "unusable layers", got=list(self.layers), expected=expected)
            )
        if not 0 < self.energy < 1:
            expected = "above 0, below 1"
            problems.append(message("energy", "out of range", got=self.energy, expected=expected))
        problems += [
            message(name, "out of range", got=getattr(self, name), expected=f"at least {least}")
            for name, least in (("texts", 1), ("text_length", 2))
            if getattr(self, name) < least
        ]
        if problems:
            raise OptionError(problems)

    @property
    def needs_moments(self) -> bool:
        return True

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def memory(self, work: Workload) -> EditorMemory:
        training = self._epochs.memory(work)
        squares = sum(rows**2 + columns**2 for rows, columns in work.shapes)
        # The sums, before and after a batch, and the eigenvectors.
        return EditorMemory(
            working=training.working + 2 * 8 * squares,
            columns_per_edit=0,
            kept=8.0 * squares,
            saving=training.saving,
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The sums over texts.

        Raises:
            ConfigError: second moments without texts, as imported ones.
        """
        modules = self.modules(model)
        sequences = text_sequences(
            model, moments.documents[: self.texts], min(self.text_length, model.max_length)
        )
        if not sequences:
            problem = "these second moments have no texts, over which gradients are taken"
            fix = "choose stats=world, facts, text or hub"
            raise ConfigError(message("texts", problem, fix=fix))
        state: dict[str, torch.Tensor] = {}
        for module, own in curvature(model, modules, sequences).items():
            common_II = moments.second_moment(module).to(own.inputs_II) * own.tokens
            state |= Curvature(common_II, own.gradients_OO, own.tokens).state(module)
        return state

    def plan(self, step: Step) -> FineTuned:
        """Trains on the batch. The weights are only read."""
        modules = self.modules(step.model)
        projections = {
            module: low_curvature(own.inputs_II, own.gradients_OO, self.energy)
            for module in modules
            for own in [Curvature.from_state(module, step.state).to(step.model.device)]
        }
        return fine_tuned(
            step.model,
            modules,
            _sequences(step),
            self._epochs,
            change=lambda module, matrix_OI: projections[module](matrix_OI),
            changes=self.order,
        )

    def propose(self, step: Step, module: str, plan: FineTuned) -> torch.Tensor:
        return plan.updates[module]

    def observe(self, step: Step, plan: FineTuned) -> TensorState:
        """The sums with those of the batch, on the weights with it."""
        state = dict(step.state)
        found = curvature(step.model, self.modules(step.model), _sequences(step))
        for module, own in found.items():
            state |= (Curvature.from_state(module, step.state) + own).state(module)
        return state

    @property
    def _epochs(self) -> Epochs:
        return Epochs(
            number=self.epochs,
            mini_batch=self.mini_batch,
            lr=self.lr,
            is_shuffled=False,
            skip_loss=0.0,
            stop_loss=self.stop_loss,
        )


def _sequences(step: Step) -> list[TargetSequence]:
    probes = [request.probe() for request in step.requests]
    return encode_with_targets(step.model.tokenizer, probes, chat=step.model.chat)
