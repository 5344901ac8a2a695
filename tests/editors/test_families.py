"""Every editor edits every family, with and without shortcuts to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editkit.config.build import build
from editkit.model.shortcuts import PLAIN, Comparison, Shortcuts, difference
from editkit.runner.routed import experts_of
from tests.editors.test_pairs import config, edit_five
from tests.support.families import CONFIGS, family_model
from tests.support.helpers import requests

LAYERS = {
    "rome": [1],
    "memit": [0, 1, 2],
    "emmet": [1],
    "pmet": [0, 1, 2],
    "kn": [0, 1, 2],
    "ft": [1],
    "crispedit": [1],
    "locft": [1],
    "malmen": [0, 1, 2],
    "alphaedit": [0, 1, 2],
    "mend": [1, 2],
    "ultraedit": [0, 1, 2],
}
NONE = Shortcuts(
    comparisons=tuple(
        Comparison(shortcut=name, differences={"hidden": 1.0}, tolerance=1e-3) for name in PLAIN
    )
)


def edited(kind: str, editor: str, shortcuts: Shortcuts, folder: Path) -> list[torch.Tensor]:
    """The total of each matrix after five edits."""
    given = config(editor, ())
    given["editor"]["layers"] = LAYERS[editor]
    model = family_model(kind, num_layers=4)
    model.shortcuts = shortcuts
    edit_five(build(given), model, (), folder)
    return [model.total(name).dense() for name in model.edited_modules]


@pytest.mark.slow
@pytest.mark.parametrize("editor", sorted(LAYERS))
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_editor_edits_every_family_with_and_without_shortcuts(
    kind: str, editor: str, tmp_path: Path
) -> None:
    ours, plain = (edited(kind, editor, each, tmp_path) for each in (Shortcuts(), NONE))
    for one, other in zip(ours, plain, strict=True):
        # Of a chain of five edits, each with its own search.
        assert difference(one, other) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["rome", "memit", "emmet", "pmet", "ft", "alphaedit"])
@pytest.mark.parametrize(("kind", "expert"), [("mixtral", 1), ("gpt_oss", 3)])
def test_every_editor_edits_one_expert_with_and_without_shortcuts(
    kind: str, expert: int, editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(editor, ())
    given["editor"]["layers"] = [1]
    experiment, totals = build(given), []
    for shortcuts in (Shortcuts(), NONE):
        model = family_model(kind, expert=expert)
        model.shortcuts = shortcuts
        found = zip(requests(40), experts_of(model, experiment.editor, requests(40)), strict=True)
        routed = [request for request, experts in found if expert in experts]
        monkeypatch.setattr("tests.editors.test_pairs.requests", lambda count: routed[:count])  # noqa: B023
        edit_five(experiment, model, (), tmp_path)
        totals.append(model.total(model.down_projections([1])[0]).dense())
    assert difference(*totals) < 1e-2
