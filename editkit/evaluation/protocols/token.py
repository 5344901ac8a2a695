"""The protocol `token`: the share of the answer's tokens that are the greedy choice,
teacher-forced. The literature's usual number.

EasyEdit's `rewrite_acc`, `rephrase_acc` and `portability` are this one, and so are most tables that
print an "accuracy". Partly right answers count in part: an edit that writes nothing scores above
zero wherever old and new answer share a token. Locality: the share of greedy tokens that are those
of the unedited model, as EasyEdit has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from editkit.evaluation.protocols.teacher_forced import AbstractTeacherForced


class Token(AbstractTeacherForced):
    """Token by token."""

    name: ClassVar[str] = "token"

    def grade(self, greedy: Sequence[int], expected: Sequence[int]) -> float:
        return sum(one == other for one, other in zip(greedy, expected, strict=True)) / len(
            expected
        )
