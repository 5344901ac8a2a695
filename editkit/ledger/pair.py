"""Two ledgers of one base model: their differences, and the sum of their edits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.config.schema import Problems
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.ledger.card import ledger_card
from editkit.ledger.measure import Measured, measured
from editkit.ledger.replay import base_of, restrained_as, totals_of
from editkit.ledger.revert import about_of
from editkit.linalg.total import Total
from editkit.records.ledger import Ledger, read_ledger
from editkit.runner.export import Form, option_problems, write_edited
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.runner.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two ledgers differ."""

    only: Mapping[str, tuple[EditRequest, ...]]  # by "A" and "B"
    same: int  # requests of blocks with the same requests and factors
    changed: tuple[EditRequest, ...]  # in both, with other factors
    conflicts: tuple[Conflict, ...]
    # By matrix: the norms of both totals and of their difference, and the cosine of their angle.
    totals: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Edits of both ledgers of one fact, which a sum holds twice."""

    kind: str  # "prompt": the same full prompt; "fact": the same subject and relation
    a: EditRequest
    b: EditRequest

    @property
    def agrees(self) -> bool:
        """Whether both write the same target."""
        return self.a.target == self.b.target

    def __str__(self) -> str:
        what = "same target, written twice" if self.agrees else "different targets"
        return (
            f"{self.a.full_prompt!r}: A {self.a.id} -> {self.a.target!r}, B {self.b.id} -> "
            f"{self.b.target!r} ({what})"
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A model with the edits of two ledgers."""

    model: EditableModel
    conflicts: tuple[Conflict, ...]
    variants: Mapping[str, Measured]  # "A", "B" and "merged"
    errors: Mapping[str, float]


def pair_of(a: Path, b: Path) -> tuple[Ledger, Ledger]:
    """Both ledgers. Raises ConfigError if one cannot be read, or their base models differ."""
    ledgers: list[Ledger] = []
    problems: list[str] = []
    for folder in (a, b):
        try:
            ledgers.append(read_ledger(folder))
        except ConfigError as error:
            problems += error.problems
    if not problems and ledgers[0].head["fingerprint"] != ledgers[1].head["fingerprint"]:
        ids = [(ledger.head.get("model") or {}).get("id") for ledger in ledgers]
        problem = f"{a} and {b} edited different base models"
        expected = "the same architecture, tokenizer and weights"
        problems.append(message("A B", problem, got=ids, expected=expected))
    if problems:
        raise ConfigError(problems)
    return ledgers[0], ledgers[1]


def conflicts_of(a: Sequence[EditRequest], b: Sequence[EditRequest]) -> tuple[Conflict, ...]:
    """Pairs of edits with the same full prompt, or the same subject and relation (the prompt around
    the subject, whatever its case and blanks).
    """
    found = []
    prompts, facts = defaultdict(list), defaultdict(list)
    for request in b:
        prompts[request.full_prompt].append(request)
        facts[_fact(request)].append(request)
    for request in a:
        same_prompt = prompts.get(request.full_prompt, [])
        found += [Conflict(kind="prompt", a=request, b=other) for other in same_prompt]
        found += [
            Conflict(kind="fact", a=request, b=other)
            for other in facts.get(_fact(request), [])
            if other not in same_prompt
        ]
    return tuple(found)


def _fact(request: EditRequest) -> tuple[str, str]:
    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    return plain(request.subject), plain(request.prompt)


def diff(a: Path, b: Path, *, device: str | None = None) -> Difference:
    """What two ledgers of one base model have in common, and how far their totals are apart.

    Raises:
        ConfigError: a ledger cannot be read, or their base models differ.
    """
    first, second = pair_of(a, b)
    contents = [{block.content: block for block in ledger.blocks} for ledger in (first, second)]
    keys = [{_edit(request) for request in ledger.requests} for ledger in (first, second)]
    same = [
        request
        for content, block in contents[0].items()
        if content in contents[1]
        for request in block.requests
    ]
    kept = {_edit(request) for request in same}
    changed = [r for r in first.requests if _edit(r) in keys[1] and _edit(r) not in kept]
    totals = _totals(base_of(first, device=device), first, second)
    figures = {}
    for name in totals[0]:
        ours, theirs = (each[name].dense().double() for each in totals)
        norms = [float(torch.linalg.vector_norm(each)) for each in (ours, theirs, ours - theirs)]
        product = norms[0] * norms[1]
        cosine = float((ours * theirs).sum()) / product if product else math.nan
        figures[name] = dict(zip(("a", "b", "difference"), norms, strict=True)) | {"cosine": cosine}
    return Difference(
        only={
            "A": tuple(r for r in first.requests if _edit(r) not in keys[1]),
            "B": tuple(r for r in second.requests if _edit(r) not in keys[0]),
        },
        same=len(same),
        changed=tuple(changed),
        conflicts=tuple(
            each for each in conflicts_of(first.requests, second.requests) if not each.agrees
        ),
        totals=figures,
    )


def _edit(request: EditRequest) -> tuple[str, str, str]:
    return request.prompt, request.subject, request.target


def _totals(
    model: EditableModel, first: Ledger, second: Ledger
) -> tuple[dict[str, Total], dict[str, Total]]:
    """The totals of both, of the matrices of either."""
    model.edit(tuple(second.head["modules"]))
    problems = Problems()
    both = [(ledger.blocks, restrained_as(ledger, None, problems)) for ledger in (first, second)]
    if problems.messages:
        raise ConfigError(problems.messages)
    a, b = (totals_of(blocks, model, restrained) for blocks, restrained in both)
    return a, b


def merge(
    a: Path,
    b: Path,
    *,
    to: Path | None = None,
    form: Form = "model",
    rank: int | None = None,
    device: str | None = None,
) -> Merged:
    """The model with the sum of both totals, measured on the edits of both and, with `to`, written
    like `export`. Neither run's edits were computed on the other's; conflicts are reported.

    Raises:
        ConfigError: a ledger cannot be read, their base models differ, or the options cannot be
            used.
    """
    problems = Problems() if to is None else option_problems(to, form=form, rank=rank)
    if to is None and (form != "model" or rank is not None):
        problems.add(message("--to", "nothing is written without it", fix="name a folder"))
    try:
        first, second = pair_of(a, b)
    except ConfigError as error:
        problems.add_all(error.problems)
    if problems.messages:
        raise ConfigError(problems.messages)
    model = base_of(first, device=device)
    ours, theirs = _totals(model, first, second)
    merged = {name: _sum(ours[name], theirs[name]) for name in ours}
    found = conflicts_of(first.requests, second.requests)
    groups = {"A": first.requests, "B": second.requests}
    variants = measured(model, groups, {"A": ours, "B": theirs, "merged": merged})
    errors: Mapping[str, float] = {}
    if to is not None:
        about = about_of(first, None) | {"step": len(first.blocks) + len(second.blocks)}
        about["run"] = f"{a.name} + {b.name}"
        about["ledger"] = _fields(first, second, found, variants)

        def card(adapter: Adapter | None) -> str:
            facts = {"edits": f"{len(first.requests)} + {len(second.requests)}"}
            facts |= {"runs": about["run"], "conflicts": str(len(found))}
            limits = (
                "Neither run's edits were computed on a model with the other's.",
                *(f"conflict: {conflict}" for conflict in found),
            )
            return ledger_card(
                first, adapter, form=form, facts=facts, variants=variants, limits=limits
            )

        errors = write_edited(model, to, about=about, card=card, form=form, rank=rank)
    return Merged(model=model, conflicts=found, variants=variants, errors=errors)


def _sum(ours: Total, theirs: Total) -> Total:
    if theirs.is_dense:
        return ours.plus(theirs.dense())
    for block in theirs.blocks:
        ours = ours.plus(block)
    return ours


def _fields(
    first: Ledger,
    second: Ledger,
    conflicts: Sequence[Conflict],
    variants: Mapping[str, Measured],
) -> dict[str, Any]:
    return {
        "merged": [
            {
                "run": ledger.folder.name,
                "blocks": len(ledger.blocks),
                "digest": ledger.blocks[-1].digest if ledger.blocks else None,
                "editor": ledger.head.get("editor"),
                "restraint": ledger.head.get("restraint"),
            }
            for ledger in (first, second)
        ],
        "conflicts": [str(conflict) for conflict in conflicts],
        "measured": {name: each.fields() for name, each in variants.items()},
    }
