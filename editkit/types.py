"""The values that flow through editkit: edit requests, records of steps, and measurements.

Everything here is frozen. Probabilities and accuracies are in [0, 1], log-probabilities and losses
in nats, times in seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The state of an editor, a restraint or an evaluator, by name. safetensors stores tensors only.
TensorState = Mapping[str, "Any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A full prompt and the bare text (no leading blank) that should follow it."""

    prompt: str  # with the subject filled in
    answer: str  # bare text
    aliases: tuple[str, ...] = ()  # further right answers, for freely generated texts only
    # what stands between prompt and answer; None: by what the prompt ends in
    # (`editkit.datasets.separators`)
    separator: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """One fact to write into the model, and the prompts that evaluate the edit.

    Targets and answers are bare text. `editkit.model.tokens` adds blanks and tokenises.
    """

    id: str  # "counterfact/17"
    prompt: str  # holds one "{}" for the subject; a full prompt if there is none
    subject: str  # the text for "{}"; empty: the prompt is edited at its last token
    target: str  # the new answer
    target_old: str | None = None  # the answer before the edit (CounterFact: target_true)
    paraphrases: tuple[str, ...] = ()  # full prompts
    neighbours: tuple[Probe, ...] = ()  # locality: prompts whose answer must stay
    # Further locality by kind: "out_of_distribution" (zsRE's NQ questions); every other kind is in
    # distribution ("relation_specificity", "forgetfulness", "unaffected_subject"). It is compared
    # with the unedited model, unless specificity is asked for: an answer need not be true (CSK's
    # are not known).
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    # Consequences of the edit by kind: "alias", "reasoning", "logical_generalization" (KnowEdit),
    # "one_hop" (zsRE), "two_hop" (world), "multi_hop" (MQuAKE), "affected_subject",
    # "affected_verb", "affected_object" (CSK); docs/guides/datasets.md lists those of all datasets.
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    # other subjects for which the new target has always been true (CounterFact)
    attribute_prompts: tuple[Probe, ...] = ()
    # beginnings of texts about the subject, for free continuation
    generation_prompts: tuple[str, ...] = ()
    # texts about subjects for which the new target is true; generated texts are compared with them
    references: tuple[str, ...] = ()
    # requests that are one change together, next to each other in a dataset (MQuAKE: the facts of
    # one chain)
    group: str | None = None
    # single-hop questions along the chain after the group's edits; like "multi_hop", on the last
    # request of the group only
    hops: tuple[Probe, ...] = ()
    separator: str | None = None  # as in `Probe`, for the prompts that the target follows

    @property
    def full_prompt(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    def probe(self, *, prompt: str | None = None, answer: str | None = None) -> Probe:
        """The full prompt, or another one, with the target, or another answer."""
        return Probe(
            prompt=self.full_prompt if prompt is None else prompt,
            answer=self.target if answer is None else answer,
            separator=self.separator,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The effects of one batch of edits: a line of `steps.jsonl`. Step 0 is the unedited model."""

    step: int  # counted from 1; 0: the unedited model
    requests: tuple[str, ...] = ()  # the ids of the batch
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase
    target: Mapping[str, float] = field(default_factory=dict)  # figures of the target search
    # By matrix: the figures of `editkit.linalg.telemetry.module_record`.
    modules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # The number that is not finite: "loss", "update of <module>", "weight of <module>".
    nonfinite: str | None = None
    # "imported": the edits rest on second moments that somebody else computed; None: on none, or
    # on editkit's own.
    statistics: str | None = None
    # What stands beside the weights: `entries` or `ranks`, `parameters`, `bytes`, `norm` (the
    # Frobenius norm of its values or products); None: nothing.
    side: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number that an evaluator measured. `EvalRecord` adds the step and the view.

    The order of the fields is the order of the keys in `evals.jsonl`.
    """

    # "editing", "downstream", "language", "comparison" (of a task with the unedited model),
    # "weights" (of a restrained view; the task is the matrix), or "routing" (the share of prompts
    # that are sent to what stands beside the weights; the task is the kind of prompts).
    kind: str
    metric: str  # "efficacy", "accuracy", ...
    value: float | None  # None: not finite
    # The standard error: the sample standard deviation of the n scores over sqrt(n), by prompt the
    # cluster-robust one (editkit.evaluation.statistics.tally). None for a single score, and for
    # metrics that are not means.
    stderr: float | None
    n: int  # number of averaged scores: requests, prompts or items
    protocol: str | None = None  # of an editing metric: "probability", "argmax", ...
    # "before", "milestone", "final", "immediate" or "rollback". An evaluator leaves it None at a
    # step's own measurement; the runner sets it.
    timing: str | None = None
    suite: str | None = None  # of a task
    task: str | None = None  # its name
    task_version: float | None = None  # of the task's yaml
    shots: int | None = None  # examples before each question of a task
    nonfinite: int | None = 0  # scores that are not finite
    cut: int | None = None  # items whose prompt exceeded the context length and lost its beginning
    variant: str | None = None  # how this number differs from what its name says
    low: float | None = None  # lower end of the bootstrap confidence interval
    high: float | None = None  # its upper end
    block: str | None = None  # "1-50": these edits alone, counted from 1
    # "known_before", "unknown_before" or "succeeded": these requests alone.
    subset: str | None = None
    aggregation: str | None = None  # what is averaged: "request" or "prompt"
    context: str | None = None  # the template around every prompt; "{}": the prompt alone
    max_new_tokens: int | None = None  # the cap of a free generation
    max_tokens: int | None = None  # the cap of a generated text, its prompt included

    @property
    def is_part(self) -> bool:
        """Whether it is about a part of the requests that another one covers as a whole."""
        return self.block is not None or self.subset is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """A measurement of one view at one step: a line of `evals.jsonl`, which is flat."""

    step: int  # the number of batches so far
    view: str  # "unrestrained", or the name of a restraint on the total
    measurement: Measurement
    # The number of edits (of the block) from which the measured ones were sampled, if it was a
    # sample.
    sampled_from: int | None = None
    dataset: str | None = None  # the beginning of the dataset's digest in provenance.json
    requests: str | None = None  # digest of the measured ids, which provenance.json lists
    chat_template: str | None = None  # how prompts were put to the model; None: as they are
    statistics: str | None = None  # "imported", as in steps.jsonl

    @classmethod
    def from_flat(cls, fields: Mapping[str, Any]) -> EvalRecord:
        """The record with these fields, those of the measurement among them: a line's keys."""
        names = {field.name for field in dataclasses.fields(Measurement)}
        own = {name: value for name, value in fields.items() if name not in names}
        inner = {name: value for name, value in fields.items() if name in names}
        return cls(measurement=Measurement(**{"nonfinite": None, **inner}), **own)

    def flat(self) -> dict[str, Any]:
        """All fields by name, in the order of a line's keys."""
        values = dataclasses.asdict(self)
        measurement: dict[str, Any] = values.pop("measurement")
        first: dict[str, Any] = {"step": values.pop("step"), "view": values.pop("view")}
        return first | measurement | values


# The keys of a line of `evals.jsonl`, in their order.
EVAL_FIELDS = (
    *("step", "view"),
    *(field.name for field in dataclasses.fields(Measurement)),
    *("sampled_from", "dataset", "requests", "chat_template", "statistics"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """Observations of one evaluator item by item, of one view at one step: a file in `samples/`.
    Rows are plain JSON values.
    """

    step: int
    view: str
    name: str  # "editing-generate", "paper-gsm8k": a file's name
    rows: tuple[Mapping[str, Any], ...]


def as_json(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """A record as plain JSON values, without fields that are None. A number that is not finite
    becomes null.
    """
    values = record.flat() if isinstance(record, EvalRecord) else dataclasses.asdict(record)
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
