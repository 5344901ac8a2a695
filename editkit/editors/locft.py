"""LocFT-BF: ordinary, breadth-first fine-tuning of one matrix (Yang et al. 2026, "Fine-tuning Done
Right in Model Editing", arXiv 2509.22072, ICLR 2026, and its code).

Editing by fine-tuning usually trains on one edit until it holds, and then on the next. Here every
epoch passes over all edits of a batch, shuffled, in mini-batches:

    loss    mean over requests of -log p(target token | prompt, target so far), mean over the
            target's tokens and the end-of-sequence token after it
    step    Adam; no step for a mini-batch whose loss is below `skip_loss`
    end     after `epochs`, or after an epoch with a mean loss below `stop_loss`

The method is not sequential: the paper's batch is all edits of a run (`batch_size=<edits>`). With
smaller batches each is trained on what the earlier ones left.

Differs from the published code: the order comes from the run's seed; no token [PAD] is added to the
vocabulary; the target is tokenised with its prompt.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import AbstractEditor, Step
from editkit.editors.fine_tuning import Epochs, FineTuned, fine_tuned
from editkit.errors import ConfigError, OptionError, message
from editkit.model.families import require_layers
from editkit.model.tokens import TargetSequence, encode_with_targets
from editkit.resources.workload import EditorMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from editkit.lazy import torch
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class LocFt(AbstractEditor[FineTuned]):
    """Breadth-first fine-tuning. The options are documented in `conf/editor/locft.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    spans_devices: ClassVar[bool] = True
    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    targets: tuple[str, ...] | None  # matrices by their name within a block; None: down projections
    epochs: int
    mini_batch: int
    lr: float
    end_of_sequence: bool
    skip_loss: float
    stop_loss: float

    def __post_init__(self) -> None:
        problems = self._epochs.problems()
        for name, values in (("layers", self.layers), ("targets", self.targets)):
            if values is not None and (not values or len(set(values)) < len(values)):
                expected = "at least one, each once"
                problems.append(message(name, "unusable", got=list(values), expected=expected))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The targets of the layers, in this order. Raises ConfigError for a layer out of range."""
        if self.targets is None:
            return model.down_projections(self.layers)
        require_layers(self.layers, name=model.name, num_layers=model.num_layers)
        blocks = [model.family.block(layer) for layer in self.layers]
        return tuple(f"{block}.{target}" for block in blocks for target in self.targets)

    def memory(self, work: Workload) -> EditorMemory:
        return self._epochs.memory(work)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """Nothing. Raises ConfigError for a tokenizer without an end-of-sequence token."""
        if self.end_of_sequence and model.tokenizer.eos_token_id is None:
            problem = f"the tokenizer of {model.name} has no end-of-sequence token"
            fix = "set editor.end_of_sequence=false"
            raise ConfigError(message("end_of_sequence", problem, got=True, fix=fix))
        return {}

    def plan(self, step: Step) -> FineTuned:
        """Trains on the batch. The weights are only read."""
        sequences = self._sequences(step.model, step.requests)
        return fine_tuned(step.model, self.modules(step.model), sequences, self._epochs)

    def propose(self, step: Step, module: str, plan: FineTuned) -> torch.Tensor:
        return plan.updates[module]

    def _sequences(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> list[TargetSequence]:
        """The prompts with their targets, each with its end if that is trained, too."""
        probes = [request.probe() for request in requests]
        found = encode_with_targets(model.tokenizer, probes, chat=model.chat)
        if not self.end_of_sequence:
            return found
        end = model.tokenizer.eos_token_id
        return [
            TargetSequence(each.encoded.followed_by([(end, (last, last))]), each.start)
            for each in found
            for last in [each.encoded.spans[-1][1]]
        ]

    @property
    def _epochs(self) -> Epochs:
        return Epochs(
            number=self.epochs,
            mini_batch=self.mini_batch,
            lr=self.lr,
            is_shuffled=True,
            skip_loss=self.skip_loss,
            stop_loss=self.stop_loss,
        )
