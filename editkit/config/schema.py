"""From a plain mapping to a dataclass instance: names checked against the fields, values against
their annotations, problems collected.

The fields of the configurable classes are the schema. Values are checked as pydantic checks strict
JSON: an int may stand for a float and a list for a tuple, but a string is no number and true is no
int. Numbers are finite, unless a field's annotation says otherwise: `Annotated[float,
pydantic.AllowInfNan(True)]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from editkit.config.identity import TARGET, current_path
from editkit.errors import ConfigError, OptionError

T = TypeVar("T")
MISSING = "???"  # OmegaConf's mark for a value that somebody must set


@dataclass(frozen=True)
class Problems:
    """What was found so far: sentences, and the keys of values that are not set."""

    found: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        if problem not in self.found:
            self.found.append(problem)

    def __len__(self) -> int:
        return len(self.found) + len(self.unset)


def construct(node: Any, key: str, expected: type[T], problems: Problems) -> T | None:
    """The object that a node describes, or None after noting why not.

    The class is the node's `_target_`, which must be an `expected`; without one it is `expected`
    itself. `key` is the node's place in the configuration, as a person would override it ("" for
    the root).
    """
    if not isinstance(node, Mapping):
        problems.add(f"{key}: {node!r} was given, but names and values are expected.")
        return None
    options = {name: value for name, value in node.items() if name != TARGET}
    target = resolve(node[TARGET], key, expected, problems) if TARGET in node else expected
    if target is None:
        return None
    if inspect.isabstract(target) or not dataclasses.is_dataclass(target):
        given = (
            f"{target.__name__} is abstract or no dataclass"
            if TARGET in node
            else f"{key}.{TARGET} is not set"
        )
        problems.add(
            f"{key}: {given}. {TARGET} must name a dataclass that is an {expected.__name__}."
        )
        return None
    return _fill(target, options, key, problems)


def resolve(name: Any, key: str, expected: type[T], problems: Problems) -> type[T] | None:
    """The class of that dotted name, imported; None after noting why not."""
    module, _, attribute = current_path(str(name)).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        problems.add(
            f"{key}.{TARGET}: {name} cannot be imported ({error}). Modules are looked for among the installed ones and in this folder."
        )
        return None
    if not (isinstance(target, type) and issubclass(target, expected)):
        problems.add(f"{key}.{TARGET}: {name} is no {expected.__name__}.")
        return None
    return target


def unknown_option(key: str, owner: str, options: Iterable[str]) -> str:
    """The sentence on a name that does not exist: `key` as it was given, and what there is
    instead.
    """
    parent, _, name = key.rpartition(".")
    names = sorted(options)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {parent}.{close[0]}?".replace(" .", " ") if close else ""
    return f"{key} is not an option of {owner}.{hint} Options: {', '.join(names) or 'none'}."


def _fill(target: type[T], options: Mapping[str, Any], key: str, problems: Problems) -> T | None:
    """Checks every option, whatever the others are like, and makes the object if all are sound."""
    before = len(problems)
    prefix = f"{key}." if key else ""
    fields = {each.name: each for each in dataclasses.fields(target) if each.init}  # type: ignore[arg-type]
    for name in options.keys() - fields.keys():
        problems.add(unknown_option(f"{prefix}{name}", target.__name__, fields))
    annotations = typing.get_type_hints(target, include_extras=True)
    values: dict[str, Any] = {}
    for name, each in fields.items():
        if name in options:
            values[name] = _value(options[name], annotations[name], f"{prefix}{name}", problems)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            problems.add(f"{prefix}{name} is missing: {target.__name__} wants it.")
    if len(problems) > before:
        return None
    try:
        return target(**values)
    except OptionError as error:  # names its options, and cannot know where it stands
        for problem in error.problems:
            problems.add(f"{prefix}{problem}")
    except ConfigError as error:  # names its keys itself
        for problem in error.problems:
            problems.add(problem)
    except ValueError as error:
        problems.add(f"{key}: {error}")
    return None


def _value(value: Any, annotation: Any, key: str, problems: Problems) -> Any:
    if value == MISSING:
        problems.unset.append(key)
        return None
    names_class = (
        isinstance(value, Mapping) and TARGET in value
    )  # then an abstract class may be what is expected
    candidates = (annotation, *_alternatives(annotation))
    nested = next(
        (
            each
            for each in candidates
            if dataclasses.is_dataclass(each) or (names_class and inspect.isabstract(each))
        ),
        None,
    )
    if isinstance(nested, type) and isinstance(value, Mapping):
        return construct(value, key, nested, problems)
    try:
        finite = (
            None if dataclasses.is_dataclass(annotation) else ConfigDict(allow_inf_nan=False)
        )  # a class has its fields checked
        return TypeAdapter(annotation, config=finite).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            where = ".".join(
                map(str, (key, *(part for part in each["loc"] if isinstance(part, int))))
            )
            problems.add(
                f"{where}: {each['input']!r} was given; {each['msg'].removeprefix('Input ')}."
            )
        return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; X | None is how an optional option is annotated."""
    return (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else ()
    )
