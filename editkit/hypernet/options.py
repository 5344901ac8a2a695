"""How a hypernetwork is trained, as values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from editkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a hypernetwork is trained: `editor.train` in the configuration. Raises ConfigError for
    what is out of range.
    """

    steps: int  # of Adam, at most
    lr: float  # of the networks
    lr_step_sizes: float
    edit_weight: float  # c_edit
    locality_weight: float  # c_loc
    accumulate: int  # edits a step
    # of these, how many go through the model together: memory and time, and how soon running
    # statistics see them
    at_once: int
    clip: float  # of the gradient's norm
    validate_every: int  # steps
    patience: int  # steps without a better validation loss after which training ends
    validation: int  # edits that the validation loss is the mean of
    held_apart: int  # the dataset's first requests, left to runs
    locality_texts: int  # an edit
    # 1: every edit on the unedited model; else chains of so many edits, one on top of the other
    sequence: int

    def __post_init__(self) -> None:
        least = {
            name: 1
            for name in (
                "steps",
                "accumulate",
                "at_once",
                "validate_every",
                "patience",
                "validation",
                "locality_texts",
            )
        }
        least |= {"sequence": 1, "held_apart": 0}
        problems = [
            f"editor.train.{name}: {getattr(self, name)} was given; at least {limit}."
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        problems += [
            f"editor.train.{name} must be positive and finite - got {getattr(self, name)}."
            for name in ("lr", "lr_step_sizes", "edit_weight", "locality_weight", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        if self.sequence > self.validation:
            problems.append(
                f"editor.train.sequence: {self.sequence} was given; validation={self.validation} edits make no chain that long."
            )
        if problems:
            raise ConfigError(problems)
