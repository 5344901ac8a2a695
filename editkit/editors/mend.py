"""MEND: one backward pass, and a trained hypernetwork turns the gradient's factors into an update
(Mitchell et al. 2022, arXiv 2110.11309).

    -log p(target | prompt), mean over the target's tokens        one pass, on the weights as they are
    x_t, d_t of every token t                                     what goes into a matrix, and the gradient of what comes out
    W - alpha * sum_t d~_t x~_t^T                                 Eq. 4; the pairs come from `editkit.hypernet.network`

The update is a `LowRank` of one column a token whose gradient is not zero; no gradient is formed as
a matrix. A batch adds up the updates of its requests, each as if it were alone, as the paper does
(section 3.1). Differs from the paper in nothing that is edited; the sign of alpha is told in
`network`.

A hypernetwork belongs to one model (by its fingerprint), to its matrices, and to requests that it
has not seen.

Shape letters: O d_out, I d_in, B requests, T tokens, R tokens that count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import AbstractEditor, Plan, Solve
from editkit.errors import ConfigError
from editkit.files import file_digest
from editkit.hypernet.factors import gradient_factors, questions
from editkit.hypernet.network import Hypernetwork, NetworkOptions
from editkit.hypernet.options import TrainingOptions
from editkit.hypernet.store import SHOWN, Header, load_hypernetwork, read_header, resolve
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.tokens import PLACE, encode_with_targets
from editkit.restraints.base import Place
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.targets.objective import Objective

MISSING = "editor.hypernetwork is not set: `editkit train editor=mend model=... dataset=...` trains one and says where it is."


@dataclass(frozen=True, kw_only=True)
class MendPlan(Plan):
    """The updates, all from one pass, by module."""

    updates: Mapping[str, LowRank]


@dataclass(frozen=True, kw_only=True)
class Mend(AbstractEditor):
    """A trained editor; its options are those of `conf/editor/mend.yaml`.

    Raises:
        ConfigError: an option is out of range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"update", "total"})

    name: str
    layers: tuple[int, ...]
    hypernetwork: str | None
    step_scale: float
    network: NetworkOptions
    train: TrainingOptions
    # The file that is in use, by its path, digest and device: a real model's is hundreds of
    # megabytes, and every edit needs it.
    _loaded: dict[tuple[str, str, str], tuple[Hypernetwork, Header]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        problems = []
        if not self.layers or len(set(self.layers)) < len(self.layers):
            problems.append(
                f"editor.layers: at least one layer, each once - got {list(self.layers)}."
            )
        if not 0 < self.step_scale < math.inf:
            problems.append(f"editor.step_scale must be positive - got {self.step_scale}.")
        if problems:
            raise ConfigError(problems)

    @property
    def needs_moments(self) -> bool:
        return False

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """In the order of `layers`, and within one in the order in which a pass reaches them."""
        return model.mlp_matrices(self.layers)

    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        return ()

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """The bare prompt alone."""
        return (PLACE,)

    def lacks(self) -> list[str]:
        """A hypernetwork that can be read."""
        if self.hypernetwork is None:
            return [MISSING]
        try:
            read_header(self.hypernetwork)
        except ConfigError as error:
            return list(error.problems)
        return []

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """No hypernetwork, or one that was trained on some of these requests."""
        if lacking := self.lacks():
            return lacking
        assert self.hypernetwork is not None
        header = read_header(self.hypernetwork)
        leaks = header.leaks(requests, data.digest)
        if not leaks:
            return []
        shown = ", ".join(leaks[:SHOWN]) + (", ..." if len(leaks) > SHOWN else "")
        apart = header.facts.get("held_apart")
        hint = (
            f" Its training left the first {apart} requests of its dataset to runs."
            if apart
            else ""
        )
        return [
            f"editor.hypernetwork: {self.hypernetwork} was trained on {len(leaks)} of the {len(requests)} requests that would be edited "
            f"({shown}).{hint} Edit others (edits, dataset.order, dataset.limit), or train another with editor.train.held_apart."
        ]

    def provenance(self) -> Mapping[str, object]:
        if self.hypernetwork is None:
            return {}
        header = read_header(self.hypernetwork)
        return {
            "hypernetwork": {
                "file": self.hypernetwork,
                "digest": file_digest(resolve(self.hypernetwork)),
                **header.facts,
            }
        }

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """Which hypernetwork it is: a run that goes on must go on with the same. Raises ConfigError
        for one of another model.
        """
        self._network(model, self._digest())
        return {
            "hypernetwork": torch.tensor(list(bytes.fromhex(self._digest())), dtype=torch.uint8)
        }

    def plan(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        state: TensorState,
        objective: Objective | None,
    ) -> MendPlan:
        """Finds the updates; the weights are only read. Raises ConfigError where the run began with
        another hypernetwork.
        """
        assert objective is None, "MEND declares no restraint on the objective"
        network = self._network(model, bytes(state["hypernetwork"].tolist()).hex())
        asked = questions(
            model,
            encode_with_targets(
                model.tokenizer, [(each.full_prompt, each.target) for each in requests]
            ),
        )
        factors, log_p_B = gradient_factors(model, network.modules, asked)
        updates = {}
        with torch.no_grad():
            for module, each in factors.items():
                counts_BT = each.counts_N
                left_BTO, right_BTI = network.transform(module, each)
                updates[module] = LowRank(
                    (self.step_scale * left_BTO[counts_BT]).T.contiguous(),
                    right_BTI[counts_BT].T.contiguous(),
                )
        loss = float(-log_p_B.mean())
        summary = {"probability_before": float(log_p_B.exp().mean()), "loss": loss, "steps": 1.0}
        return MendPlan(
            summary=summary, nonfinite=None if math.isfinite(loss) else "loss", updates=updates
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
    ) -> LowRank:
        assert isinstance(plan, MendPlan)
        return plan.updates[module]

    def observe(
        self, model: EditableModel, requests: Sequence[EditRequest], state: TensorState
    ) -> TensorState:
        return state

    def _digest(self) -> str:
        if self.hypernetwork is None:
            raise ConfigError(MISSING)
        read_header(self.hypernetwork)  # says what is wrong with the file
        return file_digest(resolve(self.hypernetwork))

    def _network(self, model: EditableModel, digest: str) -> Hypernetwork:
        """The hypernetwork with this digest, on the model's device, checked against model and
        layers.
        """
        if self.hypernetwork is None:
            raise ConfigError(MISSING)
        key = (self.hypernetwork, digest, str(model.device))
        if key not in self._loaded:
            if (found := self._digest()) != digest:
                raise ConfigError(
                    f"editor.hypernetwork: {self.hypernetwork} is not the file that this run began with (SHA-256 {found[:12]}..., then "
                    f"{digest[:12]}...). Put that one back, or start anew with resume=never."
                )
            network, header = load_hypernetwork(self.hypernetwork, device=model.device)
            self._check(model, header)
            self._loaded.clear()
            self._loaded[key] = (network, header)
        return self._loaded[key][0]

    def _check(self, model: EditableModel, header: Header) -> None:
        problems = []
        if header.fingerprint != model.fingerprint:
            made_for = f"{header.model} (fingerprint {header.fingerprint[:12]}...)"
            problems.append(
                f"editor.hypernetwork: {self.hypernetwork} was trained for {made_for}, not for this {model.name} "
                f"({model.fingerprint[:12]}...): train one with `editkit train editor=mend model=...`."
            )
        wanted = self.modules(model)
        if tuple(header.modules) != wanted:
            problems.append(
                f"editor.layers: {list(self.layers)} was given, the matrices {', '.join(wanted)}; {self.hypernetwork} edits "
                f"{', '.join(header.modules)}."
            )
        if problems:
            raise ConfigError(problems)
