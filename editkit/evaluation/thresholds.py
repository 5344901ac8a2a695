"""When a model counts as collapsed: options of a report, kept with the run that it is about."""

from __future__ import annotations

from dataclasses import dataclass

from editkit.errors import OptionError, message


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """A model has collapsed at the first milestone beyond a threshold.

    Raises:
        OptionError: a threshold is not positive.
    """

    efficacy: float = 0.5  # of each protocol: a lower efficacy
    task: float = 0.5  # share of the unedited model's score: a lower score
    perplexity: float = 2.0  # times the unedited model's: a higher perplexity

    def __post_init__(self) -> None:
        given = {"efficacy": self.efficacy, "task": self.task, "perplexity": self.perplexity}
        problems = [
            message(name, "must be positive", got=value)
            for name, value in given.items()
            if not value > 0
        ]
        if problems:
            raise OptionError(problems)
