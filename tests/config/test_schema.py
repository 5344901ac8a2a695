"""Constructing objects from mappings: types, missing options, and the full keys of problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan

from editkit.config.schema import Problems, construct
from editkit.errors import ConfigError, OptionError, message


def test_a_field_may_say_that_it_takes_infinity() -> None:
    @dataclass(frozen=True)
    class Endless:
        bound: Annotated[float, AllowInfNan(True)]
        pair: tuple[float, ...] = ()

    problems = Problems()
    assert construct({"bound": math.inf}, "x", Endless, problems) == Endless(math.inf)
    assert construct({"bound": 1.0, "pair": [1.0, math.nan]}, "x", Endless, problems) is None
    assert problems.messages == ["x.pair.1: invalid value (got nan; expected a finite number)."]


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    ratio: float
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    pairs: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ValueError("ratio is negative")


def constructed(**node: Any) -> tuple[Outer | None, Problems]:
    problems = Problems()
    return construct(node, "outer", Outer, problems), problems


def test_lists_become_tuples_integers_floats_and_mappings_nested_values() -> None:
    assert constructed(ratio=1, inner={"size": 2}, pairs=[[1, 2]])[0] == Outer(
        ratio=1.0, inner=Inner(size=2), pairs=((1, 2.0),)
    )


def test_an_error_of_the_class_itself_is_a_problem_at_its_key() -> None:
    assert constructed(ratio=-1)[1].messages == ["outer: ratio is negative"]


def test_a_field_without_default_is_wanted() -> None:
    assert constructed(inner={})[1].messages == [
        "outer.ratio: missing option of Outer. Fix: set outer.ratio=<value>.",
        "outer.inner.size: missing option of Inner. Fix: set outer.inner.size=<value>.",
    ]


def test_unset_values_are_collected_apart() -> None:
    assert constructed(ratio="???", inner={"size": "???"})[1].unset == [
        "outer.ratio",
        "outer.inner.size",
    ]


@dataclass(frozen=True, kw_only=True)
class Limited:
    """An object that reports its own option, without knowing its key."""

    ratio: float

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise OptionError(
                message("ratio", "out of range", got=self.ratio, expected="0 or more")
            )


@dataclass(frozen=True, kw_only=True)
class Holder:
    limit: Limited | None = None
    limits: tuple[Limited, ...] = ()


def problems_of(key: str, expected: type[object], **node: Any) -> list[str]:
    problems = Problems()
    assert construct(node, key, expected, problems) is None
    return problems.messages


def test_an_option_error_gets_the_key_that_its_object_stands_at() -> None:
    assert problems_of("restraint.cap2", Limited, ratio=-1) == [
        "restraint.cap2.ratio: out of range (got -1.0; expected 0 or more)."
    ]
    assert problems_of("", Limited, ratio=-1) == [
        "ratio: out of range (got -1.0; expected 0 or more)."
    ]


def test_an_option_error_of_a_nested_object_or_of_a_list_item_gets_the_full_key() -> None:
    assert problems_of("editor", Holder, limit={"ratio": -1}) == [
        "editor.limit.ratio: out of range (got -1.0; expected 0 or more)."
    ]
    assert problems_of("editor", Holder, limits=[{"ratio": 1}, {"ratio": -1}]) == [
        "editor.limits.1.ratio: out of range (got -1.0; expected 0 or more)."
    ]


def test_an_error_with_full_keys_keeps_them() -> None:
    @dataclass(frozen=True)
    class Reader:
        path: str

        def __post_init__(self) -> None:
            raise ConfigError("data.json: no such file.")

    assert problems_of("dataset", Reader, path="data.json") == ["data.json: no such file."]
