"""WISE: a side memory, a copy of one FFN matrix, that answers edited prompts (Wang et al. 2024,
arXiv 2405.14768).

    loss     -log p(target token | context, prompt, target so far), mean over tokens and contexts
             + mean relu(d_i - alpha) + mean relu(beta - d_e) + mean relu(d_i - d_e + gamma)
             d  the mean over a prompt's tokens of |W' x - W x|; e of the edit after each context,
                i of an irrelevant text
    step     SGD on the entries of a random mask, |W' - W| <= norm_constraint entry by entry
    shards   after so many edits a memory is closed, and a new one starts at W with a new mask
    merge    TIES over the closed memories (arXiv 2306.01708); `merge_every=0` keeps all of them and
             chooses among them (the paper's WISE-Retrieve)
    routing  a prompt goes to the memory with the largest d, if it exceeds `act_ratio` times the
             smallest d of that memory's edits; else the weights answer

Each prompt is routed by its own tokens. EasyEdit's port takes the mean over the whole batch, reads
the largest token alone beyond 100 tokens, keeps its history in the process, and compares outputs
after the network's activation function. Its irrelevant texts are the records' locality prompts, on
which locality is measured; here they are the texts that the unedited model wrote as contexts. Its
weight decay shrinks the whole copy of W; here it acts on the mask's entries alone.

A merged memory keeps the smallest d of its parts, which were measured before they were merged.

Shape letters: K memories, I and O input and output width of the matrix, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.beside import Matrix, inputs_of, layer_problems, matrix_beside, without_own
from editkit.editors.ft import answers_log_probabilities
from editkit.editors.memories import Memories
from editkit.errors import OptionError, message, negative, not_positive
from editkit.lazy import torch
from editkit.linalg.ties import ties
from editkit.model.contexts import sample_contexts
from editkit.model.tokens import PLACE, encode_prompts, encode_with_targets, fill
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside
    from editkit.stats.store import Moments

# The smallest distance of a memory that every prompt is sent to, and of one that has no edits: a
# state is finite.
ALWAYS, NEVER = -1.0, 3e38


@dataclass(frozen=True, kw_only=True)
class WisePlan(Plan):
    """The state with the batch's edits."""

    state: TensorState


@dataclass(frozen=True, kw_only=True)
class Wise(AbstractSideEditor[WisePlan]):
    """Side memories. The options are documented in `conf/editor/wise.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    name: str
    layers: tuple[int, ...]
    matrix: Matrix
    context_lengths: tuple[tuple[int, int], ...]
    alpha: float
    beta: float
    gamma: float
    act_ratio: float
    mask_ratio: float
    shard: int
    merge_every: int
    density: float
    steps: int
    lr: float
    weight_decay: float
    norm_constraint: float
    stop_loss: float
    stop_change: float

    def __post_init__(self) -> None:
        problems = not_positive(self, "act_ratio", "shard", "steps", "lr", "norm_constraint")
        problems += layer_problems(self.layers)
        problems += [
            message(name, "is not a share", got=getattr(self, name), expected="above 0, at most 1")
            for name in ("mask_ratio", "density")
            if not 0 < getattr(self, name) <= 1
        ]
        problems += negative(
            self, "alpha", "beta", "gamma", "weight_decay", "stop_loss", "stop_change"
        )
        if self.merge_every < 0 or self.merge_every % max(self.shard, 1):
            expected = f"0 for never, or a multiple of shard ({self.shard})"
            problems.append(
                message(
                    "merge_every", "no shard ends there", got=self.merge_every, expected=expected
                )
            )
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The matrix of which the memories are copies (`matrix_beside`)."""
        return (matrix_beside(model, self.layers, self.matrix),)

    def memory(self, work: Workload) -> EditorMemory:
        texts = 1 + sum(count for _, count in self.context_lengths)
        gradient = work.kept(REQUEST * texts, work.blocks_with_gradient)
        closed = (
            work.edits // self.shard if self.merge_every == 0 else self.merge_every // self.shard
        )
        memories = 1 + min(closed, work.edits // self.shard)
        return EditorMemory(
            working=3 * 4 * work.matrix + gradient + work.logits(REQUEST * texts),
            beside=memories * 4 * work.matrix + work.matrix,
            columns_per_edit=0,
        )

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        return sample_contexts(model, lengths=self.context_lengths, generator=generator)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """One memory equal to W, which answers no prompt."""
        (module,) = self.modules(model)
        return self._opened({}, tuple(model.weight(module).shape))

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        (module,) = self.modules(model)
        side = Memories(
            module=module,
            act_ratio=self.act_ratio,
            differences_KOI=state["differences"],
            least_K=state["least"],
        )
        return (side.to(model.weight(module).device),)

    def plan(self, step: Step) -> WisePlan:
        """Makes the edits of a batch one after another."""
        state, figures = step.state, list[dict[str, float]]()
        for request in step.requests:
            state, found = self._edited(step, state, request)
            figures.append(found)
        summary = {
            name: math.fsum(found[name] for found in figures) / len(figures) for name in figures[0]
        }
        is_finite = math.isfinite(summary["loss"])
        return WisePlan(summary=summary, nonfinite=None if is_finite else "loss", state=state)

    def propose(self, step: Step, plan: WisePlan) -> TensorState:
        return plan.state

    def _opened(self, state: TensorState, shape: tuple[int, ...]) -> TensorState:
        """The state with one more memory, equal to W."""
        new = {
            "differences": torch.zeros(1, *shape),
            "least": torch.full((1,), NEVER),
            "counts": torch.zeros(1, dtype=torch.int64),
        }
        grown = {
            name: torch.cat([state[name], tensor]) if state else tensor
            for name, tensor in new.items()
        }
        return {**grown, "mask": torch.rand(shape) < self.mask_ratio}

    def _closed(self, state: TensorState) -> TensorState:
        """The state after an edit: with a new memory if the present one is full, and with the
        closed ones merged if that is due.
        """
        counts_K = state["counts"]
        if int(counts_K[-1]) < self.shard:
            return state
        if self.merge_every and int(counts_K.sum()) % self.merge_every == 0 and len(counts_K) > 1:
            state = {
                "differences": ties(state["differences"], self.density)[None],
                "least": state["least"].amin(0, keepdim=True),
                "counts": counts_K.sum(0, keepdim=True),
            }
        return self._opened(state, tuple(state["differences"].shape[1:]))

    def _edited(
        self, step: Step, state: TensorState, request: EditRequest
    ) -> tuple[TensorState, dict[str, float]]:
        """The state with one more edit in its last memory, and the search's figures."""
        model = step.model
        (module,) = self.modules(model)
        with without_own(model, Memories, module) as others:
            difference_OI, least, found = self._search(step, state, request, others)
        differences_KOI, least_K = state["differences"].clone(), state["least"].clone()
        counts_K = state["counts"].clone()
        differences_KOI[-1] = difference_OI
        least_K[-1] = torch.minimum(least_K[-1], torch.tensor(least))
        counts_K[-1] += 1
        edited = {"differences": differences_KOI, "least": least_K, "counts": counts_K}
        return self._closed({**edited, "mask": state["mask"]}), found

    def _search(
        self,
        step: Step,
        state: TensorState,
        request: EditRequest,
        others: Sequence[AbstractBeside],
    ) -> tuple[torch.Tensor, float, dict[str, float]]:
        """The memory with the edit, its distance at the bare prompt, and figures."""
        model = step.model
        (module,) = self.modules(model)
        device, weight_OI = model.weight(module).device, model.weight(module).float()
        texts = [
            fill(request.prompt, request.subject, context=context).text for context in step.contexts
        ]
        probes = [request.probe(prompt=text) for text in texts]
        encoded = encode_with_targets(model.tokenizer, probes, chat=model.chat)
        prompts = [sequence.ids[: sequence.start] for sequence in encoded]
        foreign = [context.replace(PLACE, "").strip() for context in step.contexts]
        rows = encode_prompts(model.tokenizer, [text for text in foreign if text], chat=model.chat)
        inputs = inputs_of(model, module, [*prompts, *rows])
        own, irrelevant = inputs[: len(prompts)], inputs[len(prompts) :]
        mask_OI = state["mask"].to(device)
        difference_OI = state["differences"][-1].to(device, copy=True).requires_grad_()
        run, before, last, steps = answers_log_probabilities(model, probes), None, math.inf, 0
        while True:
            side = Memories(
                module=module,
                act_ratio=1.0,
                differences_KOI=difference_OI[None],
                least_K=torch.full((1,), ALWAYS, device=device),
            )
            with torch.enable_grad():
                model.attach(*others, side)
                log_p_B = run()
                edit_loss = -log_p_B.mean()
                loss = edit_loss + self._margins(side, own, irrelevant)
            value = float(edit_loss.detach())
            before = log_p_B.detach() if before is None else before
            is_done = value <= self.stop_loss and abs(last - value) <= self.stop_change
            if not math.isfinite(float(loss.detach())) or is_done or steps == self.steps:
                break
            [gradient_OI] = torch.autograd.grad(loss, difference_OI)
            with torch.no_grad():
                gradient_OI = gradient_OI + self.weight_decay * (weight_OI + difference_OI)
                moved_OI = difference_OI - self.lr * mask_OI * gradient_OI
                moved_OI = moved_OI.clamp(-self.norm_constraint, self.norm_constraint)
                difference_OI = moved_OI.requires_grad_()
            last, steps = value, steps + 1
        with torch.no_grad():
            least = float(side.distances(own[0]).mean())
        figures = {
            "probability_before": float(before[0].exp()),
            "probability_after": float(log_p_B[0].detach().exp()),
            "steps": float(steps),
            "loss": float(loss.detach()),
        }
        return difference_OI.detach().cpu(), least, figures

    def _margins(
        self, side: Memories, own: Sequence[torch.Tensor], irrelevant: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The loss that keeps distances of edits and of irrelevant texts apart."""
        edits = torch.stack([side.distances(inputs_NI).mean() for inputs_NI in own])
        loss = (self.beta - edits).relu().mean()
        if irrelevant:
            others = torch.stack([side.distances(inputs_NI).mean() for inputs_NI in irrelevant])
            pairs = others[:, None] - edits[None] + self.gamma
            loss = loss + (others - self.alpha).relu().mean() + pairs.relu().mean()
        return loss
