"""Taking blocks of a ledger back: the model without their updates, what later edits owe to them,
and its measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.config.schema import Problems
from editkit.errors import ConfigError, message
from editkit.ledger.card import ledger_card
from editkit.ledger.measure import Measured, measured
from editkit.ledger.replay import (
    base_of,
    require_that_of_the_checkpoint,
    restrained_as,
    totals_of,
)
from editkit.records.ledger import Block, Ledger, read_ledger
from editkit.runner.export import Form, option_problems, write_edited

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.runner.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Reverted:
    """A model without some blocks."""

    model: EditableModel
    blocks: tuple[Block, ...]  # that were taken back
    # later blocks that are kept, with the matrices that they share with a reverted one
    later: Mapping[int, tuple[str, ...]]
    saw: str  # what of the reverted edits the later ones were made on
    before: Measured
    after: Measured
    errors: Mapping[str, float]  # of the written factors; empty for a model

    def fields(self) -> dict[str, Any]:
        """The entry of editkit.json."""
        return {
            "reverted": [block.id for block in self.blocks],
            "requests": [request.id for block in self.blocks for request in block.requests],
            "later": {str(number): list(modules) for number, modules in self.later.items()},
            "saw": self.saw,
            "before": self.before.fields(),
            "after": self.after.fields(),
        }


def blocks_of(ledger: Ledger, ids: Sequence[str]) -> tuple[Block, ...]:
    """The blocks that are named by their ids, or by that of the only request of a block.

    Raises:
        ConfigError: an id is unknown, or that of a request that shares its block with others.
    """
    by_id = {str(block.id): block for block in ledger.blocks}
    of_request: dict[str, list[Block]] = {}
    for block in ledger.blocks:
        for request in block.requests:
            of_request.setdefault(request.id, []).append(block)
    chosen: dict[int, Block] = {}
    problems = []
    for wanted in ids:
        found = [by_id[wanted]] if wanted in by_id else of_request.get(wanted, [])
        if not found:
            problems.append(_unknown(ledger, wanted, list(by_id)))
        elif len(found) > 1:
            numbers = ", ".join(str(block.id) for block in found)
            problem, fix = "several blocks hold this request", f"name one of {numbers}"
            problems.append(message("ID", problem, got=wanted, fix=fix))
        elif wanted not in by_id and len(found[0].requests) > 1:
            (block,) = found
            problem = (
                f"the request shares block {block.id} with {len(block.requests) - 1} others: one "
                "least-squares problem was solved for all of them, so that its own part is not "
                "what an edit of it alone would have been"
            )
            fix = f"revert the block ({block.id}), or edit anew with batch_size=1 or without it"
            problems.append(message("ID", problem, got=wanted, fix=fix))
        else:
            chosen[found[0].id] = found[0]
    if problems:
        raise ConfigError(problems)
    return tuple(sorted(chosen.values(), key=lambda block: ledger.blocks.index(block)))


def blocks_with(ledger: Ledger, wanted: str) -> tuple[Block, ...]:
    """The block with this id, or all that hold the request with it. Raises ConfigError if it is
    unknown.
    """
    found = [block for block in ledger.blocks if str(block.id) == wanted] or [
        block for block in ledger.blocks if any(each.id == wanted for each in block.requests)
    ]
    if not found:
        raise ConfigError(_unknown(ledger, wanted, [str(block.id) for block in ledger.blocks]))
    return tuple(found)


def _unknown(ledger: Ledger, wanted: str, ids: Sequence[str]) -> str:
    if not ids:
        return message("ID", f"the ledger of {ledger.folder} holds no edit", got=wanted)
    span = ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
    problem = "was taken back by its session" if wanted in map(str, ledger.undone) else "unknown id"
    expected = f"a block, {span}, or the id of a request"
    return message("ID", problem, got=wanted, expected=expected)


def revert(
    folder: Path,
    ids: Sequence[str],
    *,
    to: Path | None = None,
    form: Form = "model",
    view: str | None = None,
    rank: int | None = None,
    device: str | None = None,
) -> Reverted:
    """The model of a ledger without some blocks, measured and, with `to`, written like `export`.

    The updates of later edits stay as they are, though they were computed on a model with the
    reverted ones: the result is the sum without the blocks, and not what editing without them
    would have given. The ledger itself does not change.

    Raises:
        ConfigError: there is no ledger, an id is unknown or shares its block, the base model is
            missing or another one, or the options cannot be used.
    """
    ledger = read_ledger(folder)
    problems = Problems() if to is None else option_problems(to, form=form, rank=rank)
    if to is None and (form != "model" or rank is not None):
        problems.add(message("--to", "nothing is written without it", fix="name a folder"))
    restrained = restrained_as(ledger, view, problems)
    chosen: tuple[Block, ...] = ()
    try:
        chosen = blocks_of(ledger, ids)
    except ConfigError as error:
        problems.add_all(error.problems)
    if problems.messages:
        raise ConfigError(problems.messages)
    model = base_of(ledger, device=device)
    before = totals_of(ledger.blocks, model, restrained)
    if view is None:
        require_that_of_the_checkpoint(ledger, before)
    reverted = frozenset(block.id for block in chosen)
    after = totals_of(ledger.blocks, model, restrained, reverted=reverted)
    groups = {
        "kept": [r for each in ledger.blocks if each.id not in reverted for r in each.requests],
        "reverted": [request for block in chosen for request in block.requests],
    }
    found = measured(model, groups, {"before": before, "after": after})
    made = Reverted(
        model=model,
        blocks=chosen,
        later=later_than(ledger, chosen),
        saw=what_they_saw(ledger),
        before=found["before"],
        after=found["after"],
        errors={},
    )
    if to is None:
        return made
    about = about_of(ledger, view) | {"ledger": made.fields()}

    def card(adapter: Adapter | None) -> str:
        facts = {
            "edits": f"{len(groups['kept'])} in {len(ledger.blocks) - len(chosen)} blocks",
            "reverted": ", ".join(f"block {block.id}" for block in chosen),
            "view": view or "as the run left it",
            "run": ledger.folder.name,
        }
        limits = (
            "It is the sum of the kept edits, and not what editing without the reverted ones would"
            f" have given: of the {len(made.later)} blocks after them, {made.saw}.",
        )
        variants = {"all edits": made.before, "reverted": made.after}
        return ledger_card(
            ledger, adapter, form=form, facts=facts, variants=variants, limits=limits
        )

    errors = write_edited(model, to, about=about, card=card, form=form, rank=rank)
    return replace(made, errors=errors)


def later_than(ledger: Ledger, reverted: Sequence[Block]) -> dict[int, tuple[str, ...]]:
    """The kept blocks after the first reverted one, with the matrices at which a reverted block
    before them wrote, too.
    """
    gone, seen = {block.id for block in reverted}, set[str]()
    later: dict[int, tuple[str, ...]] = {}
    is_after = False
    for block in ledger.blocks:
        if block.id in gone:
            is_after = True
            seen |= set(block.updates)
        elif is_after:
            later[block.id] = tuple(module for module in block.updates if module in seen)
    return later


def what_they_saw(ledger: Ledger) -> str:
    """What of earlier edits the later ones were computed on, by the restraints of the head."""
    nodes = ledger.head.get("restraint") or {}
    unedited = [name for name, node in nodes.items() if dict(node).get("base") == "unedited"]
    if unedited:
        return (
            f"with restraint {unedited[0]} their targets were searched on the unedited model, and "
            "their solves took what the reverted edits had written into account"
        )
    return "their targets, keys and solves were computed on a model with the reverted edits"


def about_of(ledger: Ledger, view: str | None) -> dict[str, Any]:
    """The content of editkit.json of a model that a ledger gives."""
    head = ledger.head
    config = {key: head.get(key) for key in ("model", "editor", "restraint", "dataset")}
    return {
        "run": ledger.folder.name,
        "step": ledger.blocks[-1].id if ledger.blocks else 0,
        "view": view,
        "config": config,
        "provenance": {"model": {"fingerprint": head["fingerprint"]}},
    }
