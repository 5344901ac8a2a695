"""The interface of datasets, and the conversion of records to checked edit requests. It needs
neither torch nor a model.
"""

from __future__ import annotations

import abc
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from editkit.datasets.fields import Fields, Occurrence
from editkit.datasets.records import Records
from editkit.datasets.separators import AUTO, WORDS, kinds_of, problem_of, separated
from editkit.errors import ConfigError, message
from editkit.types import EditRequest

Order = Literal["file", "shuffled", "reversed"]
OnBadRecord = Literal["error", "skip"]
_COUNTS = ("skipped", "left_out", "remarks")
AT_LAST_TOKEN = "requests whose prompt does not hold the subject, edited at its last token"
WITHOUT_SUBJECT = "requests without a subject, which the editor does not need"
MAX_SHOWN = 20  # problems that one error message lists, unless the dataset wants all of them
# (fields of a record, its index) -> its requests; problems stay in the findings of the fields
Parse = Callable[[Fields, int], Sequence[EditRequest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDataset:
    """The requests in the order of the edits, and their provenance."""

    name: str
    requests: tuple[EditRequest, ...]
    digest: str  # sha256 of what was read
    origin: str  # the file or another source of the records
    # reason -> number of records; each record counts once, by its first problem
    skipped: Mapping[str, int] = field(default_factory=dict)
    # unusable part of a usable record -> number of occurrences
    left_out: Mapping[str, int] = field(default_factory=dict)
    # oddity of records or requests -> their number
    remarks: Mapping[str, int] = field(default_factory=dict)
    # options whose values give incomparable results, such as zsRE's target
    variant: Mapping[str, str] = field(default_factory=dict)
    # what stands between prompts and answers -> number of prompts
    separators: Mapping[str, int] = field(default_factory=dict)
    # whether the requests are still to be selected by what the unedited model knows
    known_only: bool = False

    def provenance(self) -> dict[str, object]:
        """All fields except the requests, as plain values."""
        facts: dict[str, object] = {
            "name": self.name,
            "origin": self.origin,
            "digest": self.digest,
            "requests": len(self.requests),
        }
        facts |= {name: dict(getattr(self, name)) for name in ("variant", *_COUNTS, "separators")}
        if without := [request.id for request in self.requests if not request.subject]:
            needless = WITHOUT_SUBJECT in self.remarks
            facts["without_subject" if needless else "edited_at_last_token"] = without
        return facts

    def counts(self) -> Iterator[tuple[str, str]]:
        """Pairs (kind, "number x reason") of everything skipped, left out or remarked."""
        for kind in _COUNTS:
            yield from (
                (kind, f"{number} x {reason}") for reason, number in getattr(self, kind).items()
            )

    @property
    def label(self) -> str:
        """The name with the variant, for tables."""
        return self.name + "".join(f" {key}={value}" for key, value in self.variant.items())


@dataclass(frozen=True, kw_only=True)
class AbstractDataset(abc.ABC):
    """A source of edit requests. A dataset is a frozen dataclass whose fields are its options."""

    name: str
    # Only facts that the unedited model knows are edited. The runner selects them
    # (`editkit.runner.known`), because that needs the model.
    known_only: bool = False
    # what stands between a prompt and its target: auto, or the same text for every request without
    # one of its own (`editkit.datasets.separators`)
    separator: str = AUTO

    @abc.abstractmethod
    def load(self, seed: int) -> LoadedDataset:
        """All requests. `seed` determines a shuffled order.

        Raises:
            ConfigError: data is missing or malformed; all problems are reported together.
        """


@dataclass(frozen=True, kw_only=True)
class AbstractFullPrompts(AbstractDataset):
    """A dataset whose records hold a full prompt and the subject, which is looked for in it."""

    # what to do with a prompt that does not hold the subject: refuse it, or edit at its last token
    # (`fact_token: last` of the published code). "unneeded" is set for an editor that needs none: a
    # record may lack it, and what is edited does not depend on it.
    subject: Literal["required", "last_token", "unneeded"] = "required"
    # which one is the subject where it stands several times: in the prompt as a whole word, else
    # anywhere
    occurrence: Occurrence = "first"

    def subject_of(self, fields: Fields, key: str) -> str:
        """The subject of a record. It may be missing unless it is required."""
        if self.subject != "required":
            return fields.optional_text(key) or ""
        return fields.text(key)

    def located(
        self,
        fields: Fields,
        key: str,
        subject: str,
        *,
        occurrence: Occurrence | None = None,
        keeps_end: bool = False,
    ) -> tuple[str, str]:
        """The prompt with "{}" for the subject, and the subject; or the full prompt and no subject,
        which is remarked.
        """
        prompt = fields.template_of(
            key,
            subject,
            occurrence=occurrence or self.occurrence,
            may_lack=self.subject == "last_token" or (self.subject == "unneeded" and not subject),
            keeps_end=keeps_end,
        )
        is_bad = not prompt and self.subject == "unneeded"
        if "{}" in prompt or self.subject == "required" or is_bad:
            return prompt, subject
        fields.remark(AT_LAST_TOKEN if self.subject == "last_token" else WITHOUT_SUBJECT)
        return prompt, ""


def without_subjects(dataset: AbstractDataset) -> AbstractDataset:
    """The dataset for an editor that needs no subject. Where bad records are skipped, those without
    a subject still are, so that a run keeps its requests.
    """
    skips = getattr(dataset, "on_bad_record", "error") == "skip"
    if isinstance(dataset, AbstractFullPrompts) and dataset.subject == "required" and not skips:
        return replace(dataset, subject="unneeded")
    return dataset


def loaded(dataset: AbstractDataset, seed: int) -> LoadedDataset:
    """The requests of a dataset with what stands between their prompts and targets. The dataset's
    options that give incomparable results are in the variant.

    Raises:
        ConfigError: as `load`, or the separator is invalid.
    """
    if problem := problem_of(dataset.separator):
        raise ConfigError(f"dataset.{problem}")
    data = dataset.load(seed)
    requests = tuple(separated(request, dataset.separator) for request in data.requests)
    variant = dict(data.variant)
    if dataset.separator != AUTO:
        variant["separator"] = repr(WORDS.get(dataset.separator, dataset.separator))
    if isinstance(dataset, AbstractFullPrompts):
        if dataset.subject == "last_token":
            variant["subject"] = dataset.subject
        if dataset.occurrence != "first":
            variant["occurrence"] = dataset.occurrence
    return replace(data, requests=requests, variant=variant, separators=kinds_of(requests))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parsed:
    """The result of a pass over the records."""

    requests: list[EditRequest] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)


def load_records(
    records: Records,
    parse: Parse,
    *,
    name: str,
    order: Order,
    seed: int,
    limit: int | None,
    on_bad_record: OnBadRecord,
    variant: Mapping[str, str] | None = None,
    max_shown: int | None = MAX_SHOWN,
) -> LoadedDataset:
    """The arranged requests of all good records. Bad records give an error, or are skipped and
    counted by reason.

    Raises:
        ConfigError: no record is good, or one is bad and `on_bad_record` is "error"; all problems
            are reported together.
    """
    parsed = _parse(records, parse)
    if parsed.problems and (on_bad_record == "error" or not parsed.requests):
        hidden = max(len(parsed.problems) - max_shown, 0) if max_shown is not None else 0
        shown = parsed.problems[: len(parsed.problems) - hidden]
        if hidden:
            frequent = ", ".join(
                f"{reason} ({number} records)" for reason, number in parsed.skipped.most_common(3)
            )
            shown.append(
                message(records.origin, f"{hidden} more problems; most frequent: {frequent}")
            )
        if parsed.requests:
            counted = "" if records.lines is not None else " (records are counted from 0)"
            shown[-1] += (
                " Fix: set dataset.on_bad_record=skip, which leaves such records out and keeps "
                f"{len(parsed.requests)} requests{counted}."
            )
        raise ConfigError(shown)
    if not parsed.requests:
        raise ConfigError(
            message(records.origin, "the file has no records", expected="at least one")
        )
    arranged = arrange(parsed.requests, order=order, seed=seed, limit=limit)
    return LoadedDataset(
        name=name,
        requests=arranged,
        digest=records.digest,
        origin=records.origin,
        skipped=dict(parsed.skipped),
        left_out=dict(parsed.left_out),
        remarks=dict(parsed.remarks + _repetitions(arranged)),
        variant=variant or {},
    )


def _parse(records: Records, parse: Parse) -> _Parsed:
    parsed = _Parsed()
    place_of: dict[str, str] = {}  # by id
    closed_groups: set[str] = set()
    broken_groups: set[str] = set()
    open_group: str | None = None
    for index, record in enumerate(records.records):
        fields, place = Fields(record), records.place(index)
        # A record that is no object has one problem instead of one for each field.
        requests = () if fields.problems else parse(fields, index)
        if not fields.problems:
            for request in requests:
                if request.id in place_of:
                    fields.note(
                        "id",
                        "is not unique",
                        got=request.id,
                        expected=f"an id other than that of {place_of[request.id]}",
                    )
        group = requests[0].group if requests else None
        if group != open_group:
            closed_groups |= {open_group} if open_group is not None else set()
            open_group = group
            if group in closed_groups:
                fields.note(
                    "group",
                    "is interrupted",
                    got=repr(group),
                    expected="consecutive records for each group",
                )
        if fields.problems:
            identity = fields.get("id") if fields.get("case_id") is None else fields.get("case_id")
            named = f"{place} (id {identity})" if isinstance(identity, str | int) else place
            parsed.problems.extend(
                problem.at(f"{records.origin}, {named}") for problem in fields.problems
            )
            parsed.skipped[f"{fields.problems[0].field}: {fields.problems[0].reason}"] += 1
            broken_groups |= {group} if group is not None else set()
            continue
        place_of |= {request.id: place for request in requests}
        parsed.left_out.update(fields.findings.left_out)
        parsed.remarks.update(fields.findings.remarks)
        parsed.requests.extend(requests)
    if broken_groups:  # questions about the whole group would measure a part of its edits
        kept = [request for request in parsed.requests if request.group not in broken_groups]
        if len(kept) < len(parsed.requests):
            parsed.skipped["group: another record of it is bad"] += len(parsed.requests) - len(kept)
        parsed.requests[:] = kept
    return parsed


def _repetitions(requests: Sequence[EditRequest]) -> Counter[str]:
    """The number of requests for a prompt that an earlier request has edited. In a sequence they
    repeat or overwrite that edit.
    """
    repetitions: Counter[str] = Counter()
    targets: dict[str, str] = {}
    for request in requests:
        if request.full_prompt in targets:
            same = targets[request.full_prompt] == request.target
            repetitions[
                "requests that edit the prompt of an earlier one again, to "
                f"{'the same' if same else 'another'} target"
            ] += 1
        targets[request.full_prompt] = request.target
    return repetitions


def units(requests: Sequence[EditRequest]) -> list[tuple[EditRequest, ...]]:
    """The requests in what must stay together: the groups, and each request without a group."""
    return [
        tuple(unit)
        for _, unit in itertools.groupby(
            requests,
            key=lambda request: (request.group, request.id if request.group is None else None),
        )
    ]


def arrange(
    requests: Sequence[EditRequest], *, order: Order, seed: int, limit: int | None
) -> tuple[EditRequest, ...]:
    """The first `limit` requests in file order, shuffled by the seed, or from the last to the
    first. Groups stay together and complete.
    """
    if limit is not None and limit < 1:
        raise ConfigError(
            message(
                "dataset.limit",
                "out of range",
                got=limit,
                expected="at least 1, or null for all records",
            )
        )
    arranged_units = units(requests)
    if order == "shuffled":
        random.Random(f"order/{seed}").shuffle(arranged_units)
    elif order == "reversed":
        arranged_units.reverse()
    if limit is None:
        return tuple(itertools.chain.from_iterable(arranged_units))
    sizes = itertools.accumulate(len(unit) for unit in arranged_units)
    arranged = tuple(
        itertools.chain.from_iterable(
            unit for unit, size in zip(arranged_units, sizes, strict=True) if size <= limit
        )
    )
    if not arranged:
        raise ConfigError(
            message(
                "dataset.limit",
                "is smaller than the first group of requests, which must stay complete",
                got=limit,
                expected=f"at least {len(arranged_units[0])}",
            )
        )
    return arranged
