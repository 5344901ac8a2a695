"""An edit of one expert is made where the router sends the edited token to it, and nowhere else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import editkit
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.datasets.base import LoadedDataset
from editkit.editors.ft import Ft
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.tokens import pad
from editkit.runner.routed import ELSEWHERE, experts_of, select_routed
from editkit.runner.session import run
from editkit.targets.keys import subject_texts
from editkit.types import EditRequest
from tests.runner.test_self_check import memit, rome
from tests.support.families import family_model
from tests.support.helpers import requests
from tests.support.searches import subject_at_the_end

EXPERT, LAYER = 2, 1  # `rome()` edits this layer
EDITS = requests(24)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return family_model("mixtral", expert=EXPERT)


def dataset(edits: list[EditRequest]) -> LoadedDataset:
    return LoadedDataset(name="some", requests=tuple(edits), digest="d", origin="a test")


def router_chooses(model: EditableModel, edit: EditRequest) -> set[int]:
    """The experts of the subject's last token, from the router's own output."""
    found: list[Any] = []
    router = model.module(f"{model.family.block(LAYER)}.mlp.gate")
    handle = router.register_forward_hook(lambda _module, _args, output: found.append(output[2]))
    with torch.no_grad():
        model.final_hidden(pad(subject_texts(model, edit, ("{}",))))
    handle.remove()
    return set(found[0][-1].tolist())


def test_a_run_selects_the_requests_that_the_router_sends_to_the_expert(
    model: EditableModel,
) -> None:
    expected = [edit for edit in EDITS if EXPERT in router_chooses(model, edit)]
    assert 0 < len(expected) < len(EDITS)
    found = select_routed(model, rome(), dataset(EDITS), edits=len(expected))
    assert list(found.requests) == expected
    assert found.skipped == {ELSEWHERE: len(EDITS) - len(expected)}
    grouped = [
        EditRequest(
            id=f"g{index}", prompt=edit.prompt, subject=edit.subject, target="Rome", group=g
        )
        for index, (edit, g) in enumerate(
            zip([expected[0], next(e for e in EDITS if e not in expected)], "gg", strict=True)
        )
    ]
    with pytest.raises(ConfigError, match="sends 0 of the 2 requests"):
        select_routed(model, rome(), dataset(grouped), edits=1)


def test_too_few_requests_are_one_message_with_the_experts_that_get_more(
    model: EditableModel,
) -> None:
    counts = Counter(number for edit in EDITS for number in router_chooses(model, edit))
    [(most, count), *_] = counts.most_common()
    with pytest.raises(ConfigError) as caught:
        select_routed(model, rome(), dataset(EDITS), edits=24)
    [problem] = caught.value.problems
    assert problem.startswith(
        f"model.expert: the router of tiny-mixtral sends {counts[EXPERT]} of the 24 requests of "
        "dataset=some to this expert, and 24 are to be edited (got 2). Fix: lower edits, or choose"
    )
    assert f"more requests: {most} ({count})" in problem


def test_any_edited_layer_and_any_token_that_the_editor_acts_on_counts(
    model: EditableModel,
) -> None:
    (one,), (several,) = (
        experts_of(model, editor, EDITS[:1]) for editor in (rome(), memit((0, 1, 2)))
    )
    assert one == router_chooses(model, EDITS[0]) < several
    ft = Ft(
        name="ft",
        layers=(LAYER,),
        objective="target",
        steps=2,
        lr=1e-2,
        norm_constraint=None,
        stop_loss=0.0,
        l1=0.0,
        l2=0.0,
    )
    assert experts_of(model, ft, EDITS[:1]) == [{0, 1, 2, 3}]


def test_a_session_refuses_an_edit_without_effect_and_names_the_routers_choice() -> None:
    probe = family_model("mixtral", expert=0)
    edit = subject_at_the_end()
    chosen = router_chooses(probe, edit)
    [other, *_] = {0, 1, 2, 3} - chosen
    refusing = editkit.Session(family_model("mixtral", expert=other), rome(steps=3))
    expected = ", ".join(map(str, sorted(chosen)))
    with pytest.raises(
        ConfigError, match=f"other experts .got {other}; expected one of {expected}"
    ):
        refusing.edit(edit)
    taking = editkit.Session(family_model("mixtral", expert=min(chosen)), rome())
    result = taking.edit(edit)
    assert result.nonfinite is None
    assert result.probability_after[0] > 1.5 * result.probability_before[0]


def test_a_run_edits_one_expert_and_says_how_many_requests_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editkit.runner.session.draw_figures", lambda folder: None)
    model, folder = family_model("mixtral", expert=EXPERT), tmp_path / "mixture"
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    lines = [
        {"id": edit.id, "prompt": edit.prompt, "subject": edit.subject, "target": edit.target}
        for edit in EDITS
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chosen = [
        *("dataset=jsonl", f"dataset.path={tmp_path / 'facts.jsonl'}", "editor=rome"),
        *("model=hf", f"model.id={folder}", f"model.expert={EXPERT}", f"editor.layers=[{LAYER}]"),
        *("editor.covariance=null", "editor.context_lengths=[[3,2]]", "editor.target.steps=3"),
        *("stats=none", "suite=none", "tracker=none", "edits=3", "milestones=[3]"),
        f"paths.outputs={tmp_path / 'outputs'}",
    ]
    made = build(compose(chosen).config)
    assert run(made) == 0
    provenance = json.loads((made.folder / "provenance.json").read_text())
    routed = [f"jsonl/{edit.id}" for edit in EDITS if EXPERT in router_chooses(model, edit)]
    assert provenance["requests"] == routed[:3]
    assert provenance["dataset"]["skipped"][ELSEWHERE] == len(EDITS) - len(routed)
    steps = [json.loads(line) for line in (made.folder / "steps.jsonl").read_text().splitlines()]
    [module] = model.down_projections([LAYER])
    assert all(module in step["modules"] and "nonfinite" not in step for step in steps[1:])
