"""MEND: one backward pass, and a trained hypernetwork turns the factors of the gradient into an
update (Mitchell et al. 2022, arXiv 2110.11309).

    -log p(target | prompt), mean over the target's tokens    one pass on the current weights
    x_t, d_t of every token t                                 the inputs of a matrix, and the
                                                              gradients of its outputs
    W - alpha * sum_t d~_t x~_t^T                             Eq. 4; `editkit.hypernet.network`
                                                              computes the pairs

The update is a `LowRank` with one column for each token whose gradient is not zero. No gradient is
formed as a matrix. The update of a batch is the sum of the updates of its requests, each computed
alone, as in the paper (section 3.1). `network` explains the sign of alpha.

A hypernetwork belongs to one model (by its fingerprint), to its matrices, and to requests that it
was not trained on.

Shape letters: O d_out, I d_in, B requests, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.editors.trained import (
    changed_problem,
    header_problems,
    model_problems,
    request_problems,
    trained_provenance,
)
from editkit.errors import OptionError, message
from editkit.files import file_digest
from editkit.hypernet.factors import gradient_factors, questions
from editkit.hypernet.memory import gradient_bytes, network_bytes, training_bytes
from editkit.hypernet.network import Hypernetwork, NetworkOptions
from editkit.hypernet.options import TrainingOptions
from editkit.hypernet.store import HYPERNETWORK, Header, load_hypernetwork, read_header, resolve
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.tokens import encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, TrainingMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments

MISSING = message(
    "hypernetwork",
    "not set, and MEND needs a trained one",
    fix="train one with `editkit train editor=mend model=... dataset=...`, which prints its folder",
)


@dataclass(frozen=True, kw_only=True)
class MendPlan(Plan):
    """The updates by module, all from one pass."""

    updates: Mapping[str, LowRank]


@dataclass(frozen=True, kw_only=True)
class Mend(AbstractEditor[MendPlan]):
    """A trained editor. The options are documented in `conf/editor/mend.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    hypernetwork: str | None
    step_scale: float
    network: NetworkOptions
    train: TrainingOptions
    # The loaded file by path, digest and device. A real model's takes hundreds of megabytes, and
    # every edit needs it.
    _loaded: dict[tuple[str, str, str], tuple[Hypernetwork, Header]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        problems = []
        if not self.layers or len(set(self.layers)) < len(self.layers):
            expected = "at least one layer, each once"
            problems.append(
                message("layers", "unusable layers", got=list(self.layers), expected=expected)
            )
        if not 0 < self.step_scale < math.inf:
            problems.append(message("step_scale", "must be positive", got=self.step_scale))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """In the order of `layers`; within a layer in the order in which a pass reaches them."""
        return model.mlp_matrices(self.layers)

    def lacks(self) -> list[str]:
        """A hypernetwork that can be read."""
        if self.hypernetwork is None:
            return [MISSING]
        return header_problems(self.hypernetwork, HYPERNETWORK)

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Refuses a damaged hypernetwork, and one that was trained on some of these requests."""
        if lacking := self.lacks():
            return lacking
        assert self.hypernetwork is not None
        return request_problems(self.hypernetwork, HYPERNETWORK, data, requests)

    def provenance(self) -> Mapping[str, object]:
        return trained_provenance(self.hypernetwork, HYPERNETWORK)

    def memory(self, work: Workload) -> EditorMemory:
        file = None if self.hypernetwork is None else resolve(self.hypernetwork)
        return EditorMemory(
            working=gradient_bytes(work, self.network, work.batch_size),
            columns_per_edit=REQUEST,  # one a token
            kept=float(file.stat().st_size)
            if file is not None and file.is_file()
            else network_bytes(work, self.network),
        )

    def training_memory(self, work: Workload, *, is_gpu: bool, reading: float) -> TrainingMemory:
        """What `editkit train` takes; arguments as `hypernet.memory.training_bytes`."""
        return training_bytes(work, self.network, self.train, is_gpu=is_gpu, reading=reading)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The digest of the hypernetwork: a run must resume with the same one.

        Raises:
            OptionError: the hypernetwork belongs to another model or to other matrices.
        """
        self._network(model, self._digest())
        return {
            "hypernetwork": torch.tensor(list(bytes.fromhex(self._digest())), dtype=torch.uint8)
        }

    def plan(self, step: Step) -> MendPlan:
        """Finds the updates; the weights are only read.

        Raises:
            OptionError: the run began with another hypernetwork.
        """
        model = step.model
        network = self._network(model, bytes(step.state["hypernetwork"].tolist()).hex())
        probes = [request.probe() for request in step.requests]
        texts = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
        factors, log_p_B = gradient_factors(model, network.modules, texts)
        updates = {}
        with torch.no_grad():
            for module, pairs in factors.items():
                counts_BT = pairs.counts_N
                left_BTO, right_BTI = network.transform(module, pairs)
                updates[module] = LowRank(
                    (self.step_scale * left_BTO[counts_BT]).T.contiguous(),
                    right_BTI[counts_BT].T.contiguous(),
                )
        loss = float(-log_p_B.mean())
        summary = {"probability_before": float(log_p_B.exp().mean()), "loss": loss, "steps": 1.0}
        return MendPlan(
            summary=summary, nonfinite=None if math.isfinite(loss) else "loss", updates=updates
        )

    def propose(self, step: Step, module: str, plan: MendPlan) -> LowRank:
        return plan.updates[module]

    def _digest(self) -> str:
        if self.hypernetwork is None:
            raise OptionError(MISSING)
        read_header(self.hypernetwork)  # reports what is wrong with the file
        return file_digest(resolve(self.hypernetwork))

    def _network(self, model: EditableModel, digest: str) -> Hypernetwork:
        """The hypernetwork with this digest on the model's device, checked against the model."""
        if self.hypernetwork is None:
            raise OptionError(MISSING)
        key = (self.hypernetwork, digest, str(model.device))
        if key not in self._loaded:
            if (now := self._digest()) != digest:
                raise OptionError(
                    changed_problem(self.hypernetwork, HYPERNETWORK, now=now, then=digest)
                )
            network, header = load_hypernetwork(self.hypernetwork, device=model.device)
            self._check(model, header)
            self._loaded.clear()
            self._loaded[key] = (network, header)
        return self._loaded[key][0]

    def _check(self, model: EditableModel, header: Header) -> None:
        assert self.hypernetwork is not None
        problems = model_problems(self.hypernetwork, HYPERNETWORK, header, model)
        now, then = model.chat and model.chat.label, header.facts.get("chat_template")
        if now != then:
            problem = f"{self.hypernetwork} was trained with another chat template"
            fix = "set model.chat_template as in the training, or train one for this template"
            problems.append(message("hypernetwork", problem, got=now, expected=str(then), fix=fix))
        modules = self.modules(model)
        if tuple(header.modules) != modules:
            problems.append(
                message(
                    "layers",
                    f"{self.hypernetwork} was trained for other matrices",
                    got=f"{list(self.layers)}, which are {', '.join(modules)}",
                    expected=", ".join(header.modules),
                )
            )
        if problems:
            raise OptionError(problems)
