"""When a model counts as collapsed: options of a report, kept with the run that it is about."""

from __future__ import annotations

from dataclasses import dataclass

from editkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Each is crossed at the first milestone that is beyond it."""

    efficacy: float = 0.5  # of each protocol, absolute: below it
    task: float = 0.5  # of what the unedited model scored: below it
    perplexity: float = 2.0  # times that of the unedited model: above it

    def __post_init__(self) -> None:
        given = {"efficacy": self.efficacy, "task": self.task, "perplexity": self.perplexity}
        problems = [
            f"evaluation.thresholds.{name}: {value} was given; more than 0 is needed."
            for name, value in given.items()
            if not value > 0
        ]
        if problems:
            raise ConfigError(problems)
