"""Who says whether a free generation is right, beyond exact match and containment.

A judge is a class that `evaluation.generate.judge._target_` names, one's own or that of another
package. It gets all questions of a measurement at once, so that one that asks a large model can
batch or parallelise its calls; whether it uses a network is its own business.
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
    text: str  # the model's, without the prompt
    # what it would have said before the edit; known for an edit's own prompts only
    old_answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class AbstractJudge(abc.ABC):
    """Turns generations into verdicts."""

    @abc.abstractmethod
    def judge(self, generated: Sequence[Generated]) -> Sequence[float]:
        """A verdict in [0, 1] for each, in their order; nan where there is none, which counts as a
        failure and is counted apart.
        """


@dataclass(frozen=True, kw_only=True)
class StringJudge(AbstractJudge):
    """Right where an answer begins among the first words, as whole words after SQuAD's
    normalisation, and the old answer not before it.

    So "Paris, the capital of France" is right for "Paris", and "Rome, not Paris" is wrong if Rome
    was the old answer.
    """

    words: int = 12  # an answer that comes later is none

    def judge(self, generated: Sequence[Generated]) -> list[float]:
        return [float(self._is_right(each)) for each in generated]

    def _is_right(self, generated: Generated) -> bool:
        places = [
            place
            for answer in generated.answers
            if (place := place_of(generated.text, answer)) is not None
        ]
        old = (
            None if generated.old_answer is None else place_of(generated.text, generated.old_answer)
        )
        # An old answer at the very same place is a part of the new one, or the other way round.
        return bool(places) and min(places) < self.words and (old is None or min(places) <= old)
