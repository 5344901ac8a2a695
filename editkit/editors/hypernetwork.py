"""What editors with a hypernetwork have in common: its file, and what they refuse.

A hypernetwork belongs to one model (by its fingerprint), to its matrices, and to requests that it
was not trained on.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from editkit.editors.base import AbstractEditor, Plan
from editkit.editors.trained import (
    changed_problem,
    header_problems,
    model_problems,
    request_problems,
    trained_provenance,
)
from editkit.errors import OptionError, message
from editkit.files import file_digest
from editkit.hypernet.abstract import AbstractNetwork, Shape
from editkit.hypernet.options import TrainingOptions
from editkit.hypernet.store import Header, Kind, read_header, read_tensors, resolve
from editkit.lazy import torch
from editkit.resources.workload import TrainingMemory, Workload
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.hypernet.examples import Split
    from editkit.hypernet.learning import AbstractLearning
    from editkit.model.editable import EditableModel

PlanT = TypeVar("PlanT", bound=Plan)
NetworkT = TypeVar("NetworkT", bound=AbstractNetwork)


@dataclass(frozen=True, kw_only=True)
class AbstractHypernetEditor(AbstractEditor[PlanT], Generic[PlanT, NetworkT]):
    """An editor that `editkit train` trains."""

    needs_subject: ClassVar[bool] = False
    kind: ClassVar[Kind]  # of its file
    needs_network: ClassVar[bool]  # else it edits without training, too

    name: str
    layers: tuple[int, ...]
    hypernetwork: str | None
    network: Any  # the sizes of a network
    train: TrainingOptions
    # The loaded file by path, digest and device. A real model's takes hundreds of megabytes, and
    # every edit needs it.
    _loaded: dict[tuple[str, str, str], tuple[NetworkT, Header]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @abc.abstractmethod
    def new_network(self, shapes: Mapping[str, Shape], *, seed: int) -> NetworkT:
        """An untrained network for these matrices."""

    @abc.abstractmethod
    def stored_network(self, header: Header, tensors: Mapping[str, torch.Tensor]) -> NetworkT:
        """The network in a file."""

    @abc.abstractmethod
    def learning(
        self,
        model: EditableModel,
        split: Split,
        *,
        seed: int,
        checkpoint_every: int,
        should_stop: Callable[[], bool],
    ) -> AbstractLearning[NetworkT]:
        """A training on these requests."""

    @abc.abstractmethod
    def training_memory(self, work: Workload, *, is_gpu: bool, reading: float) -> TrainingMemory:
        """What `editkit train` takes. `reading`: the temporary bytes for loading a model."""

    def shapes(self, model: EditableModel) -> dict[str, Shape]:
        """(O, I) by matrix, in the order of `modules`."""
        return {
            module: (model.weight(module).shape[0], model.weight(module).shape[1])
            for module in self.modules(model)
        }

    def lacks(self) -> list[str]:
        """A hypernetwork that can be read, and that is one of this editor's."""
        if self.hypernetwork is None:
            return [self._missing()] if self.needs_network else []
        if problems := header_problems(self.hypernetwork, self.kind):
            return problems
        if (editor := read_header(self.hypernetwork, self.kind).editor) != self.kind.editor:
            problem = f"{self.hypernetwork} is the network of another editor"
            return [message(self.kind.key, problem, got=editor, expected=self.kind.editor)]
        return []

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """Refuses a damaged hypernetwork, and one that was trained on some of these requests."""
        if lacking := self.lacks():
            return lacking
        if self.hypernetwork is None:
            return []
        return request_problems(self.hypernetwork, self.kind, data, requests)

    def provenance(self) -> Mapping[str, object]:
        return trained_provenance(self.hypernetwork, self.kind)

    def trained_network(self, model: EditableModel, digest: str) -> NetworkT:
        """The hypernetwork with this digest on the model's device, checked against the model.

        Raises:
            OptionError: the file is another one by now, or does not belong to the model.
        """
        if self.hypernetwork is None:
            raise OptionError(self._missing())
        key = (self.hypernetwork, digest, str(model.device))
        if key not in self._loaded:
            if (now := self.network_digest()) != digest:
                problem = changed_problem(self.hypernetwork, self.kind, now=now, then=digest)
                raise OptionError(problem)
            header, tensors = read_header(self.hypernetwork), read_tensors(self.hypernetwork)
            on_device = {name: tensor.to(model.device) for name, tensor in tensors.items()}
            self._check(model, header)
            self._loaded.clear()
            self._loaded[key] = (self.stored_network(header, on_device), header)
        return self._loaded[key][0]

    def network_digest(self) -> str:
        """The SHA-256 of the hypernetwork's file, in hexadecimal digits."""
        if self.hypernetwork is None:
            raise OptionError(self._missing())
        read_header(self.hypernetwork)  # reports what is wrong with the file
        return file_digest(resolve(self.hypernetwork))

    def digest_state(self) -> TensorState:
        """The digest for a run's state: a run must resume with the same file."""
        digest = bytes.fromhex(self.network_digest())
        return {"hypernetwork": torch.tensor(list(digest), dtype=torch.uint8)}

    def digest_of(self, state: TensorState) -> str:
        """The inverse of `digest_state`."""
        return bytes(state["hypernetwork"].tolist()).hex()

    def _missing(self) -> str:
        return message(
            "hypernetwork",
            f"not set, and {self.kind.editor.upper()} needs a trained one",
            fix=f"train one with `editkit train editor={self.kind.editor} model=... dataset=...`, "
            "which prints its folder",
        )

    def _check(self, model: EditableModel, header: Header) -> None:
        assert self.hypernetwork is not None
        problems = model_problems(self.hypernetwork, self.kind, header, model)
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
