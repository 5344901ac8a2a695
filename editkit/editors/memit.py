"""MEMIT: many facts in one batch, written into the down projections of several layers (Meng et al.
2023, arXiv 2210.07229).

For every request a target z is searched for the residual stream behind the last edited layer, at
the subject's last token, once a batch. Then layer by layer, of L, each seeing the updates of those
below,

    T = Z - z_now                        what is still missing, measured on the clean prompts
    R = T / (L - i), i = 0 ... L - 1     this layer's share
    K = keys of the subject's last token, averaged over contexts
    D = R K^T (lambda C + K K^T)^-1      the least squares, which a restraint on the solve may replace (Algorithm 1 and Eq. 14)

Contexts: the paper and the authors' code average over kinds of context, the bare prompt being a
kind of its own: with five sampled texts the clean key has weight 1/2 and each other 1/10. Differs
from the authors' code: their five texts begin with "The", "Therefore", "Because", "I" and "You";
ours are sampled from the model's start token alone, seeded.

`spread: published_code` is for D4S, whose code measures T once, before the first layer, and divides
by L - i all the same: five layers then write 1/5 + 1/4 + 1/3 + 1/2 + 1 = 2.28 T.

Shape letters: O d_out, I d_in, N requests, C contexts, M texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Solve
from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.contexts import sample_contexts
from editkit.model.layerwise import Ascent
from editkit.resources.stopwatch import measured
from editkit.restraints.base import Place
from editkit.stats.least_squares import LeastSquares
from editkit.targets.search import search_targets
from editkit.targets.sequences import locate
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.targets.objective import Objective

# of a forward pass that reads keys or outputs; bounds memory, changes no result beyond rounding
ROWS_AT_ONCE = 256

# One text as token ids, up to the subject's last token: nothing behind it can reach it.
Text = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemitPlan(Plan):
    """The targets of a batch, and the texts in which its keys are measured."""

    targets_ON: torch.Tensor  # z, float32
    residuals_ON: torch.Tensor  # T before the first layer: the delta of the search
    texts: tuple[tuple[Text, ...], ...]  # by request, then by context, the bare prompt first
    ascent: Ascent  # of all these texts in a row


@dataclass(frozen=True, kw_only=True)
class Memit(AbstractEditor):
    """Mass-editing memory in a transformer; its options are those of `conf/editor/memit.yaml`.

    Raises:
        ConfigError: an option is out of range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"objective", "solve", "update", "total"})
    spans_devices: ClassVar[bool] = True

    name: str
    layers: tuple[int, ...]  # ascending; z is searched behind the last
    covariance_weight: float  # lambda, published as mom2_update_weight
    spread: Literal["recomputed", "published_code"]
    context_lengths: tuple[tuple[int, int], ...]  # (tokens, how many texts), each pair a kind
    target: TargetSettings

    def __post_init__(self) -> None:
        problems = []
        if not self.layers or any(
            after <= before for before, after in zip(self.layers, self.layers[1:], strict=False)
        ):
            problems.append(
                f"editor.layers: at least one layer, each above the one before - got {list(self.layers)}."
            )
        if not self.covariance_weight > 0:
            problems.append(
                f"editor.covariance_weight must be positive - got {self.covariance_weight}."
            )
        if any(tokens < 2 or texts < 1 for tokens, texts in self.context_lengths):
            given = list(self.context_lengths)
            problems.append(
                f"editor.context_lengths: pairs [tokens, texts], tokens at least 2 (the start token counts) - got {given}."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def needs_moments(self) -> bool:
        return True

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        return self.modules(model)

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        return sample_contexts(model, lengths=self.context_lengths, generator=generator)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """MEMIT remembers nothing between batches."""
        return {}

    def plan(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        state: TensorState,
        objective: Objective | None,
    ) -> MemitPlan:
        """Searches z for every request, all on the weights as they are before the batch."""
        targets = search_targets(
            model,
            requests,
            site=self._site(model),
            contexts=contexts,
            settings=self.target,
            objective=objective,
        )
        texts = tuple(subject_texts(model, request, contexts) for request in requests)
        wanted = {
            "probability_before": "probability_before",
            "probability_after": "probability_after",
            "steps": "updates",
            "loss": "loss",
        }
        return MemitPlan(
            summary={
                name: sum(getattr(target, field) for target in targets) / len(targets)
                for name, field in wanted.items()
            },
            nonfinite="loss" if any(target.nonfinite for target in targets) else None,
            targets_ON=torch.stack([target.vector_O for target in targets], dim=1),
            residuals_ON=torch.stack([target.delta_O for target in targets], dim=1),
            texts=texts,
            ascent=ascent_of(model, texts),
        )

    def propose(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        module: str,
        plan: Plan,
        state: TensorState,
        moments: Moments,
        solve: Solve,
    ) -> Update:
        assert isinstance(plan, MemitPlan)
        index = self.modules(model).index(module)
        with measured("keys"):
            keys_IN = average_keys(plan.ascent, self.layers[index], self._context_weights)
        missing_ON = plan.residuals_ON  # before the first layer nothing was written yet
        if index > 0 and self.spread == "recomputed":
            with measured("residual"):
                missing_ON = plan.targets_ON - current_outputs(
                    plan.ascent, self.layers[-1], len(plan.texts[0])
                )
        return solve(
            LeastSquares(
                module=module,
                keys_IN=keys_IN,
                residuals_ON=missing_ON / (len(self.layers) - index),
                weight=self.covariance_weight,
            )
        )

    def observe(
        self, model: EditableModel, requests: Sequence[EditRequest], state: TensorState
    ) -> TensorState:
        return state

    def _site(self, model: EditableModel) -> str:
        """The block whose output gets z."""
        return model.family.block(self.layers[-1])

    @property
    def _context_weights(self) -> tuple[float, ...]:
        """Of each context in the mean: kinds weigh the same, and so do the texts of a kind."""
        kinds = [1, *(texts for _, texts in self.context_lengths)]
        return tuple(1 / len(kinds) / texts for texts in kinds for _ in range(texts))


def subject_texts(
    model: EditableModel, request: EditRequest, contexts: Sequence[str]
) -> tuple[Text, ...]:
    """The request in each context, up to the subject's last token."""
    encoded, positions = locate(model, request, contexts)
    return tuple(
        sequence.ids[: position + 1] for sequence, position in zip(encoded, positions, strict=True)
    )


def ascent_of(model: EditableModel, texts: Sequence[Sequence[Text]]) -> Ascent:
    """All texts, request by request, in passes that hold whole requests."""
    num_contexts = len(texts[0])
    rows_at_once = max(ROWS_AT_ONCE // num_contexts, 1) * num_contexts
    return Ascent(
        model, [text for of_request in texts for text in of_request], rows_at_once=rows_at_once
    )


def average_keys(ascent: Ascent, layer: int, weights: Sequence[float]) -> torch.Tensor:
    """(I, N) float64: what goes into a layer's down projection at the end of each request's texts,
    averaged with the contexts' weights.
    """
    keys_MI = ascent.keys(layer)
    weights_C = torch.tensor(weights, dtype=torch.float64, device=keys_MI.device)
    return torch.einsum("nci,c->in", keys_MI.double().unflatten(0, (-1, len(weights))), weights_C)


def current_outputs(ascent: Ascent, layer: int, num_contexts: int) -> torch.Tensor:
    """(O, N) float32: what comes out of a block at the end of each request's bare prompt."""
    return ascent.every(num_contexts).outputs(layer).float().T
