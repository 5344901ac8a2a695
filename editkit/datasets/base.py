"""The dataset's interface: options in, checked edit requests out. Nothing here needs torch or a
model.
"""

from __future__ import annotations

import abc
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from editkit.datasets.fields import Fields
from editkit.datasets.records import Records
from editkit.errors import ConfigError
from editkit.types import EditRequest

Order = Literal["file", "shuffled"]
OnBadRecord = Literal["error", "skip"]
_COUNTS = ("skipped", "left_out", "remarks")
MAX_SHOWN = 20  # problems that one error message lists, unless the dataset wants all of them
Parse = Callable[
    [Fields, int], Sequence[EditRequest]
]  # the requests of a record and its index; problems stay in the fields' findings


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDataset:
    """The requests in the order in which they are to be edited, and what the provenance says of
    them.
    """

    name: str
    requests: tuple[EditRequest, ...]
    digest: str  # sha256 of what was read
    origin: str  # the file, or where else the records came from
    # reason -> number of records; each record counts once, by its first problem
    skipped: Mapping[str, int] = field(default_factory=dict)
    # what was left out of records that are used -> how often
    left_out: Mapping[str, int] = field(default_factory=dict)
    # what is odd about records or requests -> their number
    remarks: Mapping[str, int] = field(default_factory=dict)
    # readings that are not comparable with each other: zsRE's target
    variant: Mapping[str, str] = field(default_factory=dict)

    def provenance(self) -> dict[str, object]:
        """All but the requests themselves, as plain values."""
        found: dict[str, object] = {
            "name": self.name,
            "origin": self.origin,
            "digest": self.digest,
            "requests": len(self.requests),
        }
        return found | {name: dict(getattr(self, name)) for name in ("variant", *_COUNTS)}

    def counts(self) -> Iterator[tuple[str, str]]:
        """What was skipped, left out or is odd: (kind, number and reason), for a person to read."""
        for kind in _COUNTS:
            yield from (
                (kind, f"{number} x {reason}") for reason, number in getattr(self, kind).items()
            )

    @property
    def label(self) -> str:
        """The name with the variant, as tables should say it."""
        return self.name + "".join(f" {key}={value}" for key, value in self.variant.items())


class AbstractDataset(abc.ABC):
    """A source of edit requests. Concrete datasets are frozen dataclasses: their fields are the
    options.
    """

    name: str

    @abc.abstractmethod
    def load(self, seed: int) -> LoadedDataset:
        """All requests; `seed` decides their order where the options ask for a shuffled one.

        Raises:
            ConfigError: what is missing or malformed, all of it at once.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parsed:
    """What a pass over the records gave."""

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
    """Every good record's requests, arranged; bad records are an error that lists them, or skipped
    and counted by reason.

    Raises:
        ConfigError: no record is good, or one is bad and `on_bad_record` is "error"; all problems
        at once.
    """
    parsed = _parse(records, parse)
    if parsed.problems and (on_bad_record == "error" or not parsed.requests):
        hidden = max(len(parsed.problems) - max_shown, 0) if max_shown is not None else 0
        shown = parsed.problems[: len(parsed.problems) - hidden]
        if hidden:
            frequent = ", ".join(
                f"{reason} ({number} records)" for reason, number in parsed.skipped.most_common(3)
            )
            shown.append(f"{records.origin}: {hidden} more problems; most frequent: {frequent}")
        if parsed.requests:
            counted = "" if records.lines is not None else " (records are counted from 0)"
            shown[-1] += (
                " - dataset.on_bad_record=skip leaves such records out and keeps "
                f"{len(parsed.requests)} requests{counted}"
            )
        raise ConfigError(shown)
    if not parsed.requests:
        raise ConfigError(f"{records.origin}: holds no records - at least one is needed")
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
        requests = (
            () if fields.problems else parse(fields, index)
        )  # what is no record at all has one problem, not one for each field
        if not fields.problems:
            for request in requests:
                if request.id in place_of:
                    fields.note(
                        "id",
                        "is not unique",
                        given=request.id,
                        allowed=f"it is the id of {place_of[request.id]} too",
                    )
        group = requests[0].group if requests else None
        if group != open_group:
            closed_groups |= {open_group} if open_group is not None else set()
            open_group = group
            if group in closed_groups:
                fields.note(
                    "group",
                    "is interrupted",
                    given=repr(group),
                    allowed="records of a group must follow each other",
                )
        if fields.problems:
            identity = fields.get("id") if fields.get("case_id") is None else fields.get("case_id")
            named = f"{place} (id {identity})" if isinstance(identity, str | int) else place
            parsed.problems.extend(
                f"{records.origin}, {named}: {problem}" for problem in fields.problems
            )
            parsed.skipped[f"{fields.problems[0].field}: {fields.problems[0].reason}"] += 1
            broken_groups |= {group} if group is not None else set()
            continue
        place_of |= {request.id: place for request in requests}
        parsed.left_out.update(fields.findings.left_out)
        parsed.remarks.update(fields.findings.remarks)
        parsed.requests.extend(requests)
    if broken_groups:  # a part of a change would be judged by questions about the whole
        kept = [request for request in parsed.requests if request.group not in broken_groups]
        if len(kept) < len(parsed.requests):
            parsed.skipped["group: another record of it is bad"] += len(parsed.requests) - len(kept)
        parsed.requests[:] = kept
    return parsed


def _repetitions(requests: Sequence[EditRequest]) -> Counter[str]:
    """Requests for a prompt that an earlier request has edited: in a sequence they confirm or
    overwrite it.
    """
    found: Counter[str] = Counter()
    targets: dict[str, str] = {}
    for request in requests:
        if request.full_prompt in targets:
            same = targets[request.full_prompt] == request.target
            found[
                "requests that edit the prompt of an earlier one again, to "
                f"{'the same' if same else 'another'} target"
            ] += 1
        targets[request.full_prompt] = request.target
    return found


def arrange(
    requests: Sequence[EditRequest], *, order: Order, seed: int, limit: int | None
) -> tuple[EditRequest, ...]:
    """The requests in file order or shuffled by the seed, then the first `limit` of them. Groups
    stay together, and whole.
    """
    if limit is not None and limit < 1:
        raise ConfigError(
            f"dataset.limit: {limit} - a whole number of at least 1, or null for all records"
        )
    # A request without a group is a unit of its own.
    units = [
        tuple(unit)
        for _, unit in itertools.groupby(
            requests, key=lambda each: (each.group, each.id if each.group is None else None)
        )
    ]
    if order == "shuffled":
        random.Random(f"order/{seed}").shuffle(units)
    if limit is None:
        return tuple(itertools.chain.from_iterable(units))
    sizes = itertools.accumulate(len(unit) for unit in units)
    arranged = tuple(
        itertools.chain.from_iterable(
            unit for unit, size in zip(units, sizes, strict=True) if size <= limit
        )
    )
    if not arranged:
        raise ConfigError(
            f"dataset.limit: {limit} - the first group holds {len(units[0])} requests, and is not "
            "cut"
        )
    return arranged
