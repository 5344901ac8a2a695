"""The values that flow through editkit: what is asked, what a step did, what was measured.

Everything here is frozen. Probabilities and accuracies are in [0, 1], log-probabilities and losses
in nats, times in seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# One tensor per name: what an editor or a restraint carries from step to step. It must survive
# safetensors, so values are tensors only.
TensorState = Mapping[str, "Any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A full prompt and the bare text (no leading blank) that should follow it."""

    prompt: str
    answer: str
    aliases: tuple[
        str, ...
        # further answers that count as right; only what is generated freely can be compared with
        # them
    ] = ()


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
    # Further locality by kind: "out_of_distribution" (zsRE's NQ questions); every other kind is in
    # distribution ("relation_specificity", "forgetfulness", "unaffected_subject"). Judged against
    # the unedited model alone: an answer need not be true (CSK's are not known).
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    # What follows from the edit: "alias", "reasoning", "logical_generalization" (KnowEdit),
    # "one_hop" (zsRE), "two_hop" (world), "multi_hop" (MQuAKE), "affected_subject",
    # "affected_verb", "affected_object" (CSK).
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    attribute_prompts: tuple[
        Probe, ...
    ] = ()  # other subjects of which the new target has always been true (CounterFact)
    generation_prompts: tuple[
        str, ...
    ] = ()  # beginnings of texts about the subject, to be continued freely
    references: tuple[
        str, ...
        # texts about subjects of which the new target is true; the generated ones should be like
        # them
    ] = ()
    group: str | None = (
        # requests that are one change together, next to each other in a dataset (MQuAKE: the facts
        # of one chain)
        None
    )
    hops: tuple[
        Probe, ...
        # single-hop questions along the chain after the group's edits; like "multi_hop" on its last
        # request only
    ] = ()

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
    nonfinite: str | None = (
        None  # where a number went bad: "loss", "update of <module>", "weight of <module>"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One measurement of one view at one step: a line of `evals.jsonl`.

    `value` is None where it is not finite; `n` counts what was averaged, `nonfinite` those of them
    that had no finite score.
    """

    step: int
    view: str  # "unrestrained", or the name of a restraint on the total
    # "editing", "downstream", "language", "comparison" (of a task with the unedited model), or
    # "weights" (of a restrained view; task = the matrix)
    kind: str
    metric: str
    value: float | None
    stderr: float | None
    n: int
    protocol: str | None = None
    timing: str | None = None
    suite: str | None = None
    task: str | None = None
    task_version: float | None = None
    shots: int | None = None  # how many examples stand before each of a task's questions
    nonfinite: int | None = None
    cut: int | None = (
        # how many of the items had a prompt longer than the model's positions, which lost its
        # beginning
        None
    )
    variant: str | None = None  # how this number differs from what its name says
    low: float | None = None  # bootstrap confidence interval
    high: float | None = None
    block: str | None = None  # "1-50": these edits alone, counted from 1
    subset: str | None = (
        None  # "known_before", "unknown_before" or "succeeded": these requests alone
    )
    aggregation: str | None = None  # what is averaged: "request" or "prompt"
    context: str | None = None  # what every prompt stood in; "{}": the prompt alone
    max_new_tokens: int | None = None  # where a free generation was cut
    max_tokens: int | None = None  # how long a generated text may be, its prompt included
    sampled_from: int | None = (
        # from how many edits (of the block) the measured ones were drawn, where not all were
        # measured
        None
    )
    dataset: str | None = None  # its digest, the beginning of that in provenance.json
    requests: str | None = (
        None  # digest of the ids that were measured; provenance.json tells which they are
    )

    @property
    def is_part(self) -> bool:
        """Whether it is about a part of the requests that another record is about as a whole."""
        return self.block is not None or self.subset is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """What one evaluator saw item by item, of one view at one step: a file in `samples/`. Rows are
    plain JSON values.
    """

    step: int
    view: str
    name: str  # "editing-generate", "paper-gsm8k": a file's name
    rows: tuple[Mapping[str, Any], ...]


def as_json(record: StepRecord | EvalRecord) -> dict[str, Any]:
    """A record as plain JSON values, without the fields that are None; a number that is not finite
    becomes null.
    """
    return {
        name: _plain(value)
        for name, value in dataclasses.asdict(record).items()
        if value is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
