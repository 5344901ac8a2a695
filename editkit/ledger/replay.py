"""The totals of a ledger's blocks, and the base model that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.config.schema import Problems, construct
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.total import Total
from editkit.model.load import ModelConfig
from editkit.records.ledger import Block, Ledger
from editkit.restraints.base import AbstractRestraint, AbstractTotalRestraint
from editkit.runner.checkpoint import LATEST, load_state
from editkit.runner.export import added_by
from editkit.runner.measure import corrections

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

TOLERANCE = 1e-5  # of a total that was summed on another device, relative


@dataclass(frozen=True, kw_only=True)
class Restrained:
    """The restraints on the total that act on a ledger's model, and the view that is asked for."""

    every: Mapping[str, AbstractTotalRestraint]
    added: tuple[AbstractTotalRestraint, ...] = ()  # by the view
    with_ends: bool = True  # whether restraints that act at the end do


def restrained_as(ledger: Ledger, view: str | None, problems: Problems) -> Restrained:
    """The restraints of a ledger's head. Adds to `problems` if the run has no such view."""
    nodes = ledger.head.get("restraint") or {}
    made = {
        name: construct(node, f"restraint.{name}", AbstractRestraint, problems)
        for name, node in nodes.items()
    }
    every = {name: each for name, each in made.items() if isinstance(each, AbstractTotalRestraint)}
    added = () if view is None else added_by(nodes, view, problems)
    return Restrained(every=every, added=added, with_ends=view is None)


def base_of(ledger: Ledger, *, device: str | None = None) -> EditableModel:
    """The base model of a ledger, unedited, with the ledger's matrices declared.

    Raises:
        ConfigError: it is missing, or it is not the model that was edited.
    """
    problems = Problems()
    config = construct(ledger.head.get("model"), "model", ModelConfig, problems)
    if config is None or problems.messages:
        raise ConfigError([f"{ledger.folder}: {problem}" for problem in problems.messages])
    model = config.load(device or "cpu")
    if model.fingerprint != ledger.head["fingerprint"]:
        problem = f"this is not the model that was edited in {ledger.folder}"
        raise ConfigError(message("model.id", problem, got=config.id))
    model.edit(tuple(ledger.head["modules"]))
    return model


def totals_of(
    blocks: Iterable[Block],
    model: EditableModel,
    restrained: Restrained,
    *,
    reverted: frozenset[int] = frozenset(),
) -> dict[str, Total]:
    """The totals of all blocks but the reverted ones, by matrix.

    The updates are added in their order, so that without a reverted block the sums have the bits of
    the run on the same device. A restraint that acted on the model in between acts again on the
    totals as they are now.
    """
    totals = {name: Total(_shape(model, name)) for name in model.edited_modules}
    sigma_max = (
        {
            name: extreme_singular_values(model.base(name), None).sigma_max
            for name in model.edited_modules
        }
        if restrained.every
        else {}
    )

    def restrain(restraint: AbstractTotalRestraint) -> None:
        for module, correction in corrections(restraint, totals, sigma_max).items():
            totals[module] = totals[module].plus(correction)

    for block in blocks:
        if block.id not in reverted:
            for module, update in block.load().items():
                totals[module] = totals[module].plus(update)
        for name in (*block.restrained, *(block.ends if restrained.with_ends else ())):
            restrain(restrained.every[name])
    for restraint in restrained.added:
        restrain(restraint)
    return totals


def _shape(model: EditableModel, module: str) -> tuple[int, int]:
    rows, columns = model.base(module).shape
    return rows, columns


def require_that_of_the_checkpoint(ledger: Ledger, totals: Mapping[str, Total]) -> None:
    """Compares the sum of all blocks with the checkpoint of the same step, if there is one.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    folder = ledger.folder / "state"
    if not (folder / LATEST).exists() or not ledger.blocks:
        return
    state = load_state(folder)
    if state.step != ledger.blocks[-1].id:
        return  # blocks after the checkpoint are in the ledger alone
    for module, total in totals.items():
        ours, theirs = total.dense(), state.totals[module].dense()
        size = float(torch.linalg.vector_norm(theirs))
        if float(torch.linalg.vector_norm(ours - theirs)) > TOLERANCE * max(size, 1e-30):
            problem = f"the sum of its updates of {module} is not the checkpoint's total"
            raise ConfigError(message(str(ledger.folder), problem))
