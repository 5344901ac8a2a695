"""Every editor with every restraint, found by globbing conf/: pairs that are allowed run on every
architecture, all others are refused.

A pair is allowed if the editor has the place at which the restraint acts, and if there is room for
it there.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose, conf_folder
from editkit.config.experiment import Experiment
from editkit.config.pairs import pairs
from editkit.config.schema import Problems, construct
from editkit.editors.base import AbstractSideEditor
from editkit.editors.mend import Mend
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.restraints.base import PLACES, AbstractRestraint, AbstractTotalRestraint
from editkit.runner.loop import run_edits
from editkit.types import EvalRecord, StepRecord
from tests.support.fakes import SumOfWeights, trajectory
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.hypernets import saved
from tests.support.methods import model_moments
from tests.support.paths import ROOT

PAGE = ROOT / "docs/guides/editors.md"
EDITORS = sorted(path.stem for path in (conf_folder() / "editor").glob("*.yaml"))
WITHOUT_EDITS = "none"  # its runs are those of tests/editors/test_none.py
RESTRAINTS = sorted(
    path.stem for path in (conf_folder() / "restraint").glob("*.yaml") if path.stem != "none"
)
STACKS = [("eac", "prune"), ("d4s", "prune"), ("eac", "rect", "prune")]
ONE_SEAT = ("objective", "solve")  # places that have room for one restraint
EDITS = 5
# What stands beside the weights after each of the edits, of which the last two repeat earlier ones.
ENTRIES = {
    **{name: [1, 2, 3, 3, 3] for name in ("grace", "ice", "ike", "memoir", "rag", "scr", "serac")},
    **{"memoe": [4] * EDITS, "wise": [1] * EDITS},
}

# A few steps of each search are enough to see that a pair works; PRUNE's logarithm would enlarge
# the singular values of random matrices.
QUICK = {
    "editor.steps": 2,
    "editor.epochs": 2,
    "editor.target.steps": 3,
    "editor.target.stop_loss": 0.0,  # of five requests two are asked twice
    "editor.stop_loss": 0.0,
    "editor.columns": 8,  # of masks, in narrow networks
    "editor.context_lengths": [[4, 1]],
    "editor.answer": "predicted",  # these requests have no old answer
    "editor.threshold": 0.0,  # every layer has neurons
    "restraint.eac.steps_search": 1,
    "restraint.eac.steps_retrain": 2,
    "restraint.nas.norm": 1.0,
    "restraint.prune.function": "linear",
    "restraint.alphaedit.threshold": 2.0,  # times the mean eigenvalue
    "restraint.alphaedit.threshold_unit": "relative",
    "editor.radius": 1e-3,  # random matrices are small
    "editor.demonstrations": 1,  # short enough for the tests' models
    "editor.facts": 1,
    "editor.pair": "untrained",
}
# exists; `run` puts one of the model at hand in its place
NETWORKS = {"mend": "asset:mend/tiny-gpt2"}


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    return compose(["suite=none", "edits=5", "tracker=none", *overrides]).config


def config(editor: str, restraints: tuple[str, ...], *, model: str = "tiny-gpt2") -> dict[str, Any]:
    """What `editor=... restraint=[...]` composes to, put together from its parts: composing each
    pair would take a third of a second.
    """
    found = copy.deepcopy(composed(f"editor={editor}", f"model={model}"))
    for name in restraints:
        found["restraint"] = (
            found.get("restraint", {}) | copy.deepcopy(composed(f"restraint={name}"))["restraint"]
        )
    for key, value in QUICK.items():
        *parents, name = key.split(".")
        node = functools.reduce(lambda node, part: node.get(part, {}), parents, found)
        if name in node:
            node[name] = value
    if editor in NETWORKS:
        found["editor"]["hypernetwork"] = NETWORKS[editor]
    return found | {
        "dataset": {
            "_target_": "tests.support.build_parts.FewRequests",
            "name": "few",
            "size": EDITS + 1,  # one that is not edited
        }
    }


@functools.cache
def place_of(restraint: str) -> str:
    problems = Problems()
    built = construct(
        composed(f"restraint={restraint}")["restraint"][restraint],
        restraint,
        AbstractRestraint,
        problems,
    )
    assert built is not None, problems
    return built.place


@functools.cache
def editor_of(editor: str) -> Experiment:
    """The editor alone, or as its yaml composes it."""
    return build(config(editor, ()))


def inherent(editor: str) -> tuple[str, ...]:
    """The restraints that an editor's yaml brings along: editor=d4s is MEMIT with D4S."""
    return tuple(editor_of(editor).config["restraint"])


def is_allowed(editor: str, restraints: tuple[str, ...]) -> bool:
    everything = {*inherent(editor), *restraints}
    places = [place_of(name) for name in everything]
    return set(places) <= editor_of(editor).editor.places and all(
        places.count(place) <= 1 for place in ONE_SEAT
    )


Pair = tuple[str, tuple[str, ...]]
ALL: list[Pair] = [
    (editor, stack)
    for editor, stack in itertools.product(
        EDITORS, [(), *[(name,) for name in RESTRAINTS], *STACKS]
    )
]


def label(pair: Pair) -> str:
    return f"{pair[0]}-{'+'.join(pair[1]) or 'none'}"


def marked() -> list[Any]:
    """All pairs. The quick run takes one restraint or two of each place, the slow run all."""
    quick = {"alphaedit", "d4s", "eac", "norm_cap", "prune", "prune_linear", "rect"}

    def is_slow(pair: Pair) -> bool:
        return not set(pair[1]) <= quick

    return [
        pytest.param(pair, id=label(pair), marks=[pytest.mark.slow] if is_slow(pair) else [])
        for pair in ALL
    ]


def run(editor: str, restraints: tuple[str, ...], kind: Kind, folder: Path) -> None:
    experiment = build(config(editor, restraints, model=f"tiny-{kind}"))
    # A layer above the edited ones: what is added at the subject reaches the prompt's end through
    # attention alone.
    layers = getattr(experiment.editor, "layers", None) or (0,)
    model = tiny_model(kind, num_layers=2 + max(layers))
    edit_five(experiment, model, restraints, folder)


def edit_five(
    experiment: Experiment, model: EditableModel, restraints: tuple[str, ...], folder: Path
) -> None:
    """Makes five edits, each of which must write every matrix, and measures every view."""
    edited_by = experiment.editor
    if isinstance(edited_by, Mend):
        edited_by = replace(
            edited_by, hypernetwork=str(saved(model, folder, layers=edited_by.layers))
        )
    modules = edited_by.modules(model)
    asked = [replace(each, id=f"pair/{index}") for index, each in enumerate(requests(EDITS))]
    job = replace(
        trajectory(
            model,
            asked,
            editor=edited_by,
            restraints=experiment.restraints,
            milestones=(0, EDITS),
            checkpoint_every=100,
        ),
        moments=model_moments(model, edited_by.moment_modules(model)),
        evaluators={"fake": SumOfWeights(module=[*model.down_projections((0,)), *modules][-1])},
        pool=(request(0),),
    )
    is_beside = isinstance(edited_by, AbstractSideEditor)
    events = list(run_edits(job))
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.step for step in steps] == list(range(EDITS + 1))
    assert not any(step.nonfinite for step in steps)
    for module in modules:
        figures = [step.modules[module] for step in steps]
        assert all(math.isfinite(value) for figure in figures for value in figure.values())
        if is_beside:
            assert figures == [figures[0]] * len(figures), "the weights stay as they are"
            continue
        assert min(figure["update_frobenius"] for figure in figures[1:]) > 0, (
            "every edit writes every matrix"
        )
        assert not torch.equal(model.weight(module), model.base(module))
    if is_beside:
        sides = [step.side for step in steps[1:] if step.side is not None]
        assert len(sides) == EDITS
        counts = [side.get("entries", side.get("ranks")) for side in sides]
        assert counts == ENTRIES.get(experiment.editor.name, counts)
        assert all(counts)
    seen = {event.view for event in events if isinstance(event, EvalRecord) and event.step == EDITS}
    totals = {
        name
        for name in restraints
        if isinstance(job.restraints.totals.get(name), AbstractTotalRestraint)
    }
    assert seen == {"unrestrained", *totals}


@pytest.mark.parametrize("pair", marked())
def test_a_pair_runs_five_edits_on_every_architecture_or_is_refused_with_the_places_that_there_are(
    pair: Pair, tmp_path: Path
) -> None:
    if is_allowed(*pair):
        for kind in KINDS if pair[0] != WITHOUT_EDITS else ():
            run(*pair, kind, tmp_path)
    else:
        assert_refused(*pair)


def assert_refused(editor: str, restraints: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        build(config(editor, restraints))
    places = editor_of(editor).editor.places
    text, name = str(raised.value), editor_of(editor).config["editor"]["name"]
    for restraint in restraints:
        if place_of(restraint) not in places:
            allowed = ", ".join(place for place in PLACES if place in places)
            expected = f"one of {allowed}" if allowed else "no restraint"
            assert (
                f"restraint.{restraint}: editor={name} cannot be restrained at this place "
                f"(got '{place_of(restraint)}'; expected {expected})." in text
            )
    for place in ONE_SEAT:
        named = [each for each in (*inherent(editor), *restraints) if place_of(each) == place]
        if place in places and len(set(named)) > 1:
            assert (
                f"restraint: {' and '.join(named)} act on the {place} "
                f"(expected at most one restraint on the {place})." in text
            )


def test_a_pair_that_is_put_together_here_is_what_composing_it_gives() -> None:
    for editor, restraints in (
        ("rome", ("eac", "rect", "prune")),
        ("d4s", ("prune",)),
        ("ft", ("norm_cap",)),
    ):
        whole = compose(
            [
                "suite=none",
                "edits=5",
                "tracker=none",
                f"editor={editor}",
                f"restraint=[{','.join(restraints)}]",
            ]
        ).config
        parts = config(editor, restraints)
        assert set(whole["restraint"]) == set(parts["restraint"])
        assert whole["editor"].keys() == parts["editor"].keys()


def test_the_table_of_pairs_is_that_of_the_classes() -> None:
    rows = {row.editor: row.restraints for row in pairs()}
    assert rows.keys() == {editor for editor in EDITORS if not inherent(editor)}
    for editor, by_place in rows.items():
        assert tuple(by_place) == PLACES
        assert {(place, name) for place, names in by_place.items() for name in names} == {
            (place_of(name), name) for name in RESTRAINTS if is_allowed(editor, (name,))
        }


def test_the_guides_table_says_which_editor_takes_which_restraint() -> None:
    header, *rows = re.search(r"(?m)^\| editor \|.*\n(?:\|.*\n)+", PAGE.read_text())[0].splitlines()  # type: ignore[index]
    places = [cell.strip() for cell in header.strip("|").split("|")][1:]
    assert places == list(PLACES)
    said = {}
    for row in rows[1:]:
        editor, *cells = (re.findall(r"`(\w+)`", cell) for cell in row.strip("|").split("|"))
        said[editor[0]] = {
            (place, name) for place, names in zip(places, cells, strict=True) for name in names
        }
    plain = [editor for editor in EDITORS if not inherent(editor)]
    assert said.keys() == set(plain)
    for editor in plain:
        assert said[editor] == {
            (place_of(name), name) for name in RESTRAINTS if is_allowed(editor, (name,))
        }
    for editor in set(EDITORS) - set(plain):
        assert re.search(rf"`editor={editor}`[^.]* composed with", PAGE.read_text()), editor
