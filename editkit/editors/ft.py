"""FT: fine-tuning of a matrix on the request itself, held close to where it was.

    objective    loss                                                              known as
    target       -log p(target token | prompt, target so far), mean over tokens    FT-M (EasyEdit, arXiv 2308.07269)
    prompt_last  -log p(target token | prompt), for every token of the target      FT-L (Zhu et al. 2020, arXiv 2012.00363, as
                                                                                   the code of arXiv
                                                                                   2202.05262 has
                                                                                   it)

`prompt_last` reads all tokens of a target from the one distribution behind the prompt: the flaw of
the published code, right only for targets of one token. It is here for comparison.

Adam moves dW alone; after each step its entries are clipped to +- `norm_constraint`, which keeps W
in an L-infinity ball around the weights at the call, not around W_0. A batch is one loss, the mean
over its requests; published code goes through it in chunks. With several layers all matrices move
together. The update is dense.

`l1` and `l2` add an elastic net on the update, summed over the matrices,

    loss + l1 * sum |dW| + l2 * |dW|_F^2                                           Xu et al. 2025 (EAC, arXiv 2503.00035), appendix E

its plain form: EAC's weights are saliencies of a target vector's coordinates, and FT searches for
none. The equation was not checked against the appendix, and no numbers of it are known here: 0, no
net, is the default. `stop_loss` is compared with the whole sum.

Shape letters: O d_out, I d_in, B requests, T tokens, M (request, position) pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Solve
from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.capture import add_to_matrix
from editkit.model.tokens import PLACE, encode_with_targets, pad
from editkit.restraints.base import Place
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.targets.objective import Objective

Objective = Literal["target", "prompt_last"]


@dataclass(frozen=True, kw_only=True)
class FtPlan(Plan):
    """The updates, all found together; by module, (O, I) float32."""

    updates: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ft(AbstractEditor):
    """Constrained fine-tuning; its options are those of `conf/editor/ft.yaml`.

    Raises:
        ConfigError: an option is out of range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"update", "total"})
    spans_devices: ClassVar[bool] = True

    name: str
    layers: tuple[int, ...]
    objective: Objective
    steps: int  # of Adam, at most
    lr: float
    norm_constraint: float | None  # bound of |dW|, entry by entry; None: no bound
    stop_loss: float  # no further step is made below it
    l1: float  # of the elastic net on dW; 0: none
    l2: float

    def __post_init__(self) -> None:
        problems = [
            f"editor.{name} must be positive - got {getattr(self, name)}."
            for name in ("steps", "lr")
            if not getattr(self, name) > 0
        ]
        if not self.layers or len(set(self.layers)) < len(self.layers):
            problems.append(
                f"editor.layers: at least one layer, each once - got {list(self.layers)}."
            )
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            problems.append(
                f"editor.norm_constraint must be positive, or null for no bound - got {self.norm_constraint}."
            )
        problems += [
            f"editor.{name} must not be negative, 0 for none - got {getattr(self, name)}."
            for name in ("l1", "l2")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def needs_moments(self) -> bool:
        return False

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        return ()

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """The bare prompt alone."""
        return (PLACE,)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """FT remembers nothing between batches."""
        return {}

    def plan(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        state: TensorState,
        objective: Objective | None,
    ) -> FtPlan:
        """Finds the updates; the weights are only read."""
        assert objective is None, "FT declares no restraint on the objective"
        log_probability = log_probabilities(model, requests, self.objective)
        updates = {
            module: torch.zeros(
                model.weight(module).shape,
                dtype=torch.float32,
                device=model.device,
                requires_grad=True,
            )
            for module in self.modules(model)
        }
        # foreach off: the sum of two matrices of Adam's would be held a second time.
        adam = torch.optim.Adam(updates.values(), lr=self.lr, foreach=False)
        before, steps = None, 0
        while True:
            with torch.enable_grad(), ExitStack() as added:
                for module, update_OI in updates.items():
                    added.enter_context(add_to_matrix(model, module, update_OI))
                log_p_B = log_probability()
                loss = -log_p_B.mean()
                if self.l1 or self.l2:
                    loss = loss + sum(
                        self.l1 * update_OI.abs().sum() + self.l2 * update_OI.square().sum()
                        for update_OI in updates.values()
                    )
            value = loss.item()
            before = log_p_B.detach() if before is None else before
            # Taken before each step and once behind the last, so that it belongs to the updates
            # that are returned.
            if not math.isfinite(value) or value < self.stop_loss or steps == self.steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            steps += 1
            if self.norm_constraint is not None:
                with torch.no_grad():
                    for update_OI in updates.values():
                        update_OI.clamp_(-self.norm_constraint, self.norm_constraint)
        summary = {
            "probability_before": float(before.exp().mean()),
            "probability_after": float(log_p_B.detach().exp().mean()),
            "steps": float(steps),
            "loss": value,
        }
        return FtPlan(
            summary=summary,
            nonfinite=None if math.isfinite(value) else "loss",
            updates={module: update_OI.detach() for module, update_OI in updates.items()},
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
    ) -> torch.Tensor:
        assert isinstance(plan, FtPlan)
        return plan.updates[module]

    def observe(
        self, model: EditableModel, requests: Sequence[EditRequest], state: TensorState
    ) -> TensorState:
        return state


def log_probabilities(
    model: EditableModel, requests: Sequence[EditRequest], objective: Objective
) -> Callable[[], torch.Tensor]:
    """A function that runs the network as it is then: the mean log-probability of a target token by
    request, (B,) float32, in nats.
    """
    encoded = encode_with_targets(
        model.tokenizer, [(request.full_prompt, request.target) for request in requests]
    )
    positions: Sequence[Sequence[int]]
    if objective == "target":
        rows = [sequence.ids[:-1] for sequence in encoded]
        positions = [range(sequence.start - 1, len(sequence.ids) - 1) for sequence in encoded]
    else:
        rows = [sequence.ids[: sequence.start] for sequence in encoded]
        positions = [(sequence.start - 1,) * len(sequence.target_ids) for sequence in encoded]
    batch = pad(rows, device=model.device)
    lengths = [len(sequence.target_ids) for sequence in encoded]
    rows_M = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)).to(
        model.device
    )
    columns_M = batch.first_B[rows_M] + torch.tensor(
        [position for of_row in positions for position in of_row], device=model.device
    )
    targets_M = torch.tensor(
        [token for sequence in encoded for token in sequence.target_ids], device=model.device
    )

    def run() -> torch.Tensor:
        hidden_BTD = model.final_hidden(batch)
        log_p_MV = model.hidden_to_logits(hidden_BTD[rows_M, columns_M]).float().log_softmax(dim=-1)
        log_p_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
        return torch.stack([tokens.mean() for tokens in log_p_M.split(lengths)])

    return run
