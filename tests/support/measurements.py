"""Requests for the tests of editing metrics, and measurements by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from editkit.evaluation.base import Samples
from editkit.types import EditRequest, Measurement, Probe

REQUEST = EditRequest(
    id="test/0",
    prompt="{} is in",
    subject="Ada",
    target="New York",
    target_old="Paris",
    paraphrases=("Ada lives in",),
    neighbours=(Probe(prompt="Bob is in", answer="Rome"),),
    portability={
        "alias": (
            Probe(prompt="Countess Ada is in", answer="New York", aliases=("NYC", "the Big Apple")),
        )
    },
)


def request(name: str, *, neighbours: int = 2, **changes: object) -> EditRequest:
    plain = EditRequest(
        id=f"test/{name}",
        prompt=f"{name} {{}} is",
        subject="Ada",
        target="new",
        target_old="old",
        paraphrases=(f"{name} one", f"{name} two"),
        neighbours=tuple(
            Probe(prompt=f"{name} near {index}", answer="true") for index in range(neighbours)
        ),
        portability={
            "alias": (Probe(prompt=f"{name} alias", answer="new"),),
            "hop": (Probe(prompt=f"{name} hop", answer="far"),),
        },
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def whole(found: Sequence[Measurement | Samples]) -> dict[tuple[str | None, str], Measurement]:
    """The measurements over all requests and kinds, by protocol and metric."""
    chosen = [
        each
        for each in found
        if isinstance(each, Measurement)
        and each.subset is None
        and each.block is None
        and each.task is None
    ]
    assert len({(each.protocol, each.metric, each.timing) for each in chosen}) == len(chosen)
    assert {each.kind for each in chosen} <= {"editing"}
    return {(each.protocol, each.metric): each for each in chosen}
