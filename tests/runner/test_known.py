"""`dataset.known_only`: a run edits only what its unedited model knows, and says how many that are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from editkit.config.build import build, locate
from editkit.config.compose import compose, conf_folder
from editkit.config.experiment import Experiment
from editkit.datasets.base import LoadedDataset
from editkit.editors.base import Step
from editkit.errors import ConfigError
from editkit.evaluation.known import known_facts_of, knows
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.load import ModelConfig
from editkit.model.tokens import encode_prompts, target_ids
from editkit.runner import known, selecting
from editkit.runner.base import load_model
from editkit.runner.checkpoint import load_state
from editkit.runner.known import ASKED, KNOWN, NO_ANSWER, UNKNOWN, select_known
from editkit.runner.session import run
from editkit.runner.signals import Stopped
from editkit.training.build import build_training
from editkit.types import EditRequest
from tests.support.fakes import FakeEditor
from tests.support.helpers import world_requests

BELIEVED = ("0", "2", "4", "6", "8", "10")  # the ids of the facts that are true in the world


@dataclass(frozen=True, kw_only=True)
class CutOff(FakeEditor):
    """Is cut off before a request."""

    stops_at: str = ""
    refuses: str = ""  # an id

    def plan(self, step: Step) -> Any:
        if step.requests[0].id == self.stops_at:
            raise KeyboardInterrupt
        return super().plan(step)

    def check_requests(self, data: LoadedDataset, requests: Any) -> list[str]:
        return [f"it: refuses {edit.id}" for edit in requests if edit.id == self.refuses]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return ModelConfig(id="asset:tiny-gpt2").load("cpu")


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.runner.session.draw_figures", lambda folder: None)


def mixed() -> list[EditRequest]:
    """Twelve facts of the world. Each second one has another old target than the true one, which
    the model does not believe.
    """
    return [
        replace(edit, id=str(index), target_old=edit.target, target="nothing")
        if index % 2
        else replace(edit, id=str(index))
        for index, edit in enumerate(world_requests(12))
    ]


def dataset(requests: list[EditRequest]) -> LoadedDataset:
    return LoadedDataset(name="mixed", requests=tuple(requests), digest="d", origin="a test")


def test_a_fact_is_known_if_greedy_decoding_gives_the_whole_true_answer(
    model: EditableModel,
) -> None:
    edits = mixed()
    tokenizer = model.tokenizer
    prompts = encode_prompts(tokenizer, [edit.full_prompt for edit in edits])
    answers = [target_ids(tokenizer, edit.full_prompt, edit.target_old or "") for edit in edits]
    longest = max(map(len, answers))
    texts = generate(model, prompts, max_new_tokens=longest, ends=())
    plain = [text[: len(answer)] == answer for text, answer in zip(texts, answers, strict=True)]
    assert knows(model, edits) == tuple(plain)
    assert [edit.id for edit, is_known in zip(edits, plain, strict=True) if is_known] == [*BELIEVED]
    assert any(len(answer) > 1 for answer in answers)


def test_tracing_has_the_same_idea_of_a_known_fact(model: EditableModel) -> None:
    edits = mixed()
    facts = known_facts_of(model, edits)
    assert len(facts) == sum(knows(model, edits)) == len(BELIEVED)
    assert known_facts_of(model, [edits[1], edits[2]]) == (facts[1],)


def test_known_facts_stay_in_order_and_all_others_are_counted(model: EditableModel) -> None:
    edits = mixed()
    edits[4] = replace(edits[4], target_old=None)
    selected = select_known(model, dataset(edits))
    assert [edit.id for edit in selected.requests] == ["0", "2", "6", "8", "10"]
    assert selected.skipped == {UNKNOWN: 6, NO_ANSWER: 1}
    assert selected.remarks == {ASKED: 12, KNOWN: 5}
    assert selected.provenance()["requests"] == 5


def test_a_group_stays_or_goes_as_a_whole(model: EditableModel) -> None:
    edits = mixed()
    edits[1:3] = [replace(edit, group="half") for edit in edits[1:3]]
    edits[8], edits[9] = edits[9], edits[8]
    edits[9:11] = [replace(edit, group="whole") for edit in edits[9:11]]
    selected = select_known(model, dataset(edits))
    assert [edit.id for edit in selected.requests] == ["0", "4", "6", "8", "10"]
    assert selected.skipped == {UNKNOWN: 7}


def test_more_edits_begin_with_the_same_facts_and_ask_for_no_more_than_needed(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selecting, "ASKED_TOGETHER", 5)
    ids = {
        edits: [edit.id for edit in select_known(model, dataset(mixed()), edits=edits).requests]
        for edits in (1, 3, 4, 6)
    }
    assert ids == {
        1: ["0", "2", "4"],
        3: ["0", "2", "4"],
        4: ["0", "2", "4", "6", "8"],
        6: [*BELIEVED],
    }
    assert select_known(model, dataset(mixed()), edits=3).remarks[ASKED] == 5


def test_too_few_known_facts_are_one_message_with_all_counts(model: EditableModel) -> None:
    edits = mixed()
    edits[0] = replace(edits[0], target_old=None)
    with pytest.raises(ConfigError) as caught:
        select_known(model, dataset(edits), edits=6)
    assert caught.value.problems == (
        "edits: tiny-gpt2 knows 5 of the 12 facts of dataset=mixed; 1 of the others have no true answer "
        "(got 6; expected at most 5, as dataset.known_only=true). Fix: lower edits, choose a dataset "
        "that the model knows more of, or set dataset.known_only=false.",
    )


def test_a_signal_ends_the_questions(model: EditableModel) -> None:
    with pytest.raises(Stopped):
        select_known(model, dataset(mixed()), should_stop=lambda: True)


def experiment(folder: Path, *overrides: str, edits: int = 4, **editor: Any) -> Experiment:
    """Edits of the twelve facts, in a file of editkit's own format."""
    lines = [
        {
            "id": edit.id,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target": edit.target,
            "target_old": edit.target_old,
        }
        for edit in mixed()
    ]
    path = folder / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    chosen = [
        *("dataset=jsonl", "dataset.name=mixed", f"dataset.path={path}", "model=tiny-gpt2"),
        *("stats=none", "editor.covariance=null", "suite=none", "tracker=none"),
        *(f"edits={edits}", "milestones=[0,4]", "checkpoint.every=1", "dataset.known_only=true"),
        *("evaluation.protocols=[probability,argmax]", f"paths.outputs={folder / 'outputs'}"),
    ]
    made = build(compose([*chosen, *overrides]).config)
    return replace(made, editor=CutOff(**editor))


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def recorded(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return content


def test_a_run_edits_what_its_model_knows_and_its_provenance_says_so(tmp_path: Path) -> None:
    made = experiment(tmp_path)
    assert made.data.label == "mixed known_only=true"
    assert run(made) == 0
    provenance = recorded(made.folder)
    assert provenance["requests"] == [f"mixed/{name}" for name in BELIEVED[:4]]
    data = provenance["dataset"]
    assert (data["requests"], data["skipped"]) == (6, {UNKNOWN: 6})
    assert data["remarks"] == {ASKED: 12, KNOWN: 6}
    assert data["variant"] == {"known_only": "true"}
    assert run(made) == 0  # done already
    # The unedited model believes none of the new targets.
    records = [json.loads(line) for line in (made.folder / "evals.jsonl").read_text().splitlines()]
    (before,) = [
        record
        for record in records
        if record["step"] == 0
        and (record["metric"], record.get("protocol")) == ("efficacy", "probability")
        and record.get("subset") is None
    ]
    assert before["value"] == 0.0 and before["n"] == 4


def test_an_interrupted_run_resumes_with_the_same_facts(tmp_path: Path) -> None:
    cut = experiment(tmp_path, stops_at="mixed/4")
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert "known facts" in load_state(cut.folder / "state").inputs
    assert run(experiment(tmp_path)) == 0
    whole = experiment(tmp_path, f"paths.outputs={tmp_path / 'whole'}")
    assert run(whole) == 0
    assert recorded(cut.folder)["requests"] == recorded(whole.folder)["requests"]
    steps = [(made.folder / "evals.jsonl").read_text() for made in (cut, whole)]
    assert steps[0] == steps[1]


def test_a_run_does_not_resume_with_other_known_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = experiment(tmp_path, stops_at="mixed/4")
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    monkeypatch.setattr(
        known, "knows", lambda model, requests: [edit.id != "mixed/0" for edit in requests]
    )
    with pytest.raises(ConfigError, match="known facts: what the unedited model knows is not what"):
        run(experiment(tmp_path))


def test_too_few_known_facts_leave_earlier_results_alone(tmp_path: Path) -> None:
    made = experiment(tmp_path, "name=same")
    assert run(made) == 0
    before = files(made.folder)
    again = replace(experiment(tmp_path, "name=same", edits=7), folder=made.folder, resume="never")
    with pytest.raises(ConfigError, match="tiny-gpt2 knows 6 of the 12 facts"):
        run(again)
    assert files(made.folder) == before


def test_the_editor_checks_the_facts_that_it_edits(tmp_path: Path) -> None:
    assert run(experiment(tmp_path, refuses="mixed/1")) == 0  # is not known, so is not edited
    made = experiment(tmp_path, f"paths.outputs={tmp_path / 'again'}", refuses="mixed/2")
    with pytest.raises(ConfigError, match="it: refuses mixed/2"):
        run(made)


def test_the_default_changes_no_folder_and_the_option_does(tmp_path: Path) -> None:
    def folder(*overrides: str, without: bool = False) -> str:
        config = compose([*overrides, f"paths.outputs={tmp_path}"]).config
        if without:
            del config["dataset"]["known_only"]
        return locate(config).folder.parent.name

    assert folder() == folder(without=True)
    assert folder("dataset.known_only=true") != folder()


def test_the_answers_are_scored_after_the_check_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def select(model: EditableModel, data: LoadedDataset, **_options: Any) -> LoadedDataset:
        seen.append(model.shortcuts.report())
        return data

    monkeypatch.setattr("editkit.runner.base.select_known", select)
    load_model(experiment(tmp_path), None, should_stop=lambda: False, edits=4)
    [report] = seen
    assert report["scoring"]["taken"]


def test_every_dataset_has_the_option() -> None:
    options = sorted(path.stem for path in (conf_folder() / "dataset").glob("*.yaml"))
    assert len(options) > 10
    for option in options:
        path = ["dataset.path=facts.jsonl"] if option == "jsonl" else []
        config = compose([f"dataset={option}", *path, "dataset.known_only=true"]).config
        assert config["dataset"]["known_only"] is True


def test_a_training_uses_known_facts_only(model: EditableModel) -> None:
    training = build_training(
        compose(
            [
                *("editor=mend", "model=tiny-gpt2", "dataset=world", "dataset.limit=60"),
                *("editor.train.held_apart=10", "editor.train.validation=10"),
                *("dataset.known_only=true", "tracker=none"),
            ]
        ).config
    )
    assert training.data.known_only
    edits = list(training.data.requests)
    edits[20] = replace(edits[20], target_old=edits[20].target)
    selected = select_known(model, replace(training.data, requests=tuple(edits)))
    known_training = training.of(selected)
    unknown = {edit.id for edit in edits} - {edit.id for edit in selected.requests}
    assert edits[20].id in unknown
    assert {edit.id for edit in training.split.used} & unknown
    assert not {edit.id for edit in known_training.split.used} & unknown
    assert known_training.data is selected
