"""The points that `EditableModel.undo` returns to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editkit.linalg.total import Total
from editkit.model.side_value import AbstractBeside


@dataclass(frozen=True, eq=False)
class Mark:
    """The totals of the edited matrices and the sides beside the weights, before an edit. Two marks
    are equal only if they are the same object.

    A low-rank total is kept as its factors, which all marks share. A dense total is a float32
    matrix for each mark.
    """

    totals: Mapping[str, Total]
    sides: tuple[AbstractBeside, ...] = ()

    @classmethod
    def of(cls, totals: Mapping[str, Total], sides: tuple[AbstractBeside, ...] = ()) -> Mark:
        """The mark at these totals and sides."""
        return cls({name: _without_sum(total) for name, total in totals.items()}, sides)


def _without_sum(total: Total) -> Total:
    return Total(total.shape, blocks=total.blocks) if total.blocks else total
