"""The search space: Hydra's sweeps as dimensions, layers by depth, and reproducible draws."""

from __future__ import annotations

import random

import pytest

from editkit.errors import ConfigError, OptionError
from editkit.tuning.space import Dimension, Layers, Search, dimension, draw, unknown_keys


def test_layers_follow_the_depth_of_the_model() -> None:
    layers = Layers(at=(0.1, 0.25, 0.5), window=(1, 3))
    assert layers.of(30) == ((3,), (1, 2, 3), (7,), (5, 6, 7), (14,), (12, 13, 14))
    assert layers.of(6) == ((0,), (1,), (0, 1), (2,), (0, 1, 2))


def test_layers_out_of_range_are_refused_together() -> None:
    with pytest.raises(OptionError) as caught:
        Layers(at=(1.5,), window=(0,))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["at", "window"]


def test_a_search_that_edits_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing is edited"):
        Search(trials=1, edits=0, sequential=0, seed=0)
    with pytest.raises(OptionError, match="2 problems"):
        Search(trials=0, edits=-1, sequential=1, seed=0)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("choice(0.1,0.2)", ("0.1", "0.2")),
        ("null,1e-3", ("null", "0.001")),
        ("[1],[2,3]", ("[1]", "[2,3]")),
        ("range(1,4)", ("1", "2", "3")),
        ("relative", ("relative",)),
        (0.5, ("0.5",)),
        ("choice(1,1)", ("1",)),
    ],
)
def test_discrete_values_are_those_of_hydra(value: object, texts: tuple[str, ...]) -> None:
    assert dimension("editor.x", value).texts == texts


def test_numbers_of_an_interval_lie_in_it() -> None:
    generator = random.Random(0)
    plain = dimension("x", "interval(2,3)")
    log = dimension("x", "tag(log,interval(1e-4,1))")
    whole = dimension("x", "int(interval(1,5))")
    assert all(2 <= float(plain.draw(generator)) <= 3 for _ in range(50))
    assert {int(whole.draw(generator)) for _ in range(100)} == {1, 2, 3, 4, 5}
    small = sum(float(log.draw(generator)) < 1e-2 for _ in range(200))
    assert 60 < small < 140, "half of the draws lie in the lower half of the exponents"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("range(4,1)", "an empty range"),
        ("interval(2,1)", "an empty range"),
        ("tag(log,interval(0,1))", "an empty range"),
        ("choice()", "cannot be read"),
        ("choice(1", "cannot be read"),
    ],
)
def test_an_empty_or_malformed_range_is_refused_with_its_key(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"editor\.lr: {problem}.*got .*expected"):
        dimension("editor.lr", value)


def test_a_small_grid_is_tried_as_a_whole() -> None:
    space = [dimension("a", "1,2"), dimension("b", "x,y"), dimension("c", "7")]
    points = [(f"a={a}", f"b={b}", "c=7") for a in (1, 2) for b in "xy"]
    assert draw(space, 4, seed=0) == draw(space, 12, seed=5) == points


def test_more_trials_begin_with_the_same_points_and_no_point_comes_twice() -> None:
    space = [
        Dimension(key="a", texts=tuple("abcdefgh")),
        dimension("b", "tag(log,interval(1e-5,1))"),
    ]
    few, many = draw(space, 5, seed=3), draw(space, 40, seed=3)
    assert few == many[:5]
    assert len(set(many)) == 40
    assert draw(space, 5, seed=4) != few


def test_an_unknown_key_names_the_nearest_one() -> None:
    config = {"editor": {"target": {"lr": 0.1, "steps": 3}}, "restraint": {}}
    space = {"editor.target.lr": 1, "editor.target.stepz": 1, "restraint.eac.gamma": 1}
    stepz, eac = unknown_keys(space, config)
    assert stepz.startswith("editor.target.stepz: unknown option of editor.target")
    assert "did you mean editor.target.steps?" in stepz
    assert eac.startswith("restraint.eac: unknown option of restraint")
