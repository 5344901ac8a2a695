"""Other sides beside the weights for a while, as an editor needs them that trains one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside


@contextlib.contextmanager
def standing(model: EditableModel, sides: Sequence[AbstractBeside]) -> Iterator[None]:
    """Inside, these sides stand beside the weights; afterwards, also after an error, those that
    stood there before.
    """
    before = model.sides
    model.attach(*sides)
    try:
        yield
    finally:
        model.attach(*before)
