"""GRACE: a codebook beside one matrix (Hartvigsen et al. 2023, arXiv 2211.11031).

    key      the matrix's input at the prompt's last token
    value    what stands in for the matrix's output there, found by Adam on
             -log p(target token | prompt, target so far), mean over the target's tokens
    radius   how far from its key an entry acts; entries split and grow (`Codebook.placed`)

The weights stay as they are. Text without a covered prompt gives the unedited model's numbers, bit
for bit. Each sequence is looked up once, by its own last prompt token, whatever the batch and the
cache. EasyEdit's port looks up at one position of the whole batch, keeps that position from call to
call, and puts each label at another entry's key; it compares answers by the mean of their token
ids.

`replace=prompt` puts the value at every token of the prompt (original code), `last` at its last one
(EasyEdit's port).

Shape letters: I and O input and output width of the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.beside import Matrix, layer_problems, matrix_beside
from editkit.editors.codebook import Codebook, Replaced
from editkit.editors.ft import log_probabilities
from editkit.editors.replaced_output import Forward, compare_replaced, replaced_forward
from editkit.errors import OptionError, message, not_positive
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.model.tokens import TargetSequence
    from editkit.stats.store import Moments

ENTRY_BYTES = 4 + 8 * 4  # of an entry besides its key and value: a radius and a short answer


@dataclass(frozen=True, kw_only=True)
class GracePlan(Plan):
    """The codebook with the batch's entries."""

    codebook: Codebook


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the search for one value found."""

    value_O: torch.Tensor
    before: float  # the target's probability without the edit
    after: float
    loss: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Grace(AbstractSideEditor[GracePlan]):
    """A codebook of values. The options are documented in `conf/editor/grace.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    matrix: Matrix
    replace: Replaced
    radius: float
    start: Literal["random", "output"]
    steps: int
    lr: float
    stop_loss: float

    def __post_init__(self) -> None:
        problems = not_positive(self, "radius", "steps", "lr")
        problems += layer_problems(self.layers)
        if not 0 <= self.stop_loss < math.inf:
            expected = "0 for none"
            problems.append(
                message("stop_loss", "must not be negative", got=self.stop_loss, expected=expected)
            )
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The matrix beside which the codebook stands (`matrix_beside`)."""
        return (matrix_beside(model, self.layers, self.matrix),)

    def memory(self, work: Workload) -> EditorMemory:
        gradient = work.kept(REQUEST, work.blocks_with_gradient) + work.logits(REQUEST)
        return EditorMemory(
            working=gradient, beside=work.edits * (4 * work.both + ENTRY_BYTES), columns_per_edit=0
        )

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        """The search by a cached suffix beside one by the whole network."""
        [sequence] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        (module,), first, layer = self.modules(model), self._first(sequence), self.layers[0]
        shape = model.weight(module).shape[:1]
        return compare_replaced(model, module, layer, request.probe(), sequence, first, shape=shape)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        (module,) = self.modules(model)
        rows, columns = model.weight(module).shape
        return Codebook.empty(module, self.replace, (rows, columns)).state()

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        return (self._codebook(model, state),)

    def plan(self, step: Step) -> GracePlan:
        """Finds the value of each request in turn, beside the entries before it."""
        codebook, found = self._codebook(step.model, step.state), list[_Found]()
        for request in step.requests:
            codebook, one = self._edited(step.model, codebook, request)
            found.append(one)
        losses = [one.loss for one in found]
        summary = {
            "probability_before": math.fsum(one.before for one in found) / len(found),
            "probability_after": math.fsum(one.after for one in found) / len(found),
            "steps": math.fsum(one.steps for one in found) / len(found),
            "loss": math.fsum(losses) / len(found),
        }
        is_finite = all(map(math.isfinite, losses))
        return GracePlan(
            summary=summary, nonfinite=None if is_finite else "loss", codebook=codebook
        )

    def propose(self, step: Step, plan: GracePlan) -> TensorState:
        return plan.codebook.state()

    def _codebook(self, model: EditableModel, state: TensorState) -> Codebook:
        (module,) = self.modules(model)
        options = {"module": module, "replace": self.replace}
        return Codebook.restored(options, state).to(model.weight(module).device)

    def _edited(
        self, model: EditableModel, codebook: Codebook, request: EditRequest
    ) -> tuple[Codebook, _Found]:
        """The codebook with the entry of one request."""
        [sequence] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        log_probability, module = log_probabilities(model, [request], "target"), codebook.module
        last = sequence.start - 1
        reading = capture(model, inputs=[module], outputs=[module], stop_after_last=False)
        with torch.no_grad(), reading as captured:
            before = float(log_probability().exp())
        query_I = captured.inputs[module][0, last].float()
        entry = codebook.entry_for(query_I, sequence.target_ids, self.radius)
        if entry is not None:
            start_O = codebook.values_NO[entry]
        elif self.start == "output":
            start_O = captured.outputs[module][0, last].float()
        else:
            start_O = torch.rand(codebook.values_NO.shape[1]).to(query_I)
        first, layer = self._first(sequence), self.layers[0]
        forward = replaced_forward(model, module, layer, request.probe(), sequence, first)
        found = self._search(forward, start_O, before)
        codebook, _ = codebook.placed(
            query_I, sequence.target_ids, found.value_O, radius=self.radius
        )
        return codebook, found

    def _first(self, sequence: TargetSequence) -> int:
        """The first token whose output the value replaces."""
        return sequence.start - 1 if self.replace == "last" else 0

    def _search(self, forward: Forward, start_O: torch.Tensor, before: float) -> _Found:
        """Adam on the value alone. The loss belongs to the value that is returned."""
        value_O, steps = start_O.clone().requires_grad_(), 0
        adam = torch.optim.Adam([value_O], lr=self.lr)
        while True:
            with torch.enable_grad():
                loss = -forward(value_O)
            value = loss.item()
            if not math.isfinite(value) or value < self.stop_loss or steps == self.steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            steps += 1
        return _Found(
            value_O=value_O.detach(), before=before, after=math.exp(-value), loss=value, steps=steps
        )
