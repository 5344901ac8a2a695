"""How a hypernetwork is trained, as values."""

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
    """How a hypernetwork is trained: `editor.train` in the configuration.

    Raises:
        OptionError: an option is out of range.
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
