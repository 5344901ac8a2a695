"""No edits: measurements of the unedited model, or of a model that somebody else edited.

With `edited`, the first batch puts the weights of that model in place of the base's. So the base
gives the answers that locality is compared with, and the matrices that differ have the telemetry of
edited ones. All edits are in the model at once.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.model.difference import OtherWeights, files_of, other_weights, source_problems
from editkit.model.families import Outline
from editkit.resources.workload import EditorMemory, Workload
from editkit.restraints.base import Place
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments

KEY = "edited"


@dataclass(frozen=True, kw_only=True)
class NoEditor(AbstractEditor[Plan]):
    """Makes no edits. The options are documented in `conf/editor/none.yaml`."""

    places: ClassVar[frozenset[Place]] = frozenset({"total"})
    spans_devices: ClassVar[bool] = True

    name: str
    edited: str | None
    # The weights of the edited model by the fingerprint of the base: to compare two models takes
    # longer than to write the difference.
    _loaded: dict[str, OtherWeights] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @property
    def is_at_once(self) -> bool:
        return self.edited is not None

    def modules(self, model: EditableModel | Outline) -> tuple[str, ...]:
        """The matrices and other parameters that differ, in the order of the network. They are not
        known of an outline.

        Raises:
            ConfigError: the edited model cannot be loaded, or is no edited version of this one.
        """
        if self.edited is None or isinstance(model, Outline):
            return ()
        return tuple(self._weights(model).by_name)

    def lacks(self) -> list[str]:
        """The files of the edited model."""
        return [] if self.edited is None else source_problems(self.edited, KEY)

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        return self.lacks()

    def changed_since(self, provenance: Mapping[str, object]) -> list[str]:
        recorded = provenance.get(KEY)
        then = recorded.get("files") if isinstance(recorded, Mapping) else None
        if then is None or then == self.files():
            return []
        problem = f"the files of {self.edited} are not those that were measured"
        return [message(KEY, problem, fix="measure it anew with resume=never")]

    def memory(self, work: Workload) -> EditorMemory:
        """At most a second model while both are compared."""
        second = work.architecture.num_parameters * work.weight_bytes if self.edited else 0
        return EditorMemory(working=float(second))

    def provenance(self) -> Mapping[str, object]:
        """The edited model, once it was compared with its base."""
        for weights in self._loaded.values():
            about = {"fingerprint": weights.fingerprint, "differs_in": list(weights.by_name)}
            return {KEY: {"model": self.edited, "files": self.files(), **about}}
        return {}

    def files(self) -> str | None:
        """A digest of the edited model's files; None without one, and for a model of the hub."""
        return None if self.edited is None else files_of(self.edited)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The fingerprint of the edited model: a run must resume with the same one."""
        if self.edited is None:
            return {}
        digest = bytes.fromhex(self._weights(model).fingerprint)
        return {KEY: torch.tensor(list(digest), dtype=torch.uint8)}

    def plan(self, step: Step) -> Plan:
        """Nothing is planned.

        Raises:
            OptionError: the run began with another edited model.
        """
        if self.edited is not None:
            now = self._weights(step.model).fingerprint
            if (then := bytes(step.state[KEY].tolist()).hex()) != now:
                raise OptionError(
                    message(
                        KEY,
                        f"{self.edited} is not the model that this run began with",
                        got=f"fingerprint {now[:12]}...",
                        expected=f"{then[:12]}...",
                        fix="restore that model, or start anew with resume=never",
                    )
                )
        return Plan()

    def propose(self, step: Step, module: str, plan: Plan) -> torch.Tensor:
        """What the edited model has more than the present one, (O, I) float32."""
        now_OI = step.model.weight(module)
        return self._weights(step.model).by_name[module].to(now_OI.device).float() - now_OI.float()

    def _weights(self, model: EditableModel) -> OtherWeights:
        """The weights that differ from the unedited `model`, compared once."""
        assert self.edited is not None
        if model.fingerprint not in self._loaded:
            found = other_weights(model, self.edited, f"editor.{KEY}")
            self._loaded.clear()
            self._loaded[model.fingerprint] = found
        return self._loaded[model.fingerprint]
