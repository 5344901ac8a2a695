"""The protocol `token`: the share of the answer's tokens that are the greedy choice under teacher
forcing. It is the usual number of the literature.

EasyEdit's `rewrite_acc`, `rephrase_acc` and `portability` are of this protocol, and so is the
"accuracy" of most tables. Partly right answers count in part: without any edit the score is above
zero if old and new answer share a token. Locality: the share of greedy tokens that are those of the
unedited model, as in EasyEdit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from editkit.evaluation.protocols.teacher_forced import AbstractTeacherForced


class Token(AbstractTeacherForced):
    """Token by token."""

    name: ClassVar[str] = "token"

    def grade(self, greedy: Sequence[int], expected: Sequence[int]) -> float:
        matches = sum(one == other for one, other in zip(greedy, expected, strict=True))
        return matches / len(expected)
