"""MEMOIR: a memory whose columns each edit masks (Wang et al. 2025, arXiv 2506.07899).

    h = W_0 x + M (x * mask)     M is 0 at first; each edit trains the columns of its own mask

    mask       a fixed random permutation of the `columns` largest coordinates of |f - f_0|
    f          the mean of the matrix's inputs over the prompt's tokens
    f_0        the same mean over background texts, which the unedited model wrote
    step       SGD on M, on -log p(target token | prompt, target so far), mean over the tokens;
               the gradient's norm is clipped
    routing    a prompt takes the mask of the edit whose columns it shares most of, if they are at
               least `least_overlap` of all; else the weights answer

It is written from a description of the method and of its numbers, not from the authors' code, and
was not compared with their results. Weight decay shrinks the mask's columns alone. A prompt that
has the mask of an earlier edit takes its place.

Shape letters: N edits, K columns of a mask, I and O input and output width of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.beside import Matrix, inputs_of, layer_problems, matrix_beside, without_own
from editkit.editors.ft import log_probabilities
from editkit.editors.masked_memory import MaskedMemory
from editkit.errors import ConfigError, OptionError, message, negative, not_positive
from editkit.lazy import torch
from editkit.model.contexts import sample_contexts
from editkit.model.tokens import PLACE, encode_prompts, encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside
    from editkit.stats.store import Moments

ALWAYS = 0.0  # the overlap from which on every prompt is sent


@dataclass(frozen=True, kw_only=True)
class MemoirPlan(Plan):
    """The state with the batch's edits."""

    state: TensorState


@dataclass(frozen=True, kw_only=True)
class Memoir(AbstractSideEditor[MemoirPlan]):
    """A masked memory. The options are documented in `conf/editor/memoir.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    name: str
    layers: tuple[int, ...]
    matrix: Matrix
    columns: int
    least_overlap: float
    background: tuple[tuple[int, int], ...]
    steps: int
    lr: float
    weight_decay: float
    clip: float
    stop_loss: float

    def __post_init__(self) -> None:
        problems = not_positive(self, "columns", "steps", "lr", "clip")
        problems += layer_problems(self.layers)
        if not 0 < self.least_overlap <= 1:
            share, expected = self.least_overlap, "above 0, at most 1"
            problems.append(
                message("least_overlap", "is not a share", got=share, expected=expected)
            )
        problems += negative(self, "weight_decay", "stop_loss", expected="0 for none")
        if not sum(count for _, count in self.background) > 0:
            expected = "at least one text"
            got = [list(pair) for pair in self.background]
            problems.append(message("background", "no text", got=got, expected=expected))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The matrix beside which the memory stands (`matrix_beside`).

        Raises:
            ConfigError: a mask has more columns than the matrix.
        """
        module = matrix_beside(model, self.layers, self.matrix)
        if (width := model.weight(module).shape[1]) < self.columns:
            problem = f"a mask has more columns than {module}"
            raise ConfigError(
                message("editor.columns", problem, got=self.columns, expected=f"at most {width}")
            )
        return (module,)

    def memory(self, work: Workload) -> EditorMemory:
        gradient = work.kept(REQUEST, work.blocks_with_gradient) + work.logits(REQUEST)
        masks = work.edits * 4 * (self.columns + work.architecture.inner)
        return EditorMemory(
            working=3 * 4 * work.matrix + gradient,
            beside=4 * work.matrix + masks,
            columns_per_edit=0,
        )

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """The background texts, as the beginnings of context templates."""
        return sample_contexts(model, lengths=self.background, generator=generator)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """A memory of zeros, no masks, and a random permutation. The background's mean is that of
        the first batch.
        """
        (module,) = self.modules(model)
        rows, columns = model.weight(module).shape
        return {
            "memory": torch.zeros(rows, columns),
            "masks": torch.zeros(0, self.columns, dtype=torch.int32),
            "mean": torch.zeros(columns),
            "order": torch.randperm(columns),
        }

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        return (self._side(model, state),)

    def plan(self, step: Step) -> MemoirPlan:
        """Makes the edits of a batch one after another."""
        model, figures = step.model, list[dict[str, float]]()
        state = step.state
        with without_own(model, MaskedMemory, self.modules(model)[0]) as others:
            if not len(state["masks"]):
                state = {**state, "mean": self._background(step)}
            for request in step.requests:
                state, found = self._edited(model, state, request, others)
                figures.append(found)
        summary = {
            name: math.fsum(found[name] for found in figures) / len(figures) for name in figures[0]
        }
        is_finite = math.isfinite(summary["loss"])
        return MemoirPlan(summary=summary, nonfinite=None if is_finite else "loss", state=state)

    def propose(self, step: Step, plan: MemoirPlan) -> TensorState:
        return plan.state

    def _side(self, model: EditableModel, state: TensorState) -> MaskedMemory:
        (module,) = self.modules(model)
        options = {"module": module, "least_overlap": self.least_overlap}
        return MaskedMemory.restored(options, state).to(model.weight(module).device)

    def _background(self, step: Step) -> torch.Tensor:
        """(I,): the mean input over the background texts, each counted once."""
        model = step.model
        texts = [context.replace(PLACE, "").strip() for context in step.contexts]
        rows = encode_prompts(model.tokenizer, [text for text in texts if text], chat=model.chat)
        (module,) = self.modules(model)
        if not rows:  # all of them are blank
            return torch.zeros(model.weight(module).shape[1])
        inputs = inputs_of(model, module, rows)
        means_NI = torch.stack([inputs_TI.float().mean(0) for inputs_TI in inputs])
        mean_I: torch.Tensor = means_NI.mean(0).cpu()
        return mean_I

    def _edited(
        self,
        model: EditableModel,
        state: TensorState,
        request: EditRequest,
        others: Sequence[AbstractBeside],
    ) -> tuple[TensorState, dict[str, float]]:
        """The state with one more edit, and the search's figures."""
        side = self._side(model, state)
        [sequence] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        [inputs_NI] = inputs_of(model, side.module, [sequence.ids[: sequence.start]])
        mask_1K = side.masks(inputs_NI.float().mean(0, keepdim=True)).int()
        columns_I = torch.zeros(side.memory_OI.shape[1], device=model.device)
        columns_I[mask_1K[0].long()] = 1
        memory_OI = side.memory_OI.clone().requires_grad_()
        run, before, steps = log_probabilities(model, [request], "target"), None, 0
        only = replace(side, masks_NK=mask_1K, least_overlap=ALWAYS)
        while True:
            with torch.enable_grad():
                model.attach(*others, replace(only, memory_OI=memory_OI))
                log_p_B = run()
                loss = -log_p_B.mean()
            value = float(loss.detach())
            before = float(log_p_B.detach().exp()) if before is None else before
            if not math.isfinite(value) or value < self.stop_loss or steps == self.steps:
                break
            [gradient_OI] = torch.autograd.grad(loss, memory_OI)
            with torch.no_grad():
                gradient_OI = gradient_OI + self.weight_decay * columns_I * memory_OI
                gradient_OI *= (self.clip / gradient_OI.norm().clamp(min=1e-12)).clamp(max=1)
                memory_OI = (memory_OI - self.lr * gradient_OI).requires_grad_()
            steps += 1
        figures = {
            "probability_before": before,
            "probability_after": math.exp(-value),
            "steps": float(steps),
            "loss": value,
        }
        masks_NK, is_new = side.masks_NK, True
        if len(masks_NK):
            is_new = float(side.overlaps(mask_1K).max()) < 1
        masks_NK = torch.cat([masks_NK, mask_1K]) if is_new else masks_NK
        edited = {"memory": memory_OI.detach().cpu(), "masks": masks_NK.cpu()}
        return {**state, **edited}, figures
