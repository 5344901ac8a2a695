"""From a plain mapping to a dataclass instance. Names are checked against the fields, values
against their annotations; problems are collected.

The fields of the configurable classes are the schema. Values are checked as pydantic checks strict
JSON: an int is accepted for a float and a list for a tuple, but a string is not a number and true
is not an int. Numbers are finite unless the annotation of a field allows more:
`Annotated[float, pydantic.AllowInfNan(True)]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from editkit.config.identity import TARGET, current_path
from editkit.errors import ConfigError, OptionError, message

T = TypeVar("T")
MISSING = "???"  # OmegaConf's mark of a mandatory value
LARGEST = 2**63 - 1  # integer of an option: torch takes no larger seed
LONGEST = 4095  # bytes of a text of an option: the system takes no longer path
# pydantic's words for JSON, in yaml's.
WORDS = {"an object": "names and values", "a valid array": "a list"}


@dataclass(frozen=True)
class Problems:
    """Problems of a configuration: messages, and the keys of mandatory values that are unset."""

    messages: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        if problem not in self.messages:
            self.messages.append(problem)

    def add_all(self, problems: Iterable[str]) -> None:
        for problem in problems:
            self.add(problem)

    def __len__(self) -> int:
        return len(self.messages) + len(self.unset)


def construct(node: Any, key: str, expected: type[T], problems: Problems) -> T | None:
    """The object that a node describes. None after adding to `problems`.

    The class is the node's `_target_`, which must be a subclass of `expected`. A node without
    `_target_` describes `expected` itself.

    Args:
        key: the path of the node in the configuration, as in an override. "" is the root.
    """
    if not isinstance(node, Mapping):
        problems.add(message(key, "not a mapping", got=node, expected="names and values"))
        return None
    options = {name: value for name, value in node.items() if name != TARGET}
    target = resolve(node[TARGET], key, expected, problems) if TARGET in node else expected
    if target is None:
        return None
    if inspect.isabstract(target) or not dataclasses.is_dataclass(target):
        problem = f"{target.__name__} is abstract or not a dataclass" if TARGET in node else "unset"
        wanted = f"the path of a dataclass that is a subclass of {expected.__name__}"
        problems.add(message(f"{key}.{TARGET}", problem, expected=wanted))
        return None
    return _fill(target, options, key, problems)


def resolve(path: Any, key: str, expected: type[T], problems: Problems) -> type[T] | None:
    """The class at a dotted path, imported. None after adding to `problems`."""
    module, _, attribute = current_path(str(path)).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        problems.add(
            message(
                f"{key}.{TARGET}",
                f"cannot import {path} ({error})",
                expected="a class of an installed module or of a module in the current folder",
            )
        )
        return None
    if not (isinstance(target, type) and issubclass(target, expected)):
        problems.add(
            message(
                f"{key}.{TARGET}",
                "wrong kind of class",
                got=str(path),
                expected=f"a subclass of {expected.__name__}",
            )
        )
        return None
    return target


def unknown_option(key: str, owner: str, options: Iterable[str]) -> str:
    """The message for an option that does not exist.

    Args:
        key: the full key, as the user wrote it.
        owner: what the options belong to.
        options: the names that exist.
    """
    parent, _, name = key.rpartition(".")
    names = sorted(options)
    close = difflib.get_close_matches(name, names, n=1)
    suggestion = f"did you mean {f'{parent}.' if parent else ''}{close[0]}?" if close else None
    expected = f"one of {', '.join(names)}" if names else "no options"
    return message(key, f"unknown option of {owner}", expected=expected, fix=suggestion)


def _fill(target: type[T], options: Mapping[str, Any], key: str, problems: Problems) -> T | None:
    """Checks every option, also after a wrong one, and creates the object if all are valid."""
    before = len(problems)
    prefix = f"{key}." if key else ""
    fields = {item.name: item for item in dataclasses.fields(target) if item.init}  # type: ignore[arg-type]
    for name in options.keys() - fields.keys():
        problems.add(unknown_option(f"{prefix}{name}", target.__name__, fields))
    annotations = typing.get_type_hints(target, include_extras=True)
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name in options:
            values[name] = _value(options[name], annotations[name], f"{prefix}{name}", problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problem = f"missing option of {target.__name__}"
            problems.add(message(f"{prefix}{name}", problem, fix=f"set {prefix}{name}=<value>"))
    if len(problems) > before:
        return None
    try:
        return target(**values)
    except ValueError as error:
        problems.add_all(_problems_of(error, key))
    return None


def _problems_of(error: ValueError, key: str) -> tuple[str, ...]:
    """The problems that an object reported when it was created, with full keys."""
    if isinstance(error, OptionError):  # names its own options, and cannot know its key
        return error.under(key).problems if key else error.problems
    if isinstance(error, ConfigError):  # names full keys or files itself
        return error.problems
    return (f"{key}: {error}",)


def _value(value: Any, annotation: Any, key: str, problems: Problems) -> Any:
    if value == MISSING:
        problems.unset.append(key)
        return None
    if beyond := list(_beyond_limits(value, key)):
        problems.add_all(beyond)
        return None
    # With a `_target_`, the annotation may be an abstract class.
    names_class = isinstance(value, Mapping) and TARGET in value
    nested = next(
        (
            candidate
            for candidate in (annotation, *_alternatives(annotation))
            if dataclasses.is_dataclass(candidate)
            or (names_class and inspect.isabstract(candidate))
        ),
        None,
    )
    if isinstance(nested, type) and isinstance(value, Mapping):
        return construct(value, key, nested, problems)
    # pydantic refuses a configuration for a dataclass, whose fields are checked one by one.
    finite = None if dataclasses.is_dataclass(annotation) else ConfigDict(allow_inf_nan=False)
    try:
        return TypeAdapter(annotation, config=finite).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            indices = (str(part) for part in detail["loc"] if isinstance(part, int))
            problems.add_all(_invalid_value(".".join((key, *indices)), detail))
        return None


def _beyond_limits(value: Any, key: str) -> Iterator[str]:
    """The messages for values, also inside of lists, that nothing can take."""
    if isinstance(value, int) and abs(value) > LARGEST:
        yield message(key, "out of range", got=value, expected=f"at most {LARGEST} (64 bits)")
    elif isinstance(value, str):
        size = len(value.encode(errors="surrogatepass"))
        if size > LONGEST:
            expected = f"at most {LONGEST:,} bytes"
            yield message(key, "the text is too long", got=value, expected=expected)
        elif "\0" in value:
            yield message(key, "the text holds a NUL character", got=value)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _beyond_limits(item, f"{key}.{place}")


def _invalid_value(key: str, detail: Mapping[str, Any]) -> tuple[str, ...]:
    """The messages for one of pydantic's errors."""
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        return _problems_of(cause, key)
    text = str(detail["msg"])
    expected = text.removeprefix("Input should be ")
    if expected != text:
        expected = WORDS.get(expected, expected)
        return (message(key, "invalid value", got=detail["input"], expected=expected),)
    return (message(key, text[:1].lower() + text[1:], got=detail["input"]),)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union. `X | None` is the annotation of an optional option."""
    return (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else ()
    )
