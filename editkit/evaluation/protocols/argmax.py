"""The protocol `argmax`: every token of the answer is the greedy choice under teacher forcing.

Efficacy, generalization, portability, hop and attribute: the answer is the right one. Locality: the
greedy tokens at the answer are all those of the unedited model, frozen at step 0, right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from editkit.evaluation.protocols.teacher_forced import AbstractTeacherForced


class Argmax(AbstractTeacherForced):
    """All tokens must agree."""

    name: ClassVar[str] = "argmax"

    def grade(self, greedy: Sequence[int], expected: Sequence[int]) -> float:
        return float(tuple(greedy) == tuple(expected))
