"""The training of SERAC's pair (Mitchell et al. 2022, arXiv 2206.06520, section 3.2): a generator
of records, and of states from which training resumes bit for bit.

    edit_loss        -log p(target | edit, prompt), mean over the target's tokens, over an edit's
                     prompt and one of its paraphrases; of the counterfactual model
    locality_loss    -log s for a paraphrase and its edit, -log(1 - s) for a locality text and its
                     edit, and for a paraphrase and the other edits of the step; the mean of the
                     three means, s = exp(-|A f_q - A f_c|^2); of the classifier's head
    loss             edit_weight * edit_loss + locality_weight * locality_loss

The features are those of the counterfactual model as it is at that step; no gradient flows into
them. The validation measures each edit alone, in scope at a similarity of 0.5.

Shape letters: N edits of a step, M texts, F width of the features, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from editkit.datasets.separators import joined
from editkit.editors.scoped_memory import NETWORK, ScopedMemory, distances
from editkit.editors.serac import HEAD, ScopeOptions, Serac, counterfactual_of
from editkit.hypernet.examples import Example, Split, examples
from editkit.hypernet.learning import (
    PROTOCOL,
    TIMING,
    VIEW,
    Diverged,
    Event,
    LearningState,
    copied,
)
from editkit.lazy import torch
from editkit.model.tokens import TargetSequence, encode_prompts, encode_with_targets
from editkit.types import EvalRecord, Measurement, Probe, StepRecord, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

IN_SCOPE = 0.5
REACH = -math.log(IN_SCOPE)  # the squared distance of that similarity
TINY = 1e-6  # the least squared distance in a logarithm


@dataclass(frozen=True, kw_only=True)
class PairLearning:
    """A training: the model, the editor, the data and the options."""

    model: EditableModel
    editor: Serac
    split: Split
    seed: int
    checkpoint_every: int = 100
    should_stop: Callable[[], bool] = lambda: False

    @property
    def options(self) -> ScopeOptions:
        return self.editor.train

    def run(self, state: LearningState | None = None) -> Iterator[Event]:
        """Trains from the beginning, or resumes from `state`, as `Learning.run`.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        learner, options = _Learner(self, state), self.options
        if state is None:
            yield StepRecord(step=0)
            yield from learner.validate()
            yield learner.state()
        while learner.step < options.steps and not learner.is_stuck:
            record = learner.take_step()
            if record.nonfinite:
                yield learner.state()  # the state before the step
                yield record
                raise Diverged(record)
            yield record
            due = learner.step % options.validate_every == 0 or learner.step == options.steps
            if due:
                yield from learner.validate()
            stopping = self.should_stop()
            if stopping or due or learner.step % self.checkpoint_every == 0 or learner.is_stuck:
                yield learner.state()
            if stopping:
                return

    def config(self) -> dict[str, Any]:
        """What the file of the pair says of it."""
        network = counterfactual_of(self.model, self.editor.counterfactual)
        return {
            "config": json.loads(network.config.to_json_string(use_diff=False)),
            "encoder": self.editor.encoder,
            "fact": self.editor.fact,
        }


class _Learner:
    """The changing parts of a training."""

    def __init__(self, learning: PairLearning, state: LearningState | None) -> None:
        self.learning, self.model, self.options = learning, learning.model, learning.options
        network = counterfactual_of(self.model, learning.editor.counterfactual).float()
        memory = ScopedMemory(
            network=network,
            encoder=learning.editor.encoder,
            threshold=IN_SCOPE,
            mixture="hard",
            head_WF=torch.zeros(0, 0),
            edits=(),
            keys_NF=torch.zeros(0, 0, device=self.model.device),
        )
        width = memory.features([(0,)], self.model.tokenizer).shape[1]
        generator = torch.Generator().manual_seed(learning.seed)
        head_WF = torch.randn(self.options.width, width, generator=generator)
        head_WF = (self.options.head_scale * head_WF).to(self.model.device)
        self.memory = replace(memory, head_WF=head_WF, keys_NF=memory.keys_NF.new_zeros(0, width))
        self.step = self.best_step = 0
        self.best: TensorState = {}
        self.best_loss: float | None = None
        if state is not None:
            for name, tensor in self.learned().items():
                tensor.data.copy_(state.network[name])
            self.step, self.best = state.step, state.best
            self.best_step, self.best_loss = state.best_step, state.best_loss
        learned = self.learned()
        for tensor in learned.values():
            tensor.requires_grad_()
        rates = [self.options.lr_head if name == HEAD else self.options.lr for name in learned]
        self.adam = torch.optim.Adam(
            [
                {"params": [tensor], "lr": lr}
                for tensor, lr in zip(learned.values(), rates, strict=True)
            ],
            foreach=False,
        )
        if state is not None:
            for name, tensor in learned.items():
                kept = {
                    key.rpartition("/")[2]: value.clone()
                    for key, value in state.adam.items()
                    if key.rpartition("/")[0] == name
                }
                if kept:  # Adam keeps its count on the CPU
                    moved = {
                        key: value if key == "step" else value.to(tensor.device)
                        for key, value in kept.items()
                    }
                    self.adam.state[tensor] = moved

    def learned(self) -> TensorState:
        """The tensors that learn, by their names in the file."""
        network = self.memory.network.named_parameters()
        return {**{f"{NETWORK}{name}": each for name, each in network}, HEAD: self.memory.head_WF}

    @property
    def is_stuck(self) -> bool:
        return self.step - self.best_step >= self.options.patience

    def state(self) -> LearningState:
        learned = self.learned()
        return LearningState(
            step=self.step,
            network={name: copied(tensor) for name, tensor in learned.items()},
            adam={
                f"{name}/{key}": copied(value)
                for name, tensor in learned.items()
                for key, value in self.adam.state.get(tensor, {}).items()
            },
            chains={},
            best=self.best,
            best_step=self.best_step,
            best_loss=self.best_loss,
        )

    def take_step(self) -> StepRecord:
        """One step of Adam; none if a value is not finite."""
        started, options, step = time.perf_counter(), self.options, self.step + 1
        chosen = examples(
            self.learning.split.train,
            seed=self.learning.seed,
            step=step,
            count=options.accumulate,
            locality=options.locality_texts,
        )
        self.adam.zero_grad()
        with torch.enable_grad():
            log_p_M, _ = self.answers(chosen)
            edit_loss = -log_p_M.mean()
            locality_loss = _scope_loss(*self.scope(chosen))
            loss = options.edit_weight * edit_loss + options.locality_weight * locality_loss
        loss.backward()
        learned = list(self.learned().values())
        gradient_norm = float(torch.nn.utils.clip_grad_norm_(learned, options.clip, foreach=False))
        figures = {
            "edit_loss": edit_loss.item(),
            "locality_loss": locality_loss.item(),
            "loss": loss.item(),
            "gradient_norm": gradient_norm,
        }
        nonfinite = None if math.isfinite(figures["loss"]) else "loss"
        if nonfinite is None and not math.isfinite(gradient_norm):
            nonfinite = "gradient"
        if nonfinite is None:
            self.adam.step()
            self.step = step
        return StepRecord(
            step=step,
            requests=tuple(example.request.id for example in chosen),
            seconds={"train": time.perf_counter() - started},
            target=figures,
            nonfinite=nonfinite,
        )

    def answers(self, chosen: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """(M,), (M,): the mean log-probability of a target's token, and whether all of them are the
        most probable ones, by text: the prompts of all edits, then their paraphrases.
        """
        model, memory = self.model, self.memory
        probes = [example.request.probe() for example in chosen]
        probes += [example.question for example in chosen]
        facts_before = [
            self.learning.editor.read(model, joined(example.request.probe())) for example in chosen
        ]
        sequences = encode_with_targets(model.tokenizer, probes)
        texts = [
            (before, sequence.ids[:-1])
            for before, sequence in zip([*facts_before, *facts_before], sequences, strict=True)
        ]
        hidden = memory.read(texts)
        found = [self._answer(each, own) for each, own in zip(sequences, hidden, strict=True)]
        means, rights = zip(*found, strict=True)
        return torch.stack(means), torch.stack(rights)

    def _answer(
        self, sequence: TargetSequence, hidden_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.tensor(sequence.target_ids, device=hidden_TE.device)
        head: Any = self.memory.network.get_output_embeddings()
        log_p_TV = head(hidden_TE[-len(targets) :]).float().log_softmax(-1)
        return log_p_TV.gather(1, targets[:, None]).mean(), (log_p_TV.argmax(1) == targets).all()

    def scope(self, chosen: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, N), (N, L): |A f_q - A f_c|^2 of each paraphrase and each edit, and of the locality
        texts and their own edit.
        """
        keys_NF = self._features([example.request.probe() for example in chosen])
        asked_NF = self._features([example.question for example in chosen])
        texts = [probe for example in chosen for probe in example.locality]
        near_NLF = self._features(texts).unflatten(0, (len(chosen), -1))
        head_WF = self.memory.head_WF
        near_NL = torch.stack(
            [
                distances(near_LF, key_F[None], head_WF)[:, 0]
                for near_LF, key_F in zip(near_NLF, keys_NF, strict=True)
            ]
        )
        return distances(asked_NF, keys_NF, head_WF), near_NL

    def _features(self, probes: Sequence[Probe]) -> torch.Tensor:
        prompts = encode_prompts(self.model.tokenizer, [probe.prompt for probe in probes])
        return self.memory.features(prompts, self.model.tokenizer)

    def validate(self) -> Iterator[EvalRecord]:
        """Measures the validation edits, and keeps the pair if it is the best one so far."""
        options = self.options
        chosen = examples(
            self.learning.split.validation,
            seed=self.learning.seed,
            step=1,
            count=options.validation,
            locality=options.locality_texts,
        )
        with torch.no_grad():
            log_p_M, is_right_M = self.answers(chosen)
            paraphrases_NN, near_NL = self.scope(chosen)
        is_right_2N = is_right_M.view(2, -1)
        is_in_scope_N = paraphrases_NN.diagonal() <= REACH
        edit_loss = float(-log_p_M.mean())
        locality_loss = float(_scope_loss(paraphrases_NN, near_NL))
        loss = options.edit_weight * edit_loss + options.locality_weight * locality_loss
        shares = {
            "efficacy": is_right_2N[0].float().mean(),
            "generalization": (is_right_2N[1] & is_in_scope_N).float().mean(),
            "locality": (near_NL > REACH).float().mean(),
        }
        count = len(chosen)
        measured = [
            Measurement(
                kind="editing",
                metric=metric,
                value=float(value),
                stderr=None,
                n=count,
                protocol=PROTOCOL,
                timing=TIMING,
                nonfinite=None,
            )
            for metric, value in shares.items()
        ]
        losses = {"loss": loss, "edit_loss": edit_loss, "locality_loss": locality_loss}
        measured += [
            Measurement(
                kind="training",
                metric=metric,
                value=value if math.isfinite(value) else None,
                stderr=None,
                n=count,
                nonfinite=None,
            )
            for metric, value in losses.items()
        ]
        for measurement in measured:
            yield EvalRecord(step=self.step, view=VIEW, measurement=measurement)
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best = {name: copied(tensor) for name, tensor in self.learned().items()}
            self.best_step, self.best_loss = self.step, loss


def _scope_loss(paraphrases_NN: torch.Tensor, near_NL: torch.Tensor) -> torch.Tensor:
    """The mean of three means: over what is in the scope, near it, and in the scope of others."""
    parts = [paraphrases_NN.diagonal().mean(), _outside(near_NL)]
    is_other_NN = ~torch.eye(len(paraphrases_NN), dtype=torch.bool, device=paraphrases_NN.device)
    if bool(is_other_NN.any()):
        parts.append(_outside(paraphrases_NN[is_other_NN]))
    return torch.stack(parts).mean()


def _outside(distances: torch.Tensor) -> torch.Tensor:
    """-log(1 - exp(-d)), the mean."""
    return -(-torch.expm1(-distances.clamp(min=TINY))).log().mean()
