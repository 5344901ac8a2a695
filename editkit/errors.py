"""The errors that are the user's to fix."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

_ABSENT = object()
LONGEST = 1000  # characters of a value in a message


def message(
    key: str,
    problem: str,
    *,
    got: object = _ABSENT,
    expected: str | None = None,
    fix: str | None = None,
) -> str:
    """One problem in the one grammar of all messages: `key: problem (got X; expected Y). Fix: Z.`

    Args:
        key: the config key, command-line option, file or record that the problem is in.
        problem: what is wrong, without a full stop.
        got: what was given, as Python shows it; left out where nothing was.
        expected: what is allowed.
        fix: what to do, as an imperative without a full stop, or a question.
    """
    details = [] if got is _ABSENT else [f"got {_shown(got)}"]
    details += [f"expected {expected}"] if expected else []
    told = f" ({'; '.join(details)})" if details else ""
    sentence = f"{key}: {problem}{told}."
    if not fix:
        return sentence
    return f"{sentence} Fix: {fix}" + ("" if fix.endswith("?") else ".")


def not_positive(options: object, *names: str) -> list[str]:
    """A problem for each of these options that is not positive and finite."""
    return [
        message(name, "must be positive", got=getattr(options, name))
        for name in names
        if not 0 < getattr(options, name) < math.inf
    ]


def negative(options: object, *names: str, expected: str | None = None) -> list[str]:
    """A problem for each of these options that is negative or not finite."""
    return [
        message(name, "must not be negative", got=getattr(options, name), expected=expected)
        for name in names
        if not 0 <= getattr(options, name) < math.inf
    ]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:80]}..., {len(text):,} characters"


class ConfigError(ValueError):
    """A choice that cannot work: a wrong value, a missing file, a malformed record.

    Holds every problem that was found, so that one run shows them all. Each says what is wrong
    (with its config key, file or record), what was given, and what is allowed.
    """

    exit_code: ClassVar[int] = 2  # of a command that ends with this error

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(
            f"  - {problem}" for problem in self.problems
        )


class OptionError(ConfigError):
    """Options that an object refuses.

    Each problem begins with the option's name. `under` adds the key of the object, which the object
    itself cannot know.
    """

    def under(self, key: str) -> ConfigError:
        """The same problems with full keys: `ratio: ...` becomes `restraint.cap2.ratio: ...`."""
        return ConfigError([f"{key}.{problem}" for problem in self.problems])


class OutOfSpace(ConfigError):
    """A disk, a quota or a limit of a file's size is exhausted. What was written before is intact;
    the same command resumes.
    """

    exit_code = 4


@contextlib.contextmanager
def keys_under(key: str) -> Iterator[None]:
    """Gives the problems of an OptionError that is raised within their full keys."""
    try:
        yield
    except OptionError as error:
        raise error.under(key) from error


def report(error: ConfigError, *, label: str = "") -> None:
    """Shows a mistake on stderr, without a traceback."""
    from rich.console import Console
    from rich.text import Text

    lines = [f"ConfigError{' in ' + label if label else ''}: "]
    lines += (
        [error.problems[0]]
        if len(error.problems) == 1
        else [f"{len(error.problems)} problems", *(f"\n  - {each}" for each in error.problems)]
    )
    Console(stderr=True, soft_wrap=True).print(
        Text(lines[0], style="bold red") + Text("".join(lines[1:]), style="default")
    )
