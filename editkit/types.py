"""The values that flow through editkit: what is asked, what a step did, what was measured.

Everything here is frozen. Probabilities and accuracies are in [0, 1], log-probabilities and losses in nats, times in seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# One tensor per name: what an editor or a restraint carries from step to step. It must survive safetensors, so values are tensors only.
TensorState = Mapping[str, "Any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A full prompt and the bare text (no leading blank) that should follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """One fact to write into the model, and the questions that judge the edit.

    Targets and answers are bare text: blanks and tokens are the business of `editkit.model.tokens`.
    """

    id: str  # "counterfact/17"
    prompt: str  # holds one "{}" for the subject
    subject: str
    target: str
    target_old: str | None = None  # what the unedited world says (CounterFact: target_true)
    paraphrases: tuple[str, ...] = ()  # full prompts
    neighbours: tuple[Probe, ...] = ()  # locality: prompts whose answer must stay
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)

    @property
    def full_prompt(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one batch of edits did: a line of `steps.jsonl`. Step 0 describes the unedited model."""

    step: int
    requests: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    target: Mapping[str, float] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    nonfinite: str | None = None  # where a number went bad: "loss", "update of <module>", "weight of <module>"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One measurement of one view at one step: a line of `evals.jsonl`.

    `value` is None where it is not finite; `n` counts what was averaged, `nonfinite` those of them that had no finite score.
    """

    step: int
    view: str  # "unrestrained", or the name of a restraint on the total
    kind: str  # "editing", "downstream", "language", or "weights" (of a restrained view; task = the matrix)
    metric: str
    value: float | None
    stderr: float | None
    n: int
    protocol: str | None = None
    timing: str | None = None
    suite: str | None = None
    task: str | None = None
    task_version: int | None = None
    nonfinite: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """What one evaluator saw item by item, of one view at one step: a file in `samples/`. Rows are plain JSON values."""

    step: int
    view: str
    name: str  # "editing-generate", "paper-gsm8k": a file's name
    rows: tuple[Mapping[str, Any], ...]


def as_json(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """A record as plain JSON values, without the fields that are None; a number that is not finite becomes null."""
    return {name: _plain(value) for name, value in dataclasses.asdict(record).items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
