"""Prompts that hold their subject several times, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.api.session import Session
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.datasets.base import AT_LAST_TOKEN, WITHOUT_SUBJECT, loaded
from editkit.datasets.jsonl import JsonLines
from editkit.datasets.knowedit import KnowEdit
from editkit.errors import ConfigError
from editkit.evaluation.known import known_facts_of
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.tokens import encode, fill, subject_position
from editkit.targets.keys import subject_texts
from editkit.targets.sequences import essence_of
from editkit.types import EditRequest
from tests.editors.test_ft import ft
from tests.editors.test_rome import rome
from tests.support.counterfact_files import counterfact, flat, question, zsre
from tests.support.counterfact_files import write as written
from tests.support.helpers import KINDS, Kind, tiny_model, tiny_tokenizer
from tests.support.methods import memit, write
from tests.support.searches import settings

TWICE = {"prompt": "Is Rome in Romeland? Rome is in", "subject": "Rome", "target": "Italy"}
LACKING = {"prompt": "The seat of its rulers is", "subject": "France", "target": "Rome"}
NO_SUBJECT = {"prompt": "The seat of its rulers is ", "target": "Rome"}


def read(folder: Path, *records: dict[str, Any], **options: Any) -> Any:
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    dataset = JsonLines(
        name="jsonl", path=str(path), order="file", limit=None, on_bad_record="error", **options
    )
    return loaded(dataset, 0)


def test_the_first_occurrence_is_the_subject_unless_the_last_is_chosen(tmp_path: Path) -> None:
    first, last = "Is {} in Romeland? Rome is in", "Is Rome in Romeland? {} is in"
    assert read(tmp_path, TWICE).requests[0].prompt == first
    chosen = read(tmp_path, TWICE, TWICE | {"occurrence": "first"}, occurrence="last")
    assert [request.prompt for request in chosen.requests] == [last, first]
    assert chosen.variant == {"occurrence": "last"}
    own = read(tmp_path, TWICE | {"occurrence": "last"})
    assert own.requests[0].prompt == last and own.variant == {}
    for value in ("middle", 1, ["last"]):
        with pytest.raises(ConfigError, match=r"occurrence: is no choice .*expected first or last"):
            read(tmp_path, TWICE | {"occurrence": value})


@pytest.mark.parametrize(
    ("prompt", "first", "last"),
    [
        ("人人都是人", "{}人都是人", "人人都是{}"),  # no blanks, no whole words
        ("Romes and Rome and Rome's", "Romes and {} and Rome's", "Romes and Rome and {}'s"),
    ],
)
def test_whole_words_come_before_parts_of_words(
    prompt: str, first: str, last: str, tmp_path: Path
) -> None:
    record = {"prompt": prompt, "subject": "人" if "人" in prompt else "Rome", "target": "x"}
    assert read(tmp_path, record).requests[0].prompt == first
    assert read(tmp_path, record, occurrence="last").requests[0].prompt == last


def test_a_prompt_without_its_subject_is_refused_or_edited_at_its_last_token(
    tmp_path: Path,
) -> None:
    for record, problem in ((LACKING, "prompt: does not hold the"), (NO_SUBJECT, "subject: is mi")):
        with pytest.raises(ConfigError, match=f"line 1: {problem}"):
            read(tmp_path, record)
    data = read(tmp_path, LACKING, NO_SUBJECT, TWICE, subject="last_token")
    assert [(request.prompt, request.subject) for request in data.requests] == [
        ("The seat of its rulers is", ""),
        ("The seat of its rulers is ", ""),
        ("Is {} in Romeland? Rome is in", "Rome"),
    ]
    facts = data.provenance()
    assert facts["remarks"][AT_LAST_TOKEN] == 2
    assert facts["edited_at_last_token"] == ["jsonl/1", "jsonl/2"]
    assert facts["variant"] == {"subject": "last_token"}
    assert "edited_at_last_token" not in read(tmp_path, TWICE).provenance()


def test_every_reader_of_full_prompts_has_the_choice(tmp_path: Path) -> None:
    path = written(tmp_path, [flat(subject="Eve"), flat(1, subject=None), flat(2)])
    requests = counterfact(path, subject="last_token").load(0).requests
    assert [request.subject for request in requests] == ["", "", "Ada"]
    path = written(tmp_path, [question(subject="Eve")])
    assert zsre(path, subject="last_token").load(0).requests[0].full_prompt == question()["src"]
    path = written(tmp_path, [{"prompt": "It is", "subject": "Eve", "target_new": "x"}])
    known = KnowEdit(
        name="k",
        path=path,
        files=(),
        id=None,
        hub_file=None,
        order="file",
        limit=None,
        on_bad_record="error",
        subject="last_token",
    )
    assert known.load(0).requests[0].full_prompt == "It is"


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_is_that_of_the_prompt_in_every_context(kind: Kind) -> None:
    tokenizer = tiny_tokenizer(kind)
    for prompt in ("The seat of its rulers is", "The seat of its rulers is  "):
        for context in ("{}", "Paris is big. {}"):
            place = fill(prompt, "", context=context)
            (encoded,) = encode(tokenizer, [context.replace("{}", prompt.rstrip())])
            assert subject_position(encoded, place) == len(encoded.ids) - 1
    model = tiny_model(kind)
    request = EditRequest(id="x", prompt="The seat of its rulers is", subject="", target="Rome")
    (text,) = subject_texts(model, request, ("{}",))
    assert text == encode(model.tokenizer, [request.prompt])[0].ids
    assert essence_of(request).text == "is a"
    with pytest.raises(ConfigError, match="exactly one"):
        fill("The capital of {} is", "", context="no place")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("editor", ["ft", "rome", "memit"])
def test_every_editor_writes_at_the_last_token(kind: Kind, editor: str) -> None:
    request = EditRequest(id="x", prompt="The seat of its rulers is", subject="", target="Rome")
    search = {"steps": 30, "lr": 0.5, "weight_decay": 0.0, "clamp": 100.0}
    editors: dict[str, Any] = {
        "ft": ft(steps=20, norm_constraint=None),
        "rome": rome(target=settings(**search)),
        "memit": memit(
            layers=(1,),
            context_lengths=(),
            target=search | {"lr_unit": "absolute", "kl_factor": 0.1},
        ),
    }
    model = tiny_model(kind)
    [before] = score(model, [request.probe()], tokens_per_batch=512).values()
    assert write(model, editors[editor], request) > 2 * before.probability


def test_causal_tracing_needs_a_subject() -> None:
    request = EditRequest(
        id="x/1", prompt="Its seat is", subject="", target="Rome", target_old="Paris"
    )
    with pytest.raises(ConfigError, match=r"dataset\.subject: causal tracing .* is x/1\)\. Fix: "):
        known_facts_of(tiny_model(), [request])


def test_a_hand_made_request_without_a_subject_must_have_no_place_for_one() -> None:
    session = Session(tiny_model(), editor=ft())
    with torch.no_grad(), pytest.raises(ConfigError, match="the place of the subject is not mark"):
        session.edit(EditRequest(id="x", prompt="{} is", subject="", target="Rome"))


def test_an_editor_that_needs_no_subject_takes_records_without_one(tmp_path: Path) -> None:
    """Others refuse them; a subject that the prompt does not hold is refused by all."""
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(NO_SUBJECT) + "\n")

    def experiment(editor: str, *more: str) -> Any:
        common = ["model=tiny-gpt2", "suite=none", "tracker=none", "edits=1", "dataset=jsonl"]
        chosen = [*common, f"editor={editor}", f"dataset.path={path}", *more]
        return build(compose(chosen).config)

    for editor in ("ultraedit", "ft", "mend", "grace"):
        data = experiment(editor).data
        assert data.requests[0].subject == "" and data.variant == {}
        provenance = data.provenance()
        assert provenance["without_subject"] == [data.requests[0].id]
        assert provenance["remarks"] == {WITHOUT_SUBJECT: 1}
        assert "edited_at_last_token" not in provenance
    with pytest.raises(ConfigError, match="subject: is missing"):
        experiment("rome")
    with pytest.raises(ConfigError, match=r"dataset\.subject: editor=rome edits at the subject"):
        experiment("rome", "dataset.subject=unneeded")
    path.write_text(json.dumps(LACKING) + "\n")
    with pytest.raises(ConfigError, match="does not hold the subject"):
        experiment("ultraedit")
