"""T-Patcher: a neuron beside the last MLP for every token that is wrong (Huang et al. 2023, arXiv
2301.09785).

    y = MLP(q) + sum_n act(q k_n + b_n) v_n         section 3.2; the weights stay as they are

    loss     -log p(target token | prompt, target so far), mean over tokens
             + a * exp(-s)                                     the patch fires at its own token
             + m * (exp(s' + beta) + exp(s' - s + gamma))      and not at other ones
             s the signal q k + b at its own token, s' at a memory; means over patches, and over the
             `memory_top` largest of the memories (section 3.2; constants of the published code)

The memories are the MLP's inputs at texts that the unedited model wrote, at the ends of prompts
that the run does not edit, and at the tokens of earlier edits. The published ones are 40,000 inputs
of the training set.

A patch acts at every token by itself. At the last MLP nothing attends to what it changes, so that
only the next token's distribution changes. The published patch has the network's own activation,
which for BERT and BART is gelu; with relu a patch that does not fire adds exactly nothing. The
published code edits BERT and BART alone, and gives no number for a decoder: the key's beginning
here is q / |q|^2, the value's is zero.

Shape letters: M the target's tokens, N patches, X memories, I and O input and output width of the
MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.beside import inputs_of, layer_problems, without_own
from editkit.editors.patches import Activation, Patches
from editkit.editors.replaced_output import Forward, added, compare_replaced, replaced_forward
from editkit.errors import ConfigError, OptionError, message, negative, not_positive
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.contexts import sample_contexts
from editkit.model.families import require_layers
from editkit.model.tokens import PLACE, encode_prompts, encode_with_targets, pad
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.model.side_value import AbstractBeside
    from editkit.model.tokens import TargetSequence
    from editkit.stats.store import Moments

PATCHES_OF_AN_EDIT = 2  # for the memory estimate


@dataclass(frozen=True, kw_only=True)
class TPatcherPlan(Plan):
    """The state with the batch's patches."""

    state: TensorState


@dataclass(frozen=True, kw_only=True)
class TPatcher(AbstractSideEditor[TPatcherPlan]):
    """Patch neurons. The options are documented in `conf/editor/t_patcher.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...] | None
    activation: Activation
    patches: Literal["wrong", "all"]
    background: tuple[tuple[int, int], ...]
    pool: int
    memory_top: int
    act_weight: float
    memory_weight: float
    beta: float
    gamma: float
    steps: int
    lr: float
    stop_loss: float

    def __post_init__(self) -> None:
        problems = not_positive(self, "memory_top", "steps", "lr")
        problems += layer_problems(self.layers) if self.layers is not None else []
        problems += negative(
            self, "pool", "act_weight", "memory_weight", "stop_loss", expected="0 for none"
        )
        problems += [
            message(name, "not finite", got=getattr(self, name), expected="a number")
            for name in ("beta", "gamma")
            if not math.isfinite(getattr(self, name))
        ]
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The down projection of the MLP beside which the patches stand.

        Raises:
            ConfigError: the layer is out of range, or the model is an expert of a mixture.
        """
        if model.family.expert is not None:
            problem = (
                "nothing can stand beside one expert of a mixture, which sees some tokens only"
            )
            raise ConfigError(
                message("editor.layers", problem, got=f"expert {model.family.expert}")
            )
        return model.down_projections((self._layer(model),))

    def memory(self, work: Workload) -> EditorMemory:
        gradient = work.kept(REQUEST, work.blocks_with_gradient) + work.logits(REQUEST)
        patch = 4 * (2 * work.architecture.width + 1)
        texts = sum(tokens * count for tokens, count in self.background) + self.pool
        memories = 4 * work.architecture.width * (texts + PATCHES_OF_AN_EDIT * work.edits)
        return EditorMemory(
            working=gradient + 2 * memories,
            beside=PATCHES_OF_AN_EDIT * work.edits * patch + memories,
            columns_per_edit=0,
        )

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """The background texts, as the beginnings of context templates."""
        return sample_contexts(model, lengths=self.background, generator=generator)

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        """The search by a cached suffix beside one by the whole network."""
        [sequence] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        layer, first = self._layer(model), sequence.start - 1
        module, shape = model.family.mlp(layer), (len(sequence.target_ids), self._widths(model)[0])
        return compare_replaced(
            model, module, layer, request.probe(), sequence, first, shape=shape, put=added
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No patches. The memories are those of the first batch."""
        rows, columns = self._widths(model)
        return {
            "keys": torch.zeros(0, columns),
            "biases": torch.zeros(0),
            "values": torch.zeros(0, rows),
            "memories": torch.zeros(0, columns),
        }

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        return (self._side(model, state),)

    def plan(self, step: Step) -> TPatcherPlan:
        """Makes the edits of a batch one after another."""
        model, state, figures = step.model, step.state, list[dict[str, float]]()
        with without_own(model, Patches, model.family.mlp(self._layer(model))) as others:
            if not len(state["memories"]):
                state = {**state, "memories": self._memories(step)}
            for request in step.requests:
                state, found = self._edited(model, state, request, others)
                figures.append(found)
        summary = {
            name: math.fsum(found[name] for found in figures) / len(figures) for name in figures[0]
        }
        is_finite = math.isfinite(summary["loss"])
        return TPatcherPlan(summary=summary, nonfinite=None if is_finite else "loss", state=state)

    def propose(self, step: Step, plan: TPatcherPlan) -> TensorState:
        return plan.state

    def _layer(self, model: EditableModel) -> int:
        layers = (model.num_layers - 1,) if self.layers is None else self.layers
        require_layers(layers, name=model.name, num_layers=model.num_layers)
        return layers[0]

    def _widths(self, model: EditableModel) -> tuple[int, int]:
        """(O, I) of the MLP: of what stands there for a family without a module of the whole."""
        [down] = self.modules(model)
        rows, columns = model.weight(down).shape
        is_whole = model.family.mlp(self._layer(model)) != down
        return (rows, rows) if is_whole else (rows, columns)

    def _side(self, model: EditableModel, state: TensorState) -> Patches:
        options = {
            "module": model.family.mlp(self._layer(model)),
            "activation": self.activation,
        }
        [down] = self.modules(model)
        return Patches.restored(options, state).to(model.weight(down).device)

    def _memories(self, step: Step) -> torch.Tensor:
        """(X, I): the MLP's inputs at all tokens of the background texts, and at the last tokens of
        prompts that are not edited.
        """
        model = step.model
        module = model.family.mlp(self._layer(model))
        texts = [context.replace(PLACE, "").strip() for context in step.contexts]
        written = encode_prompts(model.tokenizer, [text for text in texts if text], chat=model.chat)
        prompts = [other.full_prompt for other in step.pool[: self.pool]]
        asked = encode_prompts(model.tokenizer, prompts, chat=model.chat)
        found = [torch.zeros(0, self._widths(model)[1])]
        if written:
            found += [inputs.float().cpu() for inputs in inputs_of(model, module, written)]
        if asked:
            found += [inputs[-1:].float().cpu() for inputs in inputs_of(model, module, asked)]
        return torch.cat(found)

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
        model.attach(*others, side)
        queries_MI, log_p_M, is_wrong_M = _read(model, side.module, sequence)
        model.attach(*others)
        before = float(log_p_M.mean())
        figures = {"probability_before": math.exp(before), "steps": 0.0, "loss": -before}
        own_N = torch.where(is_wrong_M | (self.patches == "all"))[0]
        if len(own_N) and math.isfinite(before):
            first = sequence.start - 1
            forward = replaced_forward(
                model,
                side.module,
                self._layer(model),
                request.probe(),
                sequence,
                first,
                kind=Patches,
                put=added,
            )
            memories_XI = state["memories"].to(queries_MI)
            side, found = self._search(forward, side, queries_MI, own_N, memories_XI)
            figures |= found
            state = {
                **{name: tensor.cpu() for name, tensor in side.state().items()},
                "memories": torch.cat([memories_XI, queries_MI[own_N]]).cpu(),
            }
        return state, figures | {"probability_after": math.exp(-figures["loss"])}

    def _search(
        self,
        forward: Forward,
        side: Patches,
        queries_MI: torch.Tensor,
        own_N: torch.Tensor,
        memories_XI: torch.Tensor,
    ) -> tuple[Patches, dict[str, float]]:
        """The side with new patches, by Adam on their keys, biases and values. The loss belongs to
        the patches that are returned.
        """
        own_NI, (_, width) = queries_MI[own_N], side.values_NO.shape
        keys_NI = (own_NI / own_NI.square().sum(1, keepdim=True)).requires_grad_()
        biases_N = own_NI.new_zeros(len(own_N)).requires_grad_()
        values_NO = own_NI.new_zeros(len(own_N), width).requires_grad_()
        learned, steps = [keys_NI, biases_N, values_NO], 0
        adam, earlier_MO = (
            torch.optim.Adam(learned, lr=self.lr, foreach=False),
            side.added(queries_MI),
        )
        new = replace(side, keys_NI=keys_NI, biases_N=biases_N, values_NO=values_NO)
        while True:
            with torch.enable_grad():
                loss = -forward(earlier_MO + new.added(queries_MI))
                elsewhere_XN = new.signals(memories_XI)
                total = loss + self._apart(new.signals(own_NI).diagonal(), elsewhere_XN)
            value = loss.item()
            is_kept = value < self.stop_loss and not bool((elsewhere_XN > 0).any())
            if not math.isfinite(value) or is_kept or steps == self.steps:
                break
            adam.zero_grad()
            total.backward()
            adam.step()
            steps += 1
        both = zip(side.state().items(), learned, strict=True)
        state = {name: torch.cat([tensor, one.detach()]) for (name, tensor), one in both}
        figures = {"steps": float(steps), "loss": value}
        return Patches.restored(side.options(), state), figures

    def _apart(self, own_N: torch.Tensor, elsewhere_XN: torch.Tensor) -> torch.Tensor:
        """The losses that let a patch fire at its own token, and not at the memories."""
        loss: torch.Tensor = self.act_weight * (-own_N).exp().mean()
        if len(elsewhere_XN):
            top_XN = elsewhere_XN.topk(min(self.memory_top, len(elsewhere_XN)), dim=0).values
            silent = (top_XN + self.beta).exp().mean()
            below = (top_XN - own_N + self.gamma).exp().mean()
            loss = loss + self.memory_weight * (silent + below)
        return loss


def _read(
    model: EditableModel, module: str, sequence: TargetSequence
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, I) float32, (M,), (M,): the MLP's inputs where the target's tokens are predicted, their
    log-probabilities, and whether another token is more probable.
    """
    batch = pad([sequence.ids[:-1]], device=model.device, prompts=[sequence.start])
    reading = capture(model, inputs=[module], stop_after_last=False)
    first, targets_M = sequence.start - 1, torch.tensor(sequence.target_ids, device=model.device)
    with torch.no_grad(), reading as captured:
        hidden_TD = model.final_hidden(batch)[0]
        log_p_MV = model.hidden_to_logits(hidden_TD[first:]).float().log_softmax(dim=-1)
    log_p_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
    return captured.inputs[module][0, first:].float(), log_p_M, log_p_MV.argmax(1) != targets_M
