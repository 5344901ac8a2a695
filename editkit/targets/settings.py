"""The numbers of a search for target vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from editkit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSettings:
    """The numbers of the search; a recipe knows them."""

    # how often the loss is taken; Adam moves in between, so `steps - 1` times, as with the
    # published v_num_grad_steps
    steps: int
    lr: float
    lr_unit: Literal[
        "absolute", "relative"
    ]  # relative: times |v| / sqrt(O), so that one step of Adam moves delta by about lr * |v|
    weight_decay: float
    clamp: float  # |delta| <= clamp * |v|
    kl_factor: float
    kl_position: Literal["subject_last", "prompt_end"]
    stop_loss: float  # the search ends below it
    # true: the whole network in every step; false: what lies before delta is computed once, the
    # same to rounding
    exact: bool
    # requests are searched together up to so many (contexts and padding count); memory, no result
    # but rounding
    tokens_at_once: int = 8192

    def __post_init__(self) -> None:
        positive = [
            name
            for name in ("steps", "lr", "clamp", "tokens_at_once")
            if not getattr(self, name) > 0
        ]
        negative = [name for name in ("weight_decay", "kl_factor") if not getattr(self, name) >= 0]
        problems = [
            f"editor.target.{name} must be positive - got {getattr(self, name)}."
            for name in positive
        ]
        problems += [
            f"editor.target.{name} must not be negative - got {getattr(self, name)}."
            for name in negative
        ]
        if problems:
            raise ConfigError(problems)
