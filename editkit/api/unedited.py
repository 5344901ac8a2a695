"""The model of a session without its edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.linalg.total import Total

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@contextlib.contextmanager
def unedited(model: EditableModel) -> Iterator[None]:
    """Inside, all weights are W_0 and nothing stands beside them; afterwards the edits are back."""
    totals, sides = model.totals(), model.sides
    if not sides and all(total.is_zero for total in totals.values()):
        yield
        return
    model.restore({name: Total(total.shape) for name, total in totals.items()})
    model.attach()
    try:
        yield
    finally:
        model.restore(totals)
        model.attach(*sides)


def require_none_beside(model: EditableModel) -> None:
    """Raises ConfigError if something stands beside the weights: it would change what an editor of
    weights reads.
    """
    if model.sides:
        problem = "another editor has put something beside the weights"
        got = ", ".join(side.place for side in model.sides)
        fix = "edit the weights first, or take it away with model.undo() or model.reset()"
        raise ConfigError(message("editor", problem, got=got, expected="a plain model", fix=fix))
