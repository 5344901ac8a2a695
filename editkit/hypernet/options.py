"""The options for training a hypernetwork."""

from __future__ import annotations

import math
from dataclasses import dataclass

from editkit.errors import OptionError, message

AT_LEAST_ONE = (
    *("steps", "accumulate", "at_once", "validate_every", "patience", "validation"),
    *("locality_texts", "sequence"),
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options for training a hypernetwork: `editor.train` in the configuration.

    Raises:
        OptionError: an option is out of range.
    """

    steps: int  # largest number of Adam steps
    lr: float  # of the networks
    lr_step_sizes: float
    edit_weight: float  # c_edit
    locality_weight: float  # c_loc
    accumulate: int  # edits per step
    # edits of a step that pass through the model together; changes memory and time, and when
    # the running statistics include them
    at_once: int
    clip: float  # largest norm of the gradient
    validate_every: int  # steps between two validations
    patience: int  # steps without a better validation loss after which training ends
    validation: int  # number of validation edits
    held_apart: int  # number of the dataset's first requests, which are reserved for runs
    locality_texts: int  # locality texts per edit
    # 1: every edit starts from the unedited model; else the length of chains of sequential edits
    sequence: int

    def __post_init__(self) -> None:
        least = dict.fromkeys(AT_LEAST_ONE, 1) | {"held_apart": 0}
        problems = [
            message(name, "out of range", got=getattr(self, name), expected=f"at least {limit}")
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        problems += [
            message(name, "must be positive and finite", got=getattr(self, name))
            for name in ("lr", "lr_step_sizes", "edit_weight", "locality_weight", "clip")
            if not 0 < getattr(self, name) < math.inf
        ]
        if self.sequence > self.validation:
            expected = f"at most validation={self.validation}, from which chains are made"
            problems.append(message("sequence", "too long", got=self.sequence, expected=expected))
        if problems:
            raise OptionError(problems)
