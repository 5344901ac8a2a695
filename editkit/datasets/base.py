"""The dataset's interface: options in, checked edit requests out. Nothing here needs torch or a model."""

from __future__ import annotations

import abc
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from editkit.datasets.records import Fields, Records
from editkit.errors import ConfigError
from editkit.types import EditRequest

Order = Literal["file", "shuffled"]
OnBadRecord = Literal["error", "skip"]
MAX_SHOWN = 20  # problems that one error message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDataset:
    """The requests in the order in which they are to be edited, and what the provenance says of them."""

    name: str
    requests: tuple[EditRequest, ...]
    digest: str  # sha256 of what was read
    origin: str  # the file, or where else the records came from
    skipped: Mapping[str, int] = field(default_factory=dict)  # reason -> number of records; each record counts once, by its first problem


class AbstractDataset(abc.ABC):
    """A source of edit requests. Concrete datasets are frozen dataclasses: their fields are the options."""

    name: str

    @abc.abstractmethod
    def load(self, seed: int) -> LoadedDataset:
        """All requests; `seed` decides their order where the options ask for a shuffled one.

        Raises:
            ConfigError: what is missing or malformed, all of it at once.
        """


def parse_records(
    records: Records, parse: Callable[[Fields, int], EditRequest], *, on_bad_record: OnBadRecord
) -> tuple[list[EditRequest], dict[str, int]]:
    """Every good record as a request, in the file's order, and the skipped ones counted by reason.

    Args:
        parse: makes a request from a record and its index; what is wrong it leaves in the record's `problems`.
    """
    requests: list[EditRequest] = []
    problems: list[str] = []
    skipped: dict[str, int] = {}
    first_with: dict[str, int] = {}
    for index, record in enumerate(records.records):
        fields = Fields(record)
        request = parse(fields, index)
        if not fields.problems and request.id in first_with:
            fields.note("id", f"{request.id} is the id of record {first_with[request.id]} too")
        if fields.problems:
            problems += [f"{records.origin}, record {index}: {name}: {reason}" for name, reason in fields.problems]
            name, reason = fields.problems[0]
            reason = "is not unique" if name == "id" else reason
            skipped[f"{name}: {reason}"] = skipped.get(f"{name}: {reason}", 0) + 1
        else:
            first_with[request.id] = index
            requests.append(request)
    if problems and (on_bad_record == "error" or not requests):
        hidden = len(problems) - MAX_SHOWN
        shown = [*problems[:MAX_SHOWN], *([f"{records.origin}: {hidden} more problems"] if hidden > 0 else [])]
        if requests:
            shown[-1] += f" - dataset.on_bad_record=skip leaves such records out and keeps {len(requests)} (records are counted from 0)"
        raise ConfigError(shown)
    if not requests:
        raise ConfigError(f"{records.origin}: holds no records - at least one is needed")
    return requests, skipped


def arrange(requests: list[EditRequest], *, order: Order, seed: int, limit: int | None) -> tuple[EditRequest, ...]:
    """The requests in file order or shuffled by the seed, then the first `limit` of them."""
    if limit is not None and limit < 1:
        raise ConfigError(f"dataset.limit: {limit} - a whole number of at least 1, or null for all records")
    arranged = list(requests)
    if order == "shuffled":
        random.Random(f"order/{seed}").shuffle(arranged)
    return tuple(arranged[:limit])
