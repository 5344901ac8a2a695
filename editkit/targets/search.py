"""The search for a target vector: what a module should give at the subject's last token, so that the model says the target.

Meng et al. 2022 (ROME, arXiv 2202.05262), Eq. 4, as published code has it, with the differences named where they are. One implementation
for every locate-then-edit method: it knows a site (any module whose output is (B, T, O)) and nothing about what is done with its answer.

    loss(delta) = mean over contexts of -log p(target) per token                  the request itself
                + kl_factor * KL(p with delta || p without) after "{subject} is a"   the subject keeps its essence
                + weight_decay * |delta| / |v|^2                                   v: what the module gives for the clean prompt

`descent` minimises it over any `Forward`: the plain one here runs the whole network each step, `continued` what can change. A plain search
is one descent; a restraint on the objective may make it of several.

Shape letters: B sequences (the contexts, then the KL prompt), C contexts, T tokens, D width of the network, O width of the site's output,
M (sequence, position) pairs whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.capture import add_to_output, capture
from editkit.model.tokens import PLACE, TargetSequence, encode, encode_with_targets, fill, pad, subject_position
from editkit.targets.continued import continued_forward, continued_layer
from editkit.targets.descent import Descent, Forward, TargetProblem
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.restraints.base import AbstractObjectiveRestraint

ESSENCE = "{} is a"  # the KL prompt of the published code


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """The numbers of the search; a recipe knows them."""

    steps: int  # how often the loss is taken; Adam moves in between, so `steps - 1` times, as with the published v_num_grad_steps
    lr: float
    lr_unit: Literal["absolute", "relative"]  # relative: times |v| / sqrt(O), so that one step of Adam moves delta by about lr * |v|
    weight_decay: float
    clamp: float  # |delta| <= clamp * |v|
    kl_factor: float
    kl_position: Literal["subject_last", "prompt_end"]
    stop_loss: float  # the search ends below it
    exact: bool  # true: the whole network in every step; false: what lies before delta is computed once, the same to rounding

    def __post_init__(self) -> None:
        positive = [name for name in ("steps", "lr", "clamp") if not getattr(self, name) > 0]
        negative = [name for name in ("weight_decay", "kl_factor") if not getattr(self, name) >= 0]
        problems = [f"editor.target.{name} must be positive - got {getattr(self, name)}." for name in positive]
        problems += [f"editor.target.{name} must not be negative - got {getattr(self, name)}." for name in negative]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """What the search found; the target vector v* is `initial_O + delta_O`.

    The probabilities are the target's after the clean prompt, as the geometric mean over its tokens, in [0, 1].
    """

    initial_O: torch.Tensor  # v, at least float32
    delta_O: torch.Tensor
    loss: float  # at delta_O
    updates: int  # how often Adam moved
    probability_before: float
    probability_after: float
    nonfinite: bool = False  # the loss at delta_O is not a number, or infinite; the search ended there

    @property
    def vector_O(self) -> torch.Tensor:
        return self.initial_O + self.delta_O


def search_targets(
    model: EditableModel,
    requests: Sequence[EditRequest],
    *,
    site: str,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: AbstractObjectiveRestraint | None = None,
) -> tuple[Target, ...]:
    """The target of each request, on the weights as they are now; one after another."""
    return tuple(
        search_target(model, request, site=site, contexts=contexts, settings=settings, objective=objective) for request in requests
    )


def search_target(
    model: EditableModel,
    request: EditRequest,
    *,
    site: str,
    contexts: Sequence[str],
    settings: TargetSettings,
    objective: AbstractObjectiveRestraint | None = None,
) -> Target:
    """The target of one request: delta is added to the output of the module `site` at the subject's last token of every sequence.

    `contexts` are templates with one "{}" for the prompt, the first of them the bare "{}". The model is read only. A loss that is not
    finite ends the search and is told in the result. Raises ConfigError for a request that cannot be tokenised.
    """
    sequences = prepare(model, request, contexts, kl_position=settings.kl_position)
    layer = None if settings.exact else continued_layer(model, site, sequences)
    forward = plain_forward(model, site, sequences) if layer is None else continued_forward(model, layer, sequences)
    initial_O = site_output(model, site, sequences)
    if objective is None:
        return optimise(forward, initial_O, settings)
    problem = TargetProblem(forward=forward, initial_O=initial_O, settings=settings)
    at_block = site in map(model.family.block, range(model.num_layers))
    return _target(problem, objective.search(problem, request_id=request.id, site="block" if at_block else "mlp"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """The sequences of one request, tokenised: each context with the target but for its last token, then the KL prompt."""

    ids: tuple[tuple[int, ...], ...]  # by row
    sites: tuple[int, ...]  # by row: position of the subject's last token
    predicting: tuple[range, ...]  # by context: the positions whose logits predict the target
    targets: tuple[tuple[int, ...], ...]  # by context: the target's ids
    kl_position: int  # in the last row

    def wanted(self, first_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns whose logits the loss needs: the target's of each context in order, then the KL position.

        `first_B` is the column of each row's first token; negative where the columns begin later than the row.
        """
        pairs = [(row, position) for row, positions in enumerate(self.predicting) for position in positions]
        pairs.append((len(self.ids) - 1, self.kl_position))
        rows_M, positions_M = torch.tensor(pairs, device=first_B.device).T
        return rows_M, first_B[rows_M] + positions_M

    def log_probabilities(self, logits_MV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the wanted logits to what a `Forward` gives."""
        log_p_MV = _at_least_float32(logits_MV).log_softmax(dim=-1)
        ids_M = torch.tensor([token for target in self.targets for token in target], device=logits_MV.device)
        log_p_M = log_p_MV[:-1].gather(1, ids_M[:, None])[:, 0]
        return torch.stack([tokens.mean() for tokens in log_p_M.split([len(target) for target in self.targets])]), log_p_MV[-1]


def prepare(
    model: EditableModel, request: EditRequest, contexts: Sequence[str], *, kl_position: Literal["subject_last", "prompt_end"]
) -> Sequences:
    """Tokenises a request in its contexts."""
    assert contexts and contexts[0] == PLACE, "the first context is the bare prompt"
    encoded, sites = locate(model, request, contexts)
    essence = fill(ESSENCE, request.subject)
    essence_encoded = encode(model.tokenizer, [essence.text])[0]
    essence_site = subject_position(essence_encoded, essence)
    return Sequences(
        ids=(*(sequence.ids[:-1] for sequence in encoded), essence_encoded.ids),
        sites=(*sites, essence_site),
        predicting=tuple(range(sequence.predicting.start, sequence.predicting.stop) for sequence in encoded),
        targets=tuple(sequence.target_ids for sequence in encoded),
        # Differs from the paper: published code measures the KL at the subject's last token, the paper writes p(x | "{subject} is a").
        kl_position=essence_site if kl_position == "subject_last" else len(essence_encoded.ids) - 1,
    )


def locate(model: EditableModel, request: EditRequest, contexts: Sequence[str]) -> tuple[list[TargetSequence], list[int]]:
    """Each context with prompt and target, tokenised as one text, and where in it the subject's last token is."""
    filled = [fill(request.prompt, request.subject, context=context) for context in contexts]
    encoded = encode_with_targets(model.tokenizer, [(prompt.text, request.target) for prompt in filled])
    return encoded, [subject_position(sequence, prompt) for sequence, prompt in zip(encoded, filled, strict=True)]


def site_output(model: EditableModel, site: str, sequences: Sequences) -> torch.Tensor:
    """v, (O,), at least float32: what the site gives at the subject's last token of the clean prompt; the pass stops there."""
    batch = pad(sequences.ids[:1], device=model.device)
    with torch.no_grad(), capture(model, outputs=[site]) as captured:
        model.final_hidden(batch)
    return _at_least_float32(captured.outputs[site][0, sequences.sites[0]])


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def plain_forward(model: EditableModel, site: str, sequences: Sequences, *, side: Literal["left", "right"] = "right") -> Forward:
    """The whole network over all sequences, then its head at the wanted positions alone."""
    batch = pad(sequences.ids, device=model.device, side=side)
    sites_B = batch.columns(sequences.sites)
    rows_M, columns_M = sequences.wanted(batch.first_B)

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with add_to_output(model, site, sites_B, delta_O):
            hidden_BTD = model.final_hidden(batch)
        return sequences.log_probabilities(model.hidden_to_logits(hidden_BTD[rows_M, columns_M]))

    return forward


def optimise(forward: Forward, initial_O: torch.Tensor, settings: TargetSettings) -> Target:
    """Minimises the loss from delta = 0, in one descent."""
    problem = TargetProblem(forward=forward, initial_O=initial_O, settings=settings)
    return _target(problem, problem.descend(updates=settings.steps - 1))


def _target(problem: TargetProblem, found: Descent) -> Target:
    return Target(
        initial_O=problem.initial_O,
        delta_O=found.delta_O,
        loss=found.loss,
        updates=found.updates,
        probability_before=found.unmoved[0][0].exp().item(),
        probability_after=found.log_p_C[0].exp().item(),
        nonfinite=found.nonfinite,
    )
