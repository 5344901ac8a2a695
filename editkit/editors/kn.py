"""KN: the neurons that express a fact get the new answer's embedding in the place of the old one's
(Dai et al. 2022, arXiv 2104.08696).

    1. Every neuron of every MLP has a score: its share in the probability of the old answer, by
       integrated gradients (Eqs. 2 and 3; `editkit.targets.attribution`)
    2. Coarse neurons of a prompt: those with at least `threshold` of the largest score
    3. Refined neurons: those that are coarse in at least `share` of several prompts
    4. The columns of W_down of these neurons: W_i + add e(new) - subtract e(old)

e is the mean of an answer's token embeddings. A layer's update has rank one: one vector in the
columns of its neurons. There is no search and no weighing of other keys.

Answers of several tokens: the paper's have one. Here a neuron's score is the mean over the answer's
tokens, each after the right tokens before it.

`refine: paraphrases` uses the prompts of the request, as the paper does. They are the ones that
generalization is measured on. The default is sampled contexts before the edited prompt.

Differs from published code. The authors' (BERT): the points of the integral are 0, 1/m ... (m-1)/m
(`rule: left`); the paper's are 1/m ... 1. `share` is changed until the facts of a relation have two
to five neurons each on average, which one edit cannot do, and neurons of more than a tenth of a
relation's facts are left out. EasyEdit's: both ends are points (`rule: ends`), so that one step is
the gradient at 0; 2 e(new) - 2 e(old) for answers of one token and the sum of the embeddings for
others; the answer lacks its blank, with Llama's tokenizers it has a BOS; neurons are scaled before
their activation, which is not a scaling of the neurons; e(old) is what the model says.

Shape letters: O d_out, I d_in, J prompts, R rows: tokens of the answer in each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.errors import ConfigError, OptionError, message, negative
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.contexts import sample_contexts
from editkit.model.tokens import PLACE, TargetSequence, encode_with_targets, fill, pad
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.targets.attribution import attributions, neurons_of, row_of
from editkit.targets.self_check import compare_search, require_outputs
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.stats.store import Moments
    from editkit.targets.sequences import Sequences
    from editkit.types import TensorState

Rule = Literal["right", "left", "ends"]


@dataclass(frozen=True, kw_only=True)
class KnPlan(Plan):
    """The updates of all modules."""

    updates: Mapping[str, LowRank]


@dataclass(frozen=True, kw_only=True)
class Kn(AbstractEditor[KnPlan]):
    """Knowledge neurons. The options are documented in `conf/editor/kn.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    max_batch_size: ClassVar[int | None] = 1

    name: str
    layers: tuple[int, ...] | None  # ascending; None: all
    answer: Literal["old", "predicted"]
    steps: int  # points of the integral
    rule: Rule
    threshold: float
    refine: Literal["none", "contexts", "paraphrases"]
    share: float
    context_lengths: tuple[tuple[int, int], ...]  # (tokens, number of texts)
    subtract: float
    add: float
    unit: Literal["absolute", "relative"]
    embeddings: Literal["input", "output"]
    rows_at_once: int

    def __post_init__(self) -> None:
        problems = [
            message(name, "must be positive", got=getattr(self, name))
            for name in ("steps", "rows_at_once")
            if not getattr(self, name) > 0
        ]
        problems += negative(self, "subtract", "add")
        problems += [
            message(name, "out of range", got=getattr(self, name), expected="a share, 0 to 1")
            for name in ("threshold", "share")
            if not 0 <= getattr(self, name) <= 1
        ]
        given = self.layers
        if given is not None and (not given or list(given) != sorted(set(given))):
            expected = "null for all, or at least one layer, in ascending order"
            problems.append(
                message("layers", "unusable layers", got=list(given), expected=expected)
            )
        if problems:
            raise OptionError(problems)

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Names the requests that lack the old answer, or paraphrases to refine over."""
        problems = []
        lacking = [request.id for request in requests if request.target_old is None]
        if self.answer == "old" and lacking:
            problems.append(
                message(
                    "editor.answer",
                    f"{len(lacking)} of {len(requests)} requests of {data.name} have no old answer",
                    got=lacking[0],
                    fix="set editor.answer=predicted, for what the model says",
                )
            )
        lacking = [request.id for request in requests if not request.paraphrases]
        if self.refine == "paraphrases" and lacking:
            problems.append(
                message(
                    "editor.refine",
                    f"{len(lacking)} of {len(requests)} requests of {data.name} have no "
                    "paraphrases",
                    got=lacking[0],
                    fix="set editor.refine=contexts, or none",
                )
            )
        return problems

    def memory(self, work: Workload) -> EditorMemory:
        """A gradient at the tokens that predict an answer, and the keys and values before them."""
        size = work.architecture
        cached = 2 * size.num_key_value_heads * size.head_width * size.num_layers
        prefixes = self.rows_at_once * REQUEST * cached * work.weight_bytes
        gradient = work.kept(2 * self.rows_at_once, size.num_layers)
        return EditorMemory(
            working=gradient + prefixes + work.logits(self.rows_at_once),
            saving="a lower editor.rows_at_once",
        )

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self._layers(model))

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        if self.refine != "contexts":
            return (PLACE,)
        return sample_contexts(model, lengths=self.context_lengths, generator=generator)

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        layers = self._layers(model)
        site = model.family.mlp(layers[len(layers) // 2])
        require_outputs(model, request, site, self.modules(model)[len(layers) // 2])
        return compare_search(model, request, site)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No state. Raises ConfigError for embeddings that are no vectors of the residual width."""
        width, wanted = self._embeddings(model).shape[1], model.weight(self.modules(model)[0])
        if width != len(wanted):
            problem = f"the embeddings of {model.name} have another width than its residual stream"
            raise ConfigError(
                message("editor.embeddings", problem, got=width, expected=str(len(wanted)))
            )
        return {}

    def plan(self, step: Step) -> KnPlan:
        """Finds the neurons and the updates; the weights are only read."""
        model, request = step.model, step.request
        [new] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        target_log_p = _log_probability(model, new)
        summary = {
            "probability_before": math.exp(target_log_p),
            "loss": -target_log_p,
            "steps": float(self.steps),
        }
        texts, old_ids = self._texts(step, new)
        scores = self.scores(model, texts)
        if not all(bool(scores_JI.isfinite().all()) for scores_JI in scores.values()):
            return KnPlan(summary=summary, nonfinite="attribution", updates={})
        chosen = selected(scores, threshold=self.threshold, share=self.share)
        summary["neurons"] = float(sum(int(is_chosen_I.sum()) for is_chosen_I in chosen.values()))
        added_O, removed_O = (
            self._embeddings(model)[list(ids)].float().mean(dim=0)
            for ids in (new.target_ids, old_ids)
        )
        updates = {
            module: self._update(model, module, is_chosen_I, added_O, removed_O)
            for module, is_chosen_I in chosen.items()
        }
        return KnPlan(summary=summary, updates=updates)

    def propose(self, step: Step, module: str, plan: KnPlan) -> LowRank:
        return plan.updates[module]

    def scores(
        self, model: EditableModel, texts: Sequence[Sequence[Sequences]]
    ) -> dict[str, torch.Tensor]:
        """By module, the scores of its neurons in each prompt, (J, I): means over the tokens of the
        answer.
        """
        rows = [row for of_prompt in texts for row in of_prompt]
        lengths, modules = [len(of_prompt) for of_prompt in texts], self.modules(model)
        neurons, points = neurons_of(model, modules, rows), points_of(self.steps, self.rule)
        found = {}
        for layer, module in zip(self._layers(model), modules, strict=True):
            scores_RI = attributions(
                model,
                layer,
                rows,
                neurons[module],
                points=points,
                rows_at_once=self.rows_at_once,
            )
            by_prompt = [part_TI.mean(dim=0) for part_TI in scores_RI.split(lengths)]
            found[module] = torch.stack(by_prompt)
        return found

    def _layers(self, model: EditableModel) -> tuple[int, ...]:
        return tuple(range(model.num_layers)) if self.layers is None else self.layers

    def _embeddings(self, model: EditableModel) -> torch.Tensor:
        network = model.network
        of_input = self.embeddings == "input"
        table = network.get_input_embeddings() if of_input else network.get_output_embeddings()
        weight_VO: torch.Tensor = table.weight
        return weight_VO

    def _texts(
        self, step: Step, new: TargetSequence
    ) -> tuple[list[list[Sequences]], tuple[int, ...]]:
        """By prompt, a row for each token of the answer whose neurons are searched; and its ids."""
        model, request = step.model, step.request
        prompts = [
            fill(request.prompt, request.subject, context=context).text for context in step.contexts
        ]
        if self.refine == "paraphrases":
            prompts += request.paraphrases
        if self.answer == "old":
            if request.target_old is None:
                problem = "this request has no old answer"
                fix = "set editor.answer=predicted, for what the model says"
                raise ConfigError(message("editor.answer", problem, got=request.id, fix=fix))
            probes = [request.probe(prompt=prompt, answer=request.target_old) for prompt in prompts]
            encoded = encode_with_targets(model.tokenizer, probes, chat=model.chat)
            texts = [
                [row_of(each.ids[:end], each.ids[end]) for end in range(each.start, len(each.ids))]
                for each in encoded
            ]
            return texts, encoded[0].target_ids
        probes = [request.probe(prompt=prompt) for prompt in prompts]
        encoded = encode_with_targets(model.tokenizer, probes, chat=model.chat)
        token = int(_logits(model, new.ids[: new.start])[-1].argmax())
        return [[row_of(each.ids[: each.start], token)] for each in encoded], (token,)

    def _update(
        self,
        model: EditableModel,
        module: str,
        is_chosen_I: torch.Tensor,
        added_O: torch.Tensor,
        removed_O: torch.Tensor,
    ) -> LowRank:
        """The same vector in the columns of the chosen neurons; `relative`: in the length of each
        column of W_0, of unit embeddings. The authors' code takes each edit back, so that its
        columns are those of W_0; the length of the present ones would grow with each edit of a
        sequence.
        """
        columns_I = is_chosen_I.float()
        if self.unit == "relative":
            length_I = torch.linalg.vector_norm(model.base(module).float(), dim=0)
            columns_I = columns_I * length_I.to(columns_I.device)
            added_O, removed_O = (
                each_O / torch.linalg.vector_norm(each_O) for each_O in (added_O, removed_O)
            )
        left_O = (self.add * added_O - self.subtract * removed_O).to(columns_I.device)
        rank = int(bool(is_chosen_I.any()))
        return LowRank(left_O[:, None][:, :rank], columns_I[:, None][:, :rank])


def points_of(steps: int, rule: Rule) -> list[float]:
    """The points of the integral: `right` k/m for k = 1 ... m, `left` for k = 0 ... m - 1, `ends` m
    points from 0 to 1, both among them.
    """
    if rule == "ends":
        return [index / max(steps - 1, 1) for index in range(steps)]
    return [(index + (rule == "right")) / steps for index in range(steps)]


def selected(
    scores: Mapping[str, torch.Tensor], *, threshold: float, share: float
) -> dict[str, torch.Tensor]:
    """By module, (I,): whether a neuron is coarse in at least `share` of the prompts, that is, has
    a positive score of at least `threshold` of the largest one of all modules.
    """
    largest_J = torch.stack([scores_JI.amax(dim=1) for scores_JI in scores.values()]).amax(dim=0)
    found = {}
    for module, scores_JI in scores.items():
        is_coarse_JI = (scores_JI > 0) & (scores_JI >= threshold * largest_J[:, None])
        num_prompts = len(scores_JI)
        found[module] = is_coarse_JI.sum(dim=0) >= max(share * num_prompts, 1)
    return found


def _logits(model: EditableModel, ids: Sequence[int]) -> torch.Tensor:
    """(T, V), float32, without a gradient."""
    with torch.no_grad():
        hidden_TD = model.final_hidden(pad([tuple(ids)], device=model.device))[0]
        return model.hidden_to_logits(hidden_TD).float()


def _log_probability(model: EditableModel, sequence: TargetSequence) -> float:
    """The mean log-probability of a target's tokens, in nats."""
    log_p_TV = _logits(model, sequence.ids[:-1]).log_softmax(dim=-1)[sequence.predicting]
    ids_T = torch.tensor(sequence.target_ids, device=log_p_TV.device)
    return float(log_p_TV.gather(1, ids_T[:, None]).mean())
