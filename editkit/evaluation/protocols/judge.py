"""Judges of free generations, beyond exact match and containment.

A judge is a class that `evaluation.generate.judge._target_` names: the user's own or that of
another package. It gets all generations of a measurement at once. A judge that calls a large model
can batch or parallelise its calls, and may use a network.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from editkit.evaluation.protocols.matching import place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One generation to be judged."""

    prompt: str
    answers: tuple[str, ...]  # any of them is right
    text: str  # the generation, without the prompt
    # the answer before the edit; known for an edit's own prompts only
    old_answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class AbstractJudge(abc.ABC):
    """Turns generations into verdicts."""

    @abc.abstractmethod
    def judge(self, generated: Sequence[Generated]) -> Sequence[float]:
        """A verdict in [0, 1] for each generation, in their order. nan is no verdict: it is a
        failure and is counted in `nonfinite`.
        """


@dataclass(frozen=True, kw_only=True)
class StringJudge(AbstractJudge):
    """Right if an answer begins among the first words, as whole words after SQuAD's normalisation,
    and the old answer does not come before it.

    "Paris, the capital of France" is right for "Paris". "Rome, not Paris" is wrong if Rome was the
    old answer.
    """

    words: int = 12  # an answer that begins later does not count

    def judge(self, generated: Sequence[Generated]) -> list[float]:
        return [float(self._is_right(generation)) for generation in generated]

    def _is_right(self, generated: Generated) -> bool:
        places = [
            place
            for answer in generated.answers
            if (place := place_of(generated.text, answer)) is not None
        ]
        old = (
            None if generated.old_answer is None else place_of(generated.text, generated.old_answer)
        )
        # An old answer at the same place is a part of the new one, or the reverse.
        return bool(places) and min(places) < self.words and (old is None or min(places) <= old)
