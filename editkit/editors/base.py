"""The editors' interface: from edit requests to updates of weight matrices, or to what stands
beside the weights. An editor reads the model and never writes it.

There are two kinds, because they propose different things. `AbstractEditor` proposes one update for
each matrix, on the weights as the updates before it left them. `AbstractSideEditor` proposes one
state for all the modules beside which it acts: named tensors (a text is a tensor of bytes). They
share everything else.

The runner owns the order: `contexts` and `init` once a run; `plan` once a batch. Then, for weights:
`propose` once a module, each module after the updates of the modules before it were applied;
`observe` after the whole batch was applied. Beside the weights: `propose` once, and the model
attaches what `attach` makes of the new state.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, cast

from editkit.errors import ConfigError, message
from editkit.model.tokens import PLACE, encode_with_targets
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.restraints.base import Place
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.stats.store import Moments
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.lazy import torch
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.model.side_value import AbstractBeside
    from editkit.targets.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch of edits, with everything that stays the same while it is made."""

    model: EditableModel
    requests: tuple[EditRequest, ...]
    contexts: tuple[str, ...] = (PLACE,)  # templates with one "{}"; the bare prompt comes first
    state: TensorState = field(default_factory=dict)  # the editor's, from before this batch
    moments: Moments = field(default_factory=Moments)  # second moments of keys, by module
    pool: tuple[EditRequest, ...] = ()  # of the dataset, which the run does not edit
    objective: Objective | None = None  # replaces the descent of a target search (EAC)
    solver: Callable[[LeastSquares], Update] | None = None  # replaces the least squares (D4S)
    others: tuple[AbstractBeside, ...] = ()  # what other editors put beside the weights

    def solve(self, problem: LeastSquares) -> Update:
        """The update that a problem asks for: restrained, or the plain minimiser."""
        solver = self.solver
        return least_squares(problem, self.moments) if solver is None else solver(problem)

    @property
    def request(self) -> EditRequest:
        """The one request of an editor with `max_batch_size = 1`. Raises ConfigError for more."""
        if len(self.requests) != 1:
            problem = "the editor edits one request at a time"
            raise ConfigError(
                message("batch_size", problem, got=len(self.requests), fix="set batch_size=1")
            )
        return self.requests[0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an editor finds for a batch before anything is written.

    Editors extend it by what their `propose` needs.
    """

    # StepRecord.target: probability_before, probability_after, steps, loss
    summary: Mapping[str, float] = field(default_factory=dict)
    nonfinite: str | None = None  # which number is not finite; then nothing is written


PlanT = TypeVar("PlanT", bound=Plan)


class AbstractAnyEditor(abc.ABC, Generic[PlanT]):
    """What both kinds of editors have in common.

    Concrete editors are frozen dataclasses of one of the two kinds: their fields are the options.
    """

    # Where restraints may act on this editor.
    places: ClassVar[frozenset[Place]]
    max_batch_size: ClassVar[int | None] = None  # requests of one batch; None: any number
    spans_devices: ClassVar[bool] = False  # whether it works with model.device_map
    # Whether a prompt's subject says where an edit acts; else requests need none.
    needs_subject: ClassVar[bool] = True

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of keys are needed. Known before a model is loaded."""
        return False

    @property
    def is_at_once(self) -> bool:
        """Whether all edits of a run are made by its first batch."""
        return False

    def lacks(self) -> list[str]:
        """What a run needs and this editor does not have. Known before a dataset is read."""
        return []

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Why this editor cannot make these edits of `data`. Known before a model is loaded."""
        return []

    def provenance(self) -> Mapping[str, object]:
        """Files besides the model that the edits depend on, as plain values."""
        return {}

    def changed_since(self, provenance: Mapping[str, object]) -> list[str]:
        """Why a complete run with this `provenance` is not one of the present files."""
        return []

    def memory(self, work: Workload) -> EditorMemory:
        """What planning a batch takes. The default: four copies of each edited matrix in float32,
        and a gradient through the whole network for two rows of tokens.
        """
        matrices = work.num_matrices * 4 * 4 * work.matrix
        gradient = work.kept(2 * REQUEST, work.architecture.num_layers)
        return EditorMemory(working=matrices + gradient)

    @abc.abstractmethod
    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """Dotted names of the matrices that are written, in that order, or beside which it acts.

        Raises:
            ConfigError: a layer is out of range.
        """

    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        """Names of the matrices whose keys' second moments are needed."""
        return self.modules(model) if self.needs_moments else ()

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """Context templates, each with one "{}" for the prompt, the bare "{}" first.

        They are sampled once a run on the unedited model and kept in the run's state.
        """
        return (PLACE,)

    def edited_tokens(
        self, model: EditableModel, request: EditRequest
    ) -> tuple[Sequence[int], Sequence[int]]:
        """The tokens of a request, and the positions at which the edit acts."""
        [sequence] = encode_with_targets(model.tokenizer, [request.probe()], chat=model.chat)
        return sequence.ids[:-1], range(len(sequence.ids) - 1)

    def context_tokens(
        self, model: EditableModel, requests: Sequence[EditRequest], pool: Sequence[EditRequest]
    ) -> int:
        """The largest number of tokens that these edits put before a prompt.

        Args:
            pool: requests of the dataset that are not edited.
        """
        return 0

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        """The shortcuts that the editor takes, each beside the plain computation."""
        return []

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The state before the first edit. Raises ConfigError for what a run cannot begin with."""
        return {}

    def plan(self, step: Step) -> PlanT:
        """Target vectors and whatever else is computed once a batch; the weights are only read."""
        return cast(PlanT, Plan())


class AbstractEditor(AbstractAnyEditor[PlanT]):
    """A method that turns edit requests into updates of weight matrices.

    Only `modules` and `propose` have to be written.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"update", "total"})

    @abc.abstractmethod
    def propose(self, step: Step, module: str, plan: PlanT) -> Update:
        """The update of one matrix, (O, I), on the weights as they are now."""

    def observe(self, step: Step, plan: PlanT) -> TensorState:
        """The state after the batch, whose plan this is, was applied."""
        return step.state


class AbstractSideEditor(AbstractAnyEditor[PlanT]):
    """A method that puts something beside the weights, which stay as they are.

    Its state is what stands there: `init` returns that of no edits. `modules`, `propose` and
    `attach` have to be written.
    """

    places: ClassVar[frozenset[Place]] = frozenset()

    @abc.abstractmethod
    def propose(self, step: Step, plan: PlanT) -> TensorState:
        """The state with the edits of the batch. The one before is not modified."""

    @abc.abstractmethod
    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractBeside, ...]:
        """What this state is beside the model, on its device: where it hooks, and what it does
        there.
        """
