"""Runs whose editor puts something beside the weights: resumed, rolled back, exported, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.api.exported import load_edited
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.model.beside import SIDE_CONFIG, SIDE_TENSORS
from editkit.model.load import ModelConfig
from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import RunState, load_state
from editkit.runner.export import export
from editkit.runner.loop import run_edits
from editkit.runner.session import run as run_experiment
from editkit.types import EvalRecord, StepRecord
from tests.editors.test_grace import GRACE
from tests.editors.test_memoe import MEMOE
from tests.editors.test_memoir import MEMOIR
from tests.editors.test_serac import SERAC
from tests.editors.test_t_patcher import T_PATCHER
from tests.editors.test_wise import WISE
from tests.support.fakes import trajectory
from tests.support.helpers import requests, tiny_model
from tests.support.memories import ICE
from tests.support.sessions import finish, records, run_folder, start, wait_for_lines

COMMON = (
    *("model=tiny-gpt2", "suite=none", "tracker=none", "edits=6", "milestones=[0,3,6]"),
    *("checkpoint.every=2", "evaluation.timings=[milestone,immediate,final]"),
)
RUNS = {
    "grace": (*COMMON, "editor=grace", "editor.steps=5"),
    "ike": (*COMMON, "editor=ike", "editor.demonstrations=2"),
}
RUN = RUNS["grace"]
# Of each kind of side, a run to export: codebook, adapter, experts, masked memory, side memory,
# patches, texts, stand-in.
QUICK = ("model=tiny-gpt2", "suite=none", "tracker=none", "edits=3", "milestones=[3]")
EXPORTED = {
    **{
        editor: (*QUICK, f"editor={editor}", "editor.steps=5")
        for editor in ("grace", "lora", "memoe", "memoir", "t_patcher", "wise")
    },
    "ike": (*QUICK, "editor=ike", "editor.demonstrations=2"),
    "serac": (*QUICK, "editor=serac", "editor.pair=untrained", "editor.cosine=0.5"),
}
IKE = replace(ICE, name="ike", demonstrations=1)
EDITORS = [
    *(GRACE, replace(MEMOE, steps=2, noise=0.1), MEMOIR, replace(WISE, shard=2, merge_every=4)),
    *(IKE, SERAC, T_PATCHER),
]


def job(editor: Any = GRACE, **changes: Any) -> Any:
    asked = [replace(each, id=f"side/{index}") for index, each in enumerate(requests(6))]
    asked = [replace(each, target=f"{each.target} {index}") for index, each in enumerate(asked)]
    made = trajectory(tiny_model("llama"), asked, editor=editor, milestones=(0, 3, 6))
    return replace(made, pool=tuple(requests(2)), **changes)


def without_seconds(events: Sequence[Any]) -> list[Any]:
    return [
        replace(event, seconds={}) if isinstance(event, StepRecord) else event
        for event in events
        if not isinstance(event, RunState)
    ]


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: editor.name)
def test_a_run_resumed_from_any_checkpoint_has_the_records_and_the_bits_of_a_whole_one(
    editor: Any,
) -> None:
    whole = list(run_edits(job(editor)))
    states = [event for event in whole if isinstance(event, RunState)]
    assert [state.step for state in states] == [0, 2, 4, 6]
    for state in states[:-1]:
        read = RunState.from_checkpoint(state.checkpoint({}))
        rest = list(run_edits(job(editor), read))
        assert without_seconds(rest) == without_seconds(whole[whole.index(state) + 1 :])
        last = next(event for event in reversed(rest) if isinstance(event, RunState))
        for name, tensor in states[-1].editor.items():
            assert torch.equal(last.editor[name], tensor)


@pytest.mark.parametrize("editor", [GRACE, IKE], ids=lambda editor: editor.name)
def test_with_rollback_every_batch_stands_alone(editor: Any) -> None:
    events = list(run_edits(job(editor, rollback=True)))
    entries = [
        event.side["entries"] for event in events if isinstance(event, StepRecord) and event.side
    ]
    assert entries == [1] * 6


def test_what_stands_beside_the_weights_is_recorded_as_often_as_the_weights() -> None:
    whole = job()
    rare = replace(whole, schedule=replace(whole.schedule, telemetry_every=4, milestones=(0, 3)))
    steps = [event for event in run_edits(rare) if isinstance(event, StepRecord)]
    assert [step.step for step in steps if step.side is not None] == [3, 4, 6]
    assert [step.step for step in steps if step.modules] == [0, 3, 4, 6]


def test_routing_is_measured_at_milestones() -> None:
    events = [
        event.measurement
        for event in run_edits(job())
        if isinstance(event, EvalRecord) and event.measurement.kind == "routing"
    ]
    found = {(each.metric, each.task): [] for each in events}  # type: ignore[var-annotated]
    for each in events:
        found[each.metric, each.task].append((each.value, each.n))
    assert found["recall", "prompt"] == [(1.0, 3), (1.0, 6)]
    assert found.keys() == {
        ("recall", "prompt"),
        ("recall", "paraphrase"),
        ("false_alarms", "neighbour"),
    }


def test_the_tokens_that_stay_in_the_context_are_measured_where_texts_stand_there() -> None:
    found = [
        event.measurement
        for event in run_edits(job(IKE))
        if isinstance(event, EvalRecord) and event.measurement.metric == "context_tokens"
    ]
    assert {each.task for each in found} == {"prompt", "paraphrase", "neighbour"}
    assert all(each.kind == "routing" and (each.value or 0) > 5 for each in found)
    assert all(
        event.measurement.metric != "context_tokens"
        for event in run_edits(job())
        if isinstance(event, EvalRecord)
    )


def test_a_search_that_is_not_finite_attaches_nothing() -> None:
    broken = job(on_collapse="continue")
    broken.model.network.get_output_embeddings().weight.data[0] = torch.nan
    events = list(run_edits(broken))
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert all(step.nonfinite == "loss" and step.side is None for step in steps[1:])


def undisturbed_run(outputs: Path, run: Sequence[str]) -> Path:
    """The folder of a whole run."""
    experiment = build(compose([*run, f"paths.outputs={outputs}"]).config)
    assert run_experiment(experiment) == 0
    return run_folder(outputs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), RUN)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_killed_run_is_completed_with_the_same_records_and_state(
    run: Sequence[str], tmp_path: Path
) -> None:
    process = start(tmp_path, run)
    wait_for_lines(process, tmp_path, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = finish(tmp_path, run)
    whole = finish(tmp_path / "whole", run)
    for name in (STEPS, EVALS):
        assert records(killed, name) == records(whole, name)
    ours, theirs = (load_state(folder / "state").editor for folder in (killed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the exported folder of each kind, and the logits that one fresh
    process gave for all of them.
    """
    place = tmp_path_factory.mktemp("exported")
    for kind, run in EXPORTED.items():
        export(undisturbed_run(place / kind / "outputs", run), place / kind / "folder")
    texts = [each.full_prompt for each in build(compose([*COMMON]).config).data.requests[:3]]
    script = place / "fresh.py"
    script.write_text(
        "import pathlib, sys, torch, transformers, editkit\n"
        "for place in map(pathlib.Path, sys.argv[2:]):\n"
        "    network = editkit.load_edited(place / 'folder')\n"
        "    tokenizer = transformers.AutoTokenizer.from_pretrained(place / 'folder')\n"
        "    texts = [tokenizer(text, return_tensors='pt') for text in eval(sys.argv[1])]\n"
        "    torch.save([network(**text).logits for text in texts], place / 'logits.pt')\n"
    )
    folders = [str(place / kind) for kind in EXPORTED]
    command = [sys.executable, str(script), repr(texts), *folders]
    subprocess.run(command, check=True, timeout=300)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_folder_gives_the_same_logits_in_a_fresh_process(
    kind: str, exported: Path
) -> None:
    whole = run_folder(exported / kind / "outputs")
    assert json.loads((whole / "provenance.json").read_text())["requests"]
    experiment = build(compose([*EXPORTED[kind]]).config)
    texts = [each.full_prompt for each in experiment.data.requests[:3]]
    model = ModelConfig(id="asset:tiny-gpt2").load("cpu")
    state = load_state(whole / "state").editor
    sides = experiment.editor.attach(model, state)  # type: ignore[attr-defined]
    changed = 0
    for text, logits in zip(texts, torch.load(exported / kind / "logits.pt"), strict=True):
        encoded = model.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            model.attach(*sides)
            assert torch.equal(model.network(**encoded).logits, logits)
            model.attach()
            changed += not torch.equal(model.network(**encoded).logits, logits)
    assert changed == len(texts)


def test_a_side_that_does_not_belong_to_its_folder_is_refused_by_name(
    undisturbed: Path, tmp_path: Path
) -> None:
    export(undisturbed, folder := tmp_path / "exported")
    with pytest.raises(ConfigError, match="something stands beside the weights"):
        ModelConfig(id=str(folder)).load("cpu")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    network = load_edited(folder)
    network.transformer.wpe.weight.data += 1  # type: ignore[union-attr, operator]
    network.save_pretrained(other)
    with pytest.raises(ConfigError, match="another model than the one of this folder"):
        load_edited(other)
    (folder / SIDE_CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_edited(folder)
    (folder / SIDE_TENSORS).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_edited(folder)
    with pytest.raises(ConfigError, match="no model there"):
        load_edited(tmp_path)


def test_restraints_on_the_weights_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError) as raised:
        build(compose([*RUN, "restraint=[rect,prune]"]).config)
    text = str(raised.value)
    assert "restraint.rect: editor=grace cannot be restrained at this place" in text
    assert "restraint.prune: editor=grace cannot be restrained at this place" in text
