"""The search space of `editkit tune`: what is searched, and the trials that are drawn from it.

Values are written in the syntax of Hydra's sweeps: `choice(a,b)`, `a,b`, `range(1,5)`,
`interval(0.1,1)`, `tag(log,interval(1e2,1e5))`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from editkit.errors import ConfigError, OptionError, message

LAYERS = "editor.layers"
EXPECTED = "values as Hydra sweeps them: choice(a,b), range(1,5), interval(0.1,1)"
DIGITS = 3  # significant digits of a number that is drawn from an interval
# Draws for each wanted trial, after which a space counts as exhausted.
ATTEMPTS = 100


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers that are tried, relative to the depth of the model.

    Raises:
        OptionError: a value is out of range.
    """

    at: tuple[float, ...]  # places of the last edited layer: 0 the first layer, 1 the last one
    window: tuple[int, ...] = (1,)  # numbers of consecutive edited layers

    def __post_init__(self) -> None:
        problems = []
        if not self.at or not all(0 <= place <= 1 for place in self.at):
            expected = "one or more numbers from 0 to 1"
            problems.append(message("at", "out of range", got=list(self.at), expected=expected))
        if not self.window or not all(size >= 1 for size in self.window):
            expected = "one or more numbers, each at least 1"
            got = list(self.window)
            problems.append(message("window", "out of range", got=got, expected=expected))
        if problems:
            raise OptionError(problems)

    def of(self, depth: int) -> tuple[tuple[int, ...], ...]:
        """The lists of layers for a model with so many layers, without repetitions."""
        lasts = sorted({round(place * (depth - 1)) for place in self.at})
        choices = (
            tuple(range(max(0, last - size + 1), last + 1))
            for last in lasts
            for size in self.window
        )
        return tuple(dict.fromkeys(choices))


@dataclass(frozen=True, kw_only=True)
class Search:
    """The options of `editkit tune`: a configuration of the group `tune`.

    Raises:
        OptionError: a value is out of range.
    """

    trials: int
    edits: int
    sequential: int
    seed: int
    batch_size: int = 1  # edits of a step of the sequence
    layers: Layers | None = None
    space: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        minima = {"trials": (self.trials, 1), "edits": (self.edits, 0)}
        minima |= {"sequential": (self.sequential, 0), "seed": (self.seed, 0)}
        minima |= {"batch_size": (self.batch_size, 1)}
        problems = [
            message(key, "out of range", got=value, expected=f"at least {minimum}")
            for key, (value, minimum) in minima.items()
            if value < minimum
        ]
        if not problems and not self.edits and not self.sequential:
            problems.append(
                message("edits", "nothing is edited", got=0, fix="set edits or sequential above 0")
            )
        if problems:
            raise OptionError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """The values that are tried for one key: `texts`, or numbers between `low` and `high`."""

    key: str
    texts: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False

    def draw(self, generator: random.Random) -> str:
        if self.texts:
            return generator.choice(self.texts)
        low, high = (math.log(end) if self.is_log else end for end in (self.low, self.high))
        number = generator.uniform(low, high)
        number = math.exp(number) if self.is_log else number
        return str(round(number)) if self.is_whole else repr(float(f"{number:.{DIGITS}g}"))


def dimension(key: str, value: Any) -> Dimension:
    """The dimension that a value of the space describes. A plain value is its only value.

    Raises:
        ConfigError: the value cannot be parsed, or it is empty.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import IntervalSweep
    from hydra.errors import HydraException

    from editkit.sweeps.merge import literal

    text = value if isinstance(value, str) else literal(value)
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if not override.is_sweep_override():
            return Dimension(key=key, texts=(text,))
        if override.is_discrete_sweep():
            texts = tuple(dict.fromkeys(override.sweep_string_iterator()))
            if not texts:
                raise ConfigError(message(key, "an empty range", got=text, expected=EXPECTED))
            return Dimension(key=key, texts=texts)
    except HydraException as error:
        problem = f"cannot be read ({str(error).splitlines()[0]})"
        raise ConfigError(message(key, problem, got=text, expected=EXPECTED)) from None
    sweep = override.value()
    assert isinstance(sweep, IntervalSweep)
    low, high, is_log = float(sweep.start or 0), float(sweep.end or 0), "log" in sweep.tags
    if low > high or (is_log and low <= 0):
        expected = "a start above 0 and an end above it" if is_log else "an end above the start"
        raise ConfigError(message(key, "an empty range", got=text, expected=expected))
    is_whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return Dimension(key=key, low=low, high=high, is_log=is_log, is_whole=is_whole)


def draw(dimensions: Sequence[Dimension], trials: int, seed: int) -> list[tuple[str, ...]]:
    """The overrides of each trial: the whole grid if it is not larger than `trials`, else so many
    distinct random points. With the same seed, more trials begin with the same points.
    """
    if not dimensions:
        return []
    if all(each.texts for each in dimensions):
        size = math.prod(len(each.texts) for each in dimensions)
        if size <= trials:
            grid = itertools.product(*(each.texts for each in dimensions))
            return [_overrides(dimensions, values) for values in grid]
    generator = random.Random(f"tune/{seed}")
    points: dict[tuple[str, ...], None] = {}
    for _ in range(trials * ATTEMPTS):
        if len(points) == trials:
            break
        points[_overrides(dimensions, [each.draw(generator) for each in dimensions])] = None
    return list(points)


def _overrides(dimensions: Sequence[Dimension], values: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{each.key}={value}" for each, value in zip(dimensions, values, strict=True))


def unknown_keys(space: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """The problems of keys that the configuration does not have."""
    from editkit.config.schema import unknown_option

    for key in space:
        node: Any = config
        for part, parent in _steps(key):
            if not isinstance(node, Mapping) or part not in node:
                names = [f"{parent}.{name}" if parent else name for name in node or ()]
                if not isinstance(node, Mapping):
                    names = []
                short = [name.rpartition(".")[2] for name in names]
                owner = parent or "the configuration"
                full = f"{parent}.{part}" if parent else part
                yield unknown_option(full, owner, short)
                break
            node = node[part]


def _steps(key: str) -> Iterator[tuple[str, str]]:
    """The parts of a key, each with the key of its parent."""
    parts = key.split(".")
    for index, part in enumerate(parts):
        yield part, ".".join(parts[:index])
